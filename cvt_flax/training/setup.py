"""What a run works with: mesh, data on the devices, model, jitted functions."""

import contextlib
import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import traverse_util

from cvt_flax.data import evaluation_sets, sources
from cvt_flax.errors import UserError, told_of_memory
from cvt_flax.models.geometry import multiply_adds
from cvt_flax.training import experiment, hardware, initialize, sharding
from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.config import EvalConfig, TrainConfig
from cvt_flax.training.engines import ENGINES, Streaming
from cvt_flax.training.evaluate import Answers, collect, make_answer, summarize
from cvt_flax.training.freeze import find_frozen
from cvt_flax.training.network import build_model, check_attention, num_logits
from cvt_flax.training.program import make_program
from cvt_flax.training.progress import Progress
from cvt_flax.training.signals import Signals
from cvt_flax.training.step import TrainState
from cvt_flax.weights import run_folder
from cvt_flax.weights.description import Description
from cvt_flax.weights.preprocessing import Preprocessing


class Setup:
  """What training and evaluating a run have in common: mesh, data, model, jitted evaluation."""

  def __init__(
    self, config: TrainConfig, folder: pathlib.Path, evaluation: bool, weights: bool = False
  ):
    """Checks the config against the folder, reads the data and builds the model.

    Args:
      config: of the run.
      folder: of the run.
      evaluation: whether the run is only evaluated.
      weights: whether config.init_from is evaluated in place of the run in the folder.

    Raises:
      UserError: one of them is not usable.
    """
    self.config, self.folder = config, folder
    build_model(config.model, 10, config.image_size)  # before a wrong name is called another config
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    self.replicated = sharding.replicated(self.mesh)
    self.eval_batch_size = config.eval.batch_size or config.batch_size
    name = 'eval.batch_size' if config.eval.batch_size else 'batch_size'
    sharding.check_batch(name, self.eval_batch_size, self.mesh, sharding.FEWER)
    hardware.announce(self.mesh)

    self.saved = None if weights else experiment.read(folder)
    if not weights:
      experiment.check_folder(folder, self.saved is not None, evaluation)
    if self.saved and not evaluation and not experiment.has_begun(folder):
      self.saved = None  # it came to nothing: another may have its folder
    # Whether other data than the run's is evaluated.
    saved = self.saved
    self.elsewhere = bool(saved) and not sources.are_same(config.source, saved.config.source)
    # Of weights it is not known what they were trained on: validation images are not told apart.
    holdout, train_share = (0.0, 1.0) if weights else (config.eval.holdout, config.train_share)
    if weights:
      self._tell_what_has_no_effect()
    test_holdout = config.eval.test_holdout
    if self.saved:
      experiment.check_config(folder, self.saved.config, config, evaluation)
      if self.elsewhere:
        # Nothing of it was trained on: all can be evaluated.
        holdout, test_holdout, train_share = 0.0, 0.0, 1.0
    self.dataset = sources.load(
      config.source,
      data_dir=config.data_dir,
      holdout=holdout,
      test_holdout=test_holdout,
      train_share=train_share,
      seed=config.seed,
    )
    if test_holdout and not self.dataset.held_out_test.size:
      raise UserError(
        f'eval.test_holdout={test_holdout} has no effect: {config.source} '
        f'{"brings a test" if self.dataset.test is not None else "has no training"} split'
      )
    for split in (self.dataset.train, self.dataset.validation, self.dataset.test):
      if split is not None and split.multi_label:
        raise UserError(
          f'{config.source}: {split.name} has several labels an image; score it by eval.sets='
          f'({config.source!r},), with a source of single labels'
        )
    if self.saved:
      experiment.check_classes(folder, self.saved, config.source, self.dataset.class_names)
      if evaluation and not self.elsewhere:
        experiment.check_held_out(folder, self.saved, self.dataset)
    logits = num_logits(config, len(self.dataset.class_names))
    self.model = build_model(config.model, logits, config.image_size)
    steps = Preprocessing(config.image_size, config.crop_ratio, config.mean, config.std)
    self.description = Description(self.model, self.dataset.class_names, steps)

    self.engine = ENGINES[config.engine](config, self.mesh)
    self._answer = self._jitted_answer(self.engine)
    self.sets = self._open_sets(weights)

  def _tell_what_has_no_effect(self) -> None:
    given = {'eval.holdout': self.config.eval.holdout, 'train_share': self.config.train_share}
    defaults = {'eval.holdout': EvalConfig().holdout, 'train_share': 1.0}
    for name, value in given.items():
      if value != defaults[name]:
        print(f'{name}={value} has no effect where weights are evaluated')

  def _open_sets(self, weights: bool) -> list[evaluation_sets.EvaluationSet]:
    data, config = self.dataset, self.config
    names = [evaluation_sets.set_name(s) for s in config.eval.sets]
    only_train = (data.test is None or data.held_out_test.size) and (
      data.validation is None or data.held_out.size
    )
    own = [each for each in config.eval.sets if sources.are_same(each, config.source)]
    if own and only_train and not weights:
      raise UserError(f'eval.sets: {own[0]} has no images but those that are trained on')
    for name in names:
      if name in ('all', 'train', 'val', 'test') or names.count(name) > 1:
        raise UserError(f'eval.sets={config.eval.sets!r}: {name!r} names other metrics as well')
    return [
      evaluation_sets.load(s, data_dir=config.data_dir, class_names=self.dataset.class_names)
      for s in config.eval.sets
    ]

  def _jitted_answer(self, engine):
    """Returns the jitted (variables, classes that compete, what the engine feeds) -> answers."""
    answer = make_answer(self.model, self.config.mean, self.config.std)

    def step(variables, classes, *fed):
      return answer(variables, engine.eval_batch(self.eval_batch_size, *fed), classes)

    return jax.jit(step, out_shardings=self.replicated)

  def answers(self, variables: dict, data: Any, signals: Signals) -> Answers | None:
    """Returns what the network makes of a split that the engine has opened.

    None when a signal came.
    """
    feed = self.engine.feed_evaluation(data, self.eval_batch_size)
    return self._answers(variables, feed, signals, self._answer)

  def evaluate(self, variables: dict, data: Any, signals: Signals) -> dict | None:
    """Returns the metrics of a split that the engine has opened; None when a signal came."""
    answers = self.answers(variables, data, signals)
    return None if answers is None else summarize(answers, len(self.dataset.class_names))

  def evaluate_sets(self, variables: dict, signals: Signals) -> dict | None:
    """Returns the metrics of config.eval.sets, {'NAME/top1': ...}; None when a signal came."""
    values, count = {}, len(self.dataset.class_names)
    engine, answer = self.engine, self._answer
    if not isinstance(engine, Streaming):  # they are read once
      engine = Streaming(self.config, self.mesh)
      answer = self._jitted_answer(engine)
    for each in self.sets:
      feed = engine.feed_evaluation(each.split, self.eval_batch_size, count)
      answers = self._answers(variables, feed, signals, answer, each.classes)
      if answers is None:
        return None
      metrics = summarize(answers, count)
      if each.classes is not None and each.classes.sum() <= 5:
        del metrics['top5']  # always 1, where no more than five compete
      values |= {f'{each.name}/{name}': value for name, value in metrics.items()}
    return values

  def _answers(self, variables, feed, signals, answer, classes=None):
    if classes is None:
      classes = np.ones(len(self.dataset.class_names), bool)

    def batches():
      for fed in feed:
        if signals.received():
          return
        yield answer(variables, classes, *fed)

    flag = '--config.eval.batch_size'
    memory = told_of_memory(flag, self.eval_batch_size, self.mesh.size)
    with contextlib.closing(feed), memory:
      answers = collect(batches())
    return None if signals.received() else answers

  def variables_of_weights(self) -> dict:
    """Returns the variables that config.init_from holds, on every device."""
    leaves = initialize.initial_variables(
      self.config.init_from,
      self.config.model,
      self.model,
      self.dataset.class_names,
      self.description.preprocessing,
      new_head=False,
    )
    return sharding.place(traverse_util.unflatten_dict(leaves), self.replicated)

  def _shapes(self):
    """Returns the model's variables as shapes."""
    size = self.config.image_size
    return jax.eval_shape(self.model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))

  def restore_best(self, checkpoints: Checkpoints) -> dict:
    """Returns the variables of the best checkpoint, averaged where averages are kept."""
    shapes = self._shapes()
    abstract = sharding.abstract(shapes, sharding.split_state(self.mesh, shapes))
    averaged = bool(self.config.optimizer.ema_decay)
    return checkpoints.restore_variables(checkpoints.best_step(), abstract, averaged)


class TrainingSetup(Setup):
  """A training run: its jitted step, its state, and what is done between steps."""

  def __init__(self, config: TrainConfig, folder: pathlib.Path):
    super().__init__(config, folder, evaluation=False)
    sharding.check_batch('batch_size', config.batch_size, self.mesh, sharding.FEWER)
    self._check_validation()
    train = self.dataset.train
    if train is None:
      raise UserError(f'{config.source} has no training split')
    check_attention(self.model, config.image_size)
    params = traverse_util.flatten_dict(self._shapes()['params'])
    self.frozen = find_frozen(config.optimizer.freeze, params)
    # Before anything is written, so that weights that do not fit leave no run folder.
    self.initial = self._read_weights() if config.init_from and not self.saved else None
    self.train_data = self.engine.open(train)
    images = self.engine.count(self.train_data)
    self.steps_per_epoch = images // config.batch_size
    if not self.steps_per_epoch:
      raise UserError(
        f'batch_size={config.batch_size}: {config.source} has only {images} images to train on'
      )
    self.total_steps = config.steps or self.steps_per_epoch * config.epochs
    self._check_schedule()
    validation = self.dataset.validation
    self.val_data = None if validation is None else self.engine.open(validation)
    used = (self.train_data,) if validation is None else (self.train_data, self.val_data)
    decoded = '+'.join(filter(None, map(self.engine.decoded, used)))
    self.experiment = experiment.Experiment(
      config, self.dataset.class_names, experiment.digest(self.dataset), decoded
    )
    if self.saved:
      experiment.check_data(folder, self.saved, self.experiment)

    self.program = make_program(
      self._with_class_weights() if config.balance_classes else config,
      self.model,
      params,
      self.frozen,
      self.engine,
      self.mesh,
      total_steps=self.total_steps,
      steps_per_epoch=self.steps_per_epoch,
    )
    self.image_share = self._image_share()
    self.progress = Progress(
      self.total_steps, self.steps_per_epoch, config.batch_size, image_share=self.image_share
    )

  @property
  def batch_unit(self) -> int:
    """What divides a batch size that fits: the devices, and the groups of every microbatch."""
    c = self.config
    groups = (c.model.bn_group_size or 1) * c.optimizer.accumulate_steps
    return math.lcm(self.mesh.size, groups)

  def _image_share(self):
    """Returns what an image takes of what the devices could do in a second; None: not known.

    By the model's own multiply-adds, the backward pass twice the forward one.
    """
    rate = hardware.matrix_rate(self.mesh.devices.flat[0].device_kind)
    if not rate or self.config.model.dtype != 'bfloat16' or self.frozen.parameters:
      return None
    size = self.config.image_size
    return 3 * 2 * multiply_adds(self.model, size, size) / (rate * self.mesh.size)

  def _with_class_weights(self):
    """Returns the config with scikit-learn's 'balanced' weights; their mean over images is 1."""
    names = self.dataset.class_names
    counts = np.bincount(self.dataset.train.labels, minlength=len(names))
    if not all(counts):
      empty = names[int(np.argmin(counts))]
      raise UserError(f'balance_classes=true: class {empty!r} has no training image')
    weights = counts.sum() / (len(names) * counts)
    ends = (f'{weights[i]:.3g} ({names[i]})' for i in (weights.argmin(), weights.argmax()))
    print(f'balance_classes: the losses of the classes count from {" to ".join(ends)}')
    return dataclasses.replace(self.config, class_weights=tuple(weights.tolist()))

  def from_weights(self, state: TrainState) -> TrainState:
    """Returns the first state with the weights of config.init_from in it, if any."""
    if not self.config.init_from:
      return state
    # Read already, unless the run's checkpoints were removed.
    leaves, self.initial = self.initial or self._read_weights(), None
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    variables = initialize.replace_leaves(variables, leaves)
    ema = None if state.ema is None else variables
    # Each its own buffers: the step donates them all.
    variables, ema = (
      None if tree is None else sharding.place(tree, sharding.split_state(self.mesh, tree))
      for tree in (variables, ema)
    )
    return state.replace(**variables, ema=jax.tree.map(jnp.copy, ema))

  def _read_weights(self):
    return initialize.initial_variables(
      self.config.init_from,
      self.config.model,
      self.model,
      self.dataset.class_names,
      self.description.preprocessing,
      new_head=True,
    )

  def _check_schedule(self):
    """Checks what only the length of an epoch can tell, where the run is given in steps."""
    c, epochs = self.config.optimizer, self.total_steps / self.steps_per_epoch
    ends = {'warmup_epochs': c.warmup_epochs, 'milestones': max(c.milestones, default=0)}
    for name, last in ends.items():
      if last >= epochs:
        raise UserError(
          f'optimizer.{name} goes up to epoch {last:g}, but steps={self.total_steps} are '
          f'{epochs:.2f} epochs of {self.steps_per_epoch} steps; something smaller is needed, '
          f'{epochs / 10:.2g} for example'
        )

  def _check_validation(self):
    c, d, default = self.config, self.dataset, EvalConfig()
    if d.validation is None and c.eval.every_epochs != default.every_epochs:
      raise UserError(
        f'eval.every_epochs={c.eval.every_epochs} has no effect: there is no validation split'
      )
    if d.validation is not None and not d.held_out.size and c.eval.holdout != default.holdout:
      raise UserError(
        f'eval.holdout={c.eval.holdout} has no effect: {c.source} brings a validation split'
      )

  def write_experiment(self) -> None:
    """Writes what the run folder says of itself."""
    experiment.write(self.folder, self.experiment, self.dataset, self.description, self.mesh)
    include = 'sharding' if self.mesh.shape['fsdp'] > 1 else False
    params = self.program.state.params
    table = parameter_overview.get_parameter_overview(params, include_stats=include)
    (self.folder / run_folder.PARAMETERS).write_text(table + '\n')

  def eval_is_due(self, step: int) -> bool:
    epoch, rest = divmod(step, self.steps_per_epoch)
    return self.val_data is not None and (
      step == self.total_steps or not rest and epoch % self.config.eval.every_epochs == 0
    )
