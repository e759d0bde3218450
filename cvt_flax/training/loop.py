"""run(config, workdir): the order of things in a run."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview

from cvt_flax.data import resident, sources
from cvt_flax.errors import Diverged, Interrupted, UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import multiply_adds, stage_geometry
from cvt_flax.models.zoo import create_model
from cvt_flax.training import experiment, hardware, sharding
from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.config import ModelConfig, TrainConfig, freeze
from cvt_flax.training.evaluate import evaluate, make_eval_step
from cvt_flax.training.metrics import MetricWriter, read_metrics
from cvt_flax.training.optimizer import make_optimizer, make_schedule, peak_learning_rate
from cvt_flax.training.progress import Progress
from cvt_flax.training.signals import Signals
from cvt_flax.training.step import TrainMetrics, TrainState, init_state, make_train_step

# Steps that the host may be ahead of the device: enough to keep it busy, few enough that a loss
# that is not finite stops the run at once.
_STEPS_AHEAD = 2


def run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path = '', mode: str = 'train'
) -> dict:
  """Trains, or evaluates a trained run.

  A run folder that holds a run of the same config is gone on with; the result is the same, bit
  for bit, as if it had never stopped.

  Args:
    config: as `cvt_flax.training.config.get_config()` makes it.
    workdir: the run folder; '' is runs/NAME-seedN.
    mode: 'train', or 'eval' for the metrics of the run's best checkpoint.

  Returns:
    The final metrics, such as {'test/top1': 0.99, 'test/loss': 0.05, 'test/images': 360, ...}.

  Raises:
    UserError: the config, the data or the folder are not usable; nothing was written over.
    Diverged: the loss stopped being finite; the last good checkpoint is kept.
    Interrupted: SIGTERM or Ctrl-C came; the state was saved.
  """
  config = freeze(config)
  folder = pathlib.Path(workdir or f'runs/{config.name or "run"}-seed{config.seed}')
  match mode:
    case 'train':
      return _train(config, folder)
    case 'eval':
      return _evaluate_run(config, folder)
    case _:
      raise UserError(f'mode={mode!r}: train or eval is needed')


def build_model(config: ModelConfig, num_classes: int) -> CvT:
  """Returns the configured model; what the config leaves empty is the named model's."""
  attributes = dataclasses.asdict(config)
  name, dtype = attributes.pop('name'), attributes.pop('dtype')
  given = {k: v for k, v in attributes.items() if v not in ('', (), 0)}
  try:
    return create_model(name, num_classes, dtype=jnp.dtype(dtype), **given)
  except ValueError as e:
    raise UserError(f'model: {e}') from e


def _check_attention(model: CvT, image_size: int):
  """Refuses to train a model with a stage whose attention sees a single key."""
  for s, stage in enumerate(stage_geometry(model, image_size, image_size)):
    if not stage.height:
      raise UserError(f'image_size={image_size}: too small, stage {s} of the model has no pixel')
    if stage.keys == 1:
      raise UserError(
        f'image_size={image_size} leaves stage {s} of the model a single key, so its attention '
        'does nothing: set model.kv_strides to 1 there, smaller model.patch_strides, or larger '
        'images'
      )


class _Context:
  """What training and evaluating a run have in common: mesh, data, model, jitted evaluation."""

  def __init__(self, config: TrainConfig, folder: pathlib.Path, evaluation: bool):
    self.config, self.folder = config, folder
    self.mesh = sharding.make_mesh(config.mesh.data)
    self.replicated = sharding.replicated(self.mesh)
    self.eval_batch_size = config.eval.batch_size or config.batch_size
    sharding.check_batch('batch_size', config.batch_size, self.mesh)
    if config.eval.batch_size:
      sharding.check_batch('eval.batch_size', config.eval.batch_size, self.mesh)
    print(f'jax {jax.__version__} on {self.mesh.size} x {jax.devices()[0].device_kind}')
    if warning := hardware.unused_accelerator():
      print(warning)

    saved = experiment.read(folder)
    if evaluation and not saved:
      raise UserError(f'{folder} holds no run to evaluate')
    if not saved and folder.exists() and any(folder.iterdir()):
      raise UserError(f'{folder} is not empty and holds no run: give another --workdir')
    self.dataset = sources.load(
      config.source, data_dir=config.data_dir, holdout=config.eval.holdout, seed=config.seed
    )
    self.experiment = experiment.Experiment(config, self.dataset.class_names)
    if saved:
      experiment.check_same(folder, saved, self.experiment, evaluation)
    self.model = build_model(config.model, len(self.dataset.class_names))

    eval_step = make_eval_step(self.model, config.mean, config.std)

    def eval_at(variables, arrays, position):
      batch = resident.eval_batch(arrays, position, batch_size=self.eval_batch_size)
      return eval_step(variables, self._split(batch))

    self._eval_at = jax.jit(eval_at, out_shardings=self.replicated)

  def _split(self, batch):
    return jax.lax.with_sharding_constraint(batch, sharding.split_batch(self.mesh))

  def read(self, split: sources.Split) -> resident.Arrays:
    """Returns a split, decoded, on every device."""
    arrays, skipped = resident.read_arrays(
      split,
      self.config.image_size,
      crop_ratio=self.config.crop_ratio,
      skip_unreadable=self.config.skip_unreadable,
    )
    if skipped:
      print(f'{split.name}: left out {len(skipped)} unreadable images, the first is {skipped[0]}')
    return jax.device_put(arrays, self.replicated)

  def evaluate(self, variables: dict, arrays: resident.Arrays, signals: Signals) -> dict | None:
    """Returns the metrics of a split; None when a signal came in between."""

    def batches():
      for position in range(math.ceil(len(arrays.label) / self.eval_batch_size)):
        if signals.received:
          return
        yield self._eval_at(variables, arrays, position)

    metrics = evaluate(batches())
    return None if signals.received else metrics


  def restore_best(self, checkpoints: Checkpoints) -> dict:
    """Returns the variables of the best checkpoint, averaged where averages are kept."""
    size = self.config.image_size
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes
    )
    averaged = bool(self.config.optimizer.ema_decay)
    return checkpoints.restore_variables(checkpoints.best_step(), abstract, averaged)


class _Training(_Context):
  """A training run: its jitted step, its state, and what is done between steps."""

  def __init__(self, config: TrainConfig, folder: pathlib.Path):
    super().__init__(config, folder, evaluation=False)
    train = self.dataset.train
    if train is None:
      raise UserError(f'{config.source} has no training split')
    _check_attention(self.model, config.image_size)
    self.train_arrays = self.read(train)
    images = len(self.train_arrays.label)
    self.steps_per_epoch = images // config.batch_size
    if not self.steps_per_epoch:
      raise UserError(f'batch_size={config.batch_size}: {config.source} has only {images} images')
    self.total_steps = self.steps_per_epoch * config.epochs
    self.val_arrays = self.read(self.dataset.validation) if self.dataset.validation else None

    c = config.optimizer
    peak = peak_learning_rate(c, config.learning_rate, config.batch_size)
    schedule = make_schedule(c, peak, config.epochs, self.steps_per_epoch)
    tx = make_optimizer(c, schedule)
    train_step = make_train_step(
      self.model,
      tx,
      schedule,
      seed=config.seed,
      mean=config.mean,
      std=config.std,
      augment=config.augment,
      ema_decay=c.ema_decay,
      accumulate_steps=c.accumulate_steps,
    )
    augment = resident.Augment(
      config.augment.crop_padding, config.augment.flip, config.augment.trivial_augment
    )

    def train_at(state, arrays, order):
      epoch, position = jnp.divmod(state.step, self.steps_per_epoch)
      batch = resident.train_batch(
        arrays,
        order,
        position,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        augment=augment,
      )
      return train_step(state, self._split(batch))

    self.step = jax.jit(train_at, donate_argnums=0, out_shardings=self.replicated)
    self.order = jax.jit(
      lambda epoch: resident.epoch_order(config.seed, epoch, images),
      out_shardings=self.replicated,
    )
    self.init = jax.jit(
      lambda: init_state(self.model, tx, config.seed, config.image_size, bool(c.ema_decay)),
      out_shardings=self.replicated,
    )
    self.progress = Progress(self.total_steps, self.steps_per_epoch, config.batch_size)

  def describe(self, state: TrainState) -> None:
    """Prints what is about to happen and writes the table of parameters."""
    c, d = self.config, self.dataset
    sizes = [
      f'{0 if split is None else len(split):,} {name}'
      for name, split in (('train', d.train), ('validation', d.validation), ('test', d.test))
    ]
    print(f'data {c.source}: {", ".join(sizes)} images, {len(d.class_names)} classes')
    count = sum(x.size for x in jax.tree.leaves(state.params))
    cost = multiply_adds(self.model, c.image_size, c.image_size)
    print(
      f'model {c.model.name}: {count:,} parameters, {cost / 1e6:,.1f} M multiply-adds an image of '
      f'{c.image_size}x{c.image_size}'
    )
    print(f'run folder {self.folder}: {c.epochs} epochs of {self.steps_per_epoch} steps')
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    (self.folder / 'parameters.txt').write_text(overview + '\n')

  def eval_is_due(self, step: int) -> bool:
    epoch, rest = divmod(step, self.steps_per_epoch)
    return (
      self.val_arrays is not None
      and not rest
      and (epoch % self.config.eval.every_epochs == 0 or epoch == self.config.epochs)
    )


def _train(config, folder):
  training = _Training(config, folder)
  folder.mkdir(parents=True, exist_ok=True)
  experiment.write(folder, training.experiment, training.dataset.held_out)
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
    stack.callback(checkpoints.close)
    start = checkpoints.latest_step() or 0
    last = read_metrics(folder / 'metrics.jsonl')[-1:]
    if start == training.total_steps and last and 'checkpoint' in last[0]:
      print(f'{folder} is finished')
      return _report(training, last[0])
    state = training.init()
    training.describe(state)
    if start:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
      )
      state = checkpoints.restore(start, abstract)
      print(f'going on from step {start}')
    writer = MetricWriter(folder, start, config.tensorboard)
    stack.callback(writer.close)
    signals = stack.enter_context(Signals())
    _take_steps(training, state, start, checkpoints, writer, signals)
    return _report(training, _finish(training, checkpoints, writer, signals))


def _take_steps(training, state, start, checkpoints, writer, signals):
  """Takes all steps that are left, with their metrics, evaluations and checkpoints."""
  config, progress = training.config, training.progress
  # Losses of steps that the devices may still be at.
  pending = collections.deque()

  def settle(ahead):
    """Waits until at most `ahead` steps are unfinished, and looks at the losses of the others."""
    while len(pending) > ahead:
      step, loss = pending.popleft()
      loss = float(loss)
      if not math.isfinite(loss):
        last = checkpoints.latest_step()
        kept = f'checkpoint {last} is kept' if last else 'there is no checkpoint yet'
        raise Diverged(f'the loss is {loss} at step {step}: {kept} in {training.folder}')
      progress.step(step, loss)

  def write_window(step):
    """Writes the training metrics since the last such line; returns the state with none."""
    window = jax.device_get(state.window).compute()
    values = {f'train/{name}': float(value) for name, value in window.items()}
    values['train/images_per_sec'] = progress.images_per_second()
    writer.write(step, step / training.steps_per_epoch, values)
    progress.interval(step, values['train/loss'])
    return state.replace(window=jax.device_put(TrainMetrics.empty(), training.replicated))

  def save(step, val_top1=None):
    norm = state.window.gradient_norm
    if norm.count and not math.isfinite(float(norm.total)):
      raise Diverged(f'a gradient before step {step} is not finite')
    checkpoints.save(step, state, val_top1)

  def validate(step):
    """Evaluates and saves; False when a signal came in between."""
    metrics = training.evaluate(state.variables, training.val_arrays, signals)
    if metrics is None:
      return False
    values = {f'val/{name}': value for name, value in metrics.items()}
    writer.write(step, step / training.steps_per_epoch, values)
    progress.say(
      f'epoch {step // training.steps_per_epoch}  validation: '
      f'top-1 {metrics["top1"]:.4f}  top-5 {metrics["top5"]:.4f}  loss {metrics["loss"]:.4f}'
    )
    save(step, metrics['top1'])
    return True

  def interrupted(step):
    save(step)
    checkpoints.wait()
    return signals.interruption(step)

  # A signal during an evaluation saved the state, not the metrics: the evaluation is still due.
  recorded = read_metrics(training.folder / 'metrics.jsonl')[-1:]
  if start and training.eval_is_due(start) and 'val/top1' not in recorded[0]:
    if not validate(start):
      raise interrupted(start)

  order = None
  for step in range(start, training.total_steps):
    epoch, position = divmod(step, training.steps_per_epoch)
    if order is None or position == 0:
      order = training.order(epoch)
    began = time.perf_counter()
    state, loss = training.step(state, training.train_arrays, order)
    if step == start:  # compiles
      progress.say(f'first step: loss {loss:.4f}, after {time.perf_counter() - began:.1f} s')
      progress.start()
    done = step + 1
    pending.append((done, loss))
    settle(_STEPS_AHEAD)

    last = done == training.total_steps
    save_is_due = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
    if done % config.log_every == 0 or last:
      settle(0)
      state = write_window(done)
    if training.eval_is_due(done):
      settle(0)
      if not validate(done):
        raise interrupted(done)
      progress.start()
    elif save_is_due or last:
      settle(0)
      save(done)
      progress.start()
    if signals.received:
      settle(0)
      raise interrupted(done)
  checkpoints.wait()


def _finish(training, checkpoints, writer, signals):
  """Reports the best checkpoint: on the test split, which is read here for the only time."""
  step = checkpoints.best_step()
  test = training.dataset.test
  if test is None:
    lines = read_metrics(training.folder / 'metrics.jsonl')
    values = next((m for m in lines if m['step'] == step and 'val/top1' in m), {})
    values = {name: value for name, value in values.items() if name.startswith('val/')}
  else:
    metrics = training.evaluate(
      training.restore_best(checkpoints), training.read(test), signals
    )
    if metrics is None:
      raise signals.interruption(training.total_steps)
    values = {f'test/{name}': value for name, value in metrics.items()}
  values['checkpoint'] = step
  writer.write(training.total_steps, training.config.epochs, values)
  return values


def _evaluate_run(config, folder):
  context = _Context(config, folder, evaluation=True)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(Signals())
    checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
    stack.callback(checkpoints.close)
    step = checkpoints.best_step()
    if step is None:
      raise UserError(f'{folder} holds no checkpoint yet')
    variables = context.restore_best(checkpoints)
    values = {}
    splits = {'val': context.dataset.validation, 'test': context.dataset.test}
    for name, split in splits.items():
      if split is None:
        continue
      metrics = context.evaluate(variables, context.read(split), signals)
      if metrics is None:
        raise Interrupted(f'{signals.received.name}: the evaluation is not finished', 130)
      values |= {f'{name}/{key}': value for key, value in metrics.items()}
    if not values:
      raise UserError(f'{config.source} has neither a validation nor a test split to evaluate')
    return _report(context, values | {'checkpoint': step})


def _report(context, values):
  """Prints final metrics and returns them."""
  for name in ('val', 'test'):
    if f'{name}/top1' in values:
      top1, top5, loss, images = (
        values[f'{name}/{metric}'] for metric in ('top1', 'top5', 'loss', 'images')
      )
      print(
        f'{name}: top-1 {top1:.4f}  top-5 {top5:.4f}  loss {loss:.4f}  on {images:,} images '
        f'(checkpoint of step {values["checkpoint"]})'
      )
  if context.dataset.test is None:
    print(f'{context.config.source} has no labelled test split')
  if context.config.closing_note:
    print(context.config.closing_note)
  return values
