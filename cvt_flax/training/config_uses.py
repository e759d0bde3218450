"""When a key of a config has an effect: (predicate of the whole config, the condition in words)."""


def optimizer_is(*names: str):
  return lambda c: c.optimizer.name in names, f'optimizer.name is {" or ".join(names)}'


def schedule_is(*names: str):
  return lambda c: c.optimizer.schedule in names, f'optimizer.schedule is {" or ".join(names)}'


MIXING = (lambda c: c.augment.mixup or c.augment.cutmix, 'augment.mixup or augment.cutmix is on')
BOTH_MIXINGS = (
  lambda c: c.augment.mixup and c.augment.cutmix,
  'augment.mixup and augment.cutmix are both on',
)
NESTEROV = (
  lambda c: c.optimizer.name == 'sgd' and c.optimizer.momentum > 0,
  'optimizer.name is sgd and optimizer.momentum above 0',
)
MOVING = (
  lambda c: c.optimizer.schedule != 'constant' or c.optimizer.warmup_epochs > 0,
  'optimizer.schedule is cosine or multistep, or optimizer.warmup_epochs above 0',
)
TFDS = (
  lambda c: any(source.startswith('tfds:') for source in (c.source, *c.eval.sets)),
  'source or one of eval.sets is tfds:NAME',
)
ENCODED = (
  lambda c: any(
    source.startswith(('tfds:', 'folder:', 'csv:')) for source in (c.source, *c.eval.sets)
  ),
  'source or one of eval.sets is tfds:NAME, folder:DIR or csv:FILE, whose images are decoded',
)
RESIDENT = (lambda c: c.engine == 'resident', 'engine is resident')
STREAM = (lambda c: c.engine == 'stream', 'engine is stream')
STREAMED = (
  lambda c: c.engine == 'stream' or c.eval.sets,
  'engine is stream, or eval.sets are given',
)
RANDOM_CROP = (
  lambda c: c.engine == 'stream' and c.augment.crop_scale,
  'engine is stream and augment.crop_scale is given',
)
MARGIN = (
  lambda c: c.engine == 'stream' and not c.augment.crop_scale,
  'engine is stream and augment.crop_scale is ()',
)
FILTER = (
  lambda c: (
    c.engine == 'stream'
    and (c.augment.crop_scale or c.augment.crop_margin or c.augment.rand_augment)
  ),
  'engine is stream and augment.crop_scale, augment.crop_margin or augment.rand_augment is given',
)
JITTER = (  # timm takes one or the other
  lambda c: c.engine == 'stream' and not c.augment.rand_augment,
  "engine is stream and augment.rand_augment is ''",
)
SEVERAL_LAYERS = (
  lambda c: c.optimizer.freeze != 'backbone',
  'optimizer.freeze is not backbone, which trains one layer',
)
WARMUP = (lambda c: c.optimizer.warmup_epochs > 0, 'optimizer.warmup_epochs is above 0')
