# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     name: cvt_flax.ipynb
#     provenance: []
#     toc_visible: true
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CvT in JAX and Flax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/cvt_flax/blob/main/colab/cvt_flax.ipynb)
#
# [CvT](https://arxiv.org/abs/2103.15808) is a vision transformer that makes its tokens, and its queries,
# keys and values, by convolutions. This notebook
#
# 1. installs [cvt_flax](https://github.com/OWNER/cvt_flax) and looks at the machine,
# 2. takes the published weights, classifies pictures and shows where the network looks,
# 3. trains a CvT on CIFAR-10,
# 4. fine-tunes one on your own images,
# 5. keeps what was trained, goes on after a lost runtime, exports, and traces a step,
# 6. compiles a training step for a slice of 256 TPU chips, without having one.
#
# It runs on a TPU, a GPU or a CPU: *Runtime > Change runtime type*, before the first cell.
#
# ## 1. Install
#
# In a checkout this uses the checkout. Elsewhere it installs an uploaded `cvt_flax*.whl` or
# `cvt_flax*.zip`, if one lies in the working directory, or what is on GitHub. JAX, the library of the
# accelerator and Flax are raised together.
#
# **When the cell has installed something, it stops and asks for a restart, as the old JAX may be
# loaded: *Runtime > Restart session*, then run the cell again. It then does nothing.**

# %%
import glob
import importlib.metadata
import importlib.util
import os
import sys

REPOSITORY = 'OWNER/cvt_flax'
if os.path.exists('../cvt_flax/__init__.py'):  # this is colab/ of a checkout
  os.chdir('..')
NEEDED = 'cvt_flax', 'clu', 'flax', 'grain', 'jax', 'matplotlib', 'orbax', 'tensorflow_datasets'
ready = all(map(importlib.util.find_spec, NEEDED))
if not ready or [int(n) for n in importlib.metadata.version('jax').split('.')[:2]] < [0, 10]:
  checkout = ['-e .'] if os.path.exists('cvt_flax/__init__.py') else []
  uploaded = glob.glob('./cvt_flax*.whl') + glob.glob('./cvt_flax*.zip')
  source = [*checkout, *uploaded, f'git+https://github.com/{REPOSITORY}'][0]
  tpu, gpu = importlib.util.find_spec('libtpu'), glob.glob('/dev/nvidia[0-9]*')
  library = 'jax[tpu]' if tpu else 'jax[cuda12]' if gpu else 'jax'
  # !{sys.executable} -m pip install -q {source} "{library}==0.12.0.1" "flax==0.12.12"
  raise SystemExit('Unless pip failed: Runtime > Restart session, then run this cell again.')

# %% [markdown]
# `DRIVE` keeps what is trained in your Google Drive, so that it outlives the runtime. `UPLOAD` asks for
# pictures and archives of your own; without it, samples stand in.

# %%
import pathlib
import shutil
import tempfile

import absl.logging
import jax

from cvt_flax import (
  convert_weights,
  create_model,
  get_config,
  list_pretrained,
  load_pretrained,
  notebook,
  plan,
  predict_images,
  save_pretrained,
  train,
)

# %matplotlib inline
SMOKE = os.environ.get('CVT_SMOKE') == '1'  # a rehearsal in small, on samples and random weights
DRIVE = False  # @param {type:"boolean"}
UPLOAD = False  # @param {type:"boolean"}
COLAB = 'google.colab' in sys.modules
WORK = pathlib.Path('runs/notebook')
if COLAB and DRIVE:
  from google.colab import drive

  drive.mount('/content/drive')
  WORK = pathlib.Path('/content/drive/MyDrive/cvt_flax')
WORK.mkdir(parents=True, exist_ok=True)
absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax tells of every file
print(notebook.describe_devices())

# %% [markdown]
# ## 2. The network, and weights for it
#
# A vision transformer cuts an image into 16x16 patches, embeds each by a linear layer, adds a position
# to it, and keeps that one map of tokens up to the end. CvT has three stages, like a ResNet. Each
# begins with a *convolutional token embedding*, a strided convolution whose kernels overlap: the map
# gets smaller, its tokens richer.

# %%
notebook.draw_model(create_model('cvt-13'), image_size=224)

# %% [markdown]
# A block is that of a transformer, attention and then an MLP, but for the *convolutional projection*:
# the tokens are laid out as the map they are, a 3x3 depthwise convolution runs over it, and then comes
# the linear layer that a transformer has for queries, keys or values. For keys and values
# the convolution has stride 2, so that every query meets a quarter of the keys: count them above.
#
# Convolutions know where things are, so there is no position embedding, and the same weights take
# images of other sizes. A class token is there in the last stage only, and its output is what the
# classifier reads.
#
# | model | blocks | parameters | ImageNet top-1 in the paper, 224x224 |
# |---|---|---|---|
# | `cvt-13` | 1, 2, 10 | 20 M | 81.6 % |
# | `cvt-21` | 1, 4, 16 | 32 M | 82.5 % |
#
# Some weights come along. `cvt-nano-cifar10` was trained by section 3's recipe for a CPU: it is small,
# sees 32x32 pixels, and knows ten classes, of which neither sample is one.

# %%
PICTURES = notebook.sample_images()
if COLAB and UPLOAD:
  from google.colab import files

  PICTURES = list(files.upload())  # pictures of your own
print('weights that come along:', *list_pretrained())
notebook.draw_predictions(predict_images('cvt-nano-cifar10', PICTURES))

# %% [markdown]
# ### The published weights
#
# `SOURCE` is a model of Hugging Face, `hf:microsoft/cvt-13`, or a file of the authors,
# `CvT-13-224x224-IN-1k.pth`, which you upload (the folder symbol on the left) or name by its path in
# your Drive. `MODEL` and `SIZE` say what network it is and for which images: `cvt-21` and 384 for
# `hf:microsoft/cvt-21-384`. Where there is no connection set `SOURCE` to `cvt-nano-cifar10`, `MODEL` to
# `cvt-nano` and `SIZE` to 32. `hf:` takes `pip install huggingface_hub`, which Colab has.
#
# Converting moves numbers and changes none. Where PyTorch and transformers are installed, the logits and
# the maps of all stages are compared with theirs on the same images; `logits` and `maps` say how far they
# are apart, as a share of the largest. The authors trained with QuickGELU.

# %%
SOURCE = 'hf:microsoft/cvt-13'  # @param {type:"string"}
MODEL = 'cvt-13'  # @param {type:"string"}
SIZE = 224  # @param {type:"integer"}
TINY = {}  # attributes in place of the model's own
if SMOKE:
  SOURCE, SIZE = WORK / 'random-huggingface', 64
  TINY = dict(embed_dims=(16, 32, 48), depths=(1, 2, 3), num_heads=(1, 2, 3))
if SMOKE and not SOURCE.exists():
  tiny = create_model(MODEL, num_classes=10, **TINY)
  variables = jax.jit(tiny.init)(jax.random.key(0), jax.numpy.zeros((1, 64, 64, 3)))
  save_pretrained(WORK / 'random', tiny, variables)
  convert_weights(WORK / 'random', SOURCE, to='huggingface')

# %%
WEIGHTS = WORK / 'weights'
CHECK = SOURCE not in list_pretrained() and all(
  map(importlib.util.find_spec, ('torch', 'transformers'))
)
if not WEIGHTS.exists():  # to convert another SOURCE, delete the folder
  print(convert_weights(SOURCE, WEIGHTS, activation='quick_gelu', check=CHECK))
model, variables = load_pretrained(WEIGHTS)  # a linen module, {'params', 'batch_stats'}
notebook.draw_predictions(predict_images(WEIGHTS, PICTURES))

# %% [markdown]
# Where does it look? The attention of the last block of each stage, over the picture. In the first two
# stages it is the mean over all queries, in the last the class token's, which is what the answer is made of.
#
# Colour says how far it is above the *uniform share*, which gives every key the same: dark where it is at
# or below it, brightest at the largest of the map, or at twice the uniform share where none gets there.
# The largest, as a multiple of the uniform share, is written below: at 1.0× a stage looks everywhere alike.

# %%
notebook.draw_attention(WEIGHTS, PICTURES)

# %% [markdown]
# ## 3. Train on CIFAR-10
#
# The official strides 4, 2, 2 would leave a 2x2 map of a 32x32 image. Models for small images have
# smaller ones: on a TPU or a GPU this trains `cvt-small`, on a CPU `cvt-nano` for two epochs. A config is
# one of the files in `configs/`, by its name; any key can be changed. The run prints how long is left.

# %%
CPU = jax.default_backend() == 'cpu'
NAME, EPOCHS = ('cvt_nano_cifar10', 2) if CPU else ('cvt_small_cifar10', 30)
if SMOKE:
  NAME, EPOCHS = 'digits', 4  # handwritten digits, which need no download
cifar = get_config(NAME)
cifar.epochs = EPOCHS
cifar.optimizer.warmup_epochs = EPOCHS / 10
cifar.augment.mixup = cifar.augment.cutmix = 0.0  # they pay in long runs
cifar.eval.every_epochs = 1
cifar.log_every = 5 if SMOKE else 50
cifar.closing_note = ''
cifar.model.dtype = notebook.compute_dtype()
if SMOKE:
  cifar.model.depths = (1, 1, 1)  # is compiled sooner
RUN = WORK / NAME

# %% [markdown]
# Images lie in the memory of the device and are augmented there, inside the one compiled step. The first
# time CIFAR-10 is downloaded, 170 MB. A tenth of the training images is held out for validation, by which
# the best checkpoint is chosen. The test images choose nothing: a run looks at them when it has ended.
#
# This is what the network gets in the first step, and what it is to answer.

# %%
notebook.draw_training_images(cifar, count=12)

# %%
results = train(cifar, RUN, watch=notebook.LiveCurves())

# %%
results = train(cifar, RUN, mode='eval')  # the best checkpoint once more, on the same images

# %%
notebook.draw_model(RUN)  # the network that was trained

# %% [markdown]
# A run ends with a report, `report/index.html` in its folder. Here are its figures of the test images:
# what is taken for what, and the mistakes that the network was surest of.

# %%
notebook.show_report(RUN, 'confusion', 'classes')

# %%
notebook.show_report(RUN, 'mistakes')

# %%
notebook.show_report(RUN, 'attention-0', 'attention-1')

# %% [markdown]
# ## 4. Fine-tune on your own images
#
# Upload a zip with a folder for every class, `cat/1.jpg`, `dog/1.jpg`. If these are not at its top, `FOLDER`
# says below which folder they are. Without an upload, pieces of the two photographs stand in: temple or flower?

# %%
FOLDER = ''  # @param {type:"string"}
ARCHIVE = WORK / 'images.zip'
if COLAB and UPLOAD:
  ARCHIVE = pathlib.Path(next(iter(files.upload())))
else:
  notebook.write_sample_archive(ARCHIVE)
shutil.rmtree(WORK / 'images', ignore_errors=True)
shutil.unpack_archive(ARCHIVE, WORK / 'images')

# %% [markdown]
# It starts from the weights of section 2, with a new head for your classes. 30 % of the images are kept to
# test on. `transfer_folder:frozen` would train the head alone.

# %%
own = get_config('transfer_folder')
own.source = f'folder:{WORK / "images" / FOLDER}'
own.init_from = str(WEIGHTS)
own.model.update(TINY | {'name': MODEL})
own.model.dtype = notebook.compute_dtype()
own.image_size = SIZE
own.epochs = 2 if SMOKE else 10
own.optimizer.reference_batch, own.batch_size = 64, 16  # the rate is for 64, and scales
own.eval.test_holdout = 0.3
own.log_every = 2
OWN = WORK / 'own_images'  # one folder for one data set
results = train(own, OWN, watch=notebook.LiveCurves())

# %%
notebook.show_report(OWN, 'confusion', 'mistakes')

# %%
notebook.draw_attention(OWN, PICTURES)

# %% [markdown]
# ## 5. Keep it
#
# A run folder is weights like any other: `predict_images(OWN, ...)`, `load_pretrained(OWN)`. With `DRIVE`
# on, the folders are in your Drive already.
#
# **When the runtime is lost**, run all again: the same call goes on from the last checkpoint, and what is
# finished is not done again. Here a copy of the run of section 3 goes on, for one more epoch.

# %%
LONGER = WORK / f'{NAME}-longer'
if not LONGER.exists():
  shutil.copytree(RUN, LONGER)
longer = cifar.copy_and_resolve_references()
longer.epochs = EPOCHS + 1
results = train(longer, LONGER, watch=notebook.LiveCurves())

# %% [markdown]
# **For Hugging Face.** `CvtForImageClassification.from_pretrained` of transformers reads the folder that
# this writes. Its architecture has a class token in the last stage alone, and one, two, three or more blocks
# in the stages: `cvt-13`, `cvt-21`, `cvt-w24` and `cvt-small` fit, `cvt-nano` has too few. For the authors'
# code write a `.pth`: `convert_weights(OWN, 'cvt.pth')`, where PyTorch is installed.

# %%
EXPORT = WORK / 'huggingface'
shutil.rmtree(EXPORT, ignore_errors=True)
convert_weights(OWN, EXPORT, to='huggingface')

# %% [markdown]
# **Where does the time of a step go?** Five steps, traced by `jax.profiler` after everything is
# compiled. [XProf](https://openxla.org/xprof) or [Perfetto](https://ui.perfetto.dev) opens the trace.

# %%
TRACE = WORK / 'trace'
shutil.rmtree(TRACE, ignore_errors=True)
short = cifar.copy_and_resolve_references()
short.steps, short.epochs, short.log_every = 15, 10, 5
short.optimizer.warmup_epochs = 0.0  # an epoch may have more steps than these
with notebook.trace_steps(TRACE) as watch:
  train(short, tempfile.mkdtemp(), watch=watch)
print(*TRACE.rglob('*.gz'), *TRACE.rglob('*.pb'), sep='\n')

# %% [markdown]
# ## 6. Before you rent a pod
#
# A TPU's compiler runs where no TPU is. `plan` compiles the training step of ImageNet for 256 chips and
# tells what a chip's memory holds, what travels between chips, and how many cycles XLA's cost model
# predicts: a model, not a measurement. That takes three to five minutes on two cores, and `libtpu`, which TPU
# runtimes have (elsewhere `pip install libtpu`). Without it this compiles the step of section 3, for what
# is attached.

# %%
if importlib.util.find_spec('libtpu') and not SMOKE:
  imagenet = get_config('cvt13_imagenet')
  imagenet.batch_size = 4096  # of all chips: 16 a chip
  imagenet.model.bn_group_size = 16  # within a chip: between chips, gradients are summed alone
  print(plan(imagenet, 'v5e:16x16'))
else:
  print(plan(cifar))
