"""What a notebook shows of models and runs: colab/cvt_flax.ipynb is made of these and the rest.

What is drawn is returned as a Matplotlib Figure on white, or as a Pillow image, which a notebook
shows by itself (`%matplotlib inline`). IPython is imported by `LiveCurves` alone.
"""

from cvt_flax.notebook.devices import compute_dtype, describe_devices
from cvt_flax.notebook.drawings import draw_attention, draw_predictions, draw_training_images
from cvt_flax.notebook.runs import LiveCurves, show_report, trace_steps
from cvt_flax.notebook.samples import sample_images, write_sample_archive
from cvt_flax.notebook.stages import draw_model

__all__ = [
  'LiveCurves',
  'compute_dtype',
  'describe_devices',
  'draw_attention',
  'draw_model',
  'draw_predictions',
  'draw_training_images',
  'sample_images',
  'show_report',
  'trace_steps',
  'write_sample_archive',
]
