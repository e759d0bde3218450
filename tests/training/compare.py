"""What two runs that should be the same are compared by."""

import jax
import numpy as np
import orbax.checkpoint as ocp

from cvt_flax.weights.run_folder import read_metrics


def lines_without_times(folder):
  """Returns the lines of metrics.jsonl but for images/s."""
  return [
    {k: v for k, v in line.items() if k != 'train/images_per_sec'}
    for line in read_metrics(folder / 'metrics.jsonl')
  ]


def saved_arrays(folder, step):
  """Returns everything that a checkpoint holds, as {name of the leaf: array}."""
  with ocp.CheckpointManager(folder / 'checkpoints') as manager:
    names = ('model', 'ema', 'optimizer', 'window')
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restore = ocp.args.StandardRestore(fallback_sharding=here)  # it may be of another topology
    args = ocp.args.Composite(**{name: restore for name in names})
    tree = manager.restore(step, args=args)
  leaves = jax.tree_util.tree_leaves_with_path(dict(tree.items()))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bytes(got, expected):
  """Asserts that two of what `saved_arrays` returns are the same."""
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert got[name].tobytes() == array.tobytes(), name
