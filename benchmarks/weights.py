"""What converting and loading weights takes: seconds, and memory at its peak.

    python benchmarks/weights.py

Random weights of CvT-W24 and CvT-13 are written as the authors' files are, in a temporary folder;
every measurement is a process of its own. Prints a table and writes it to benchmarks/results/.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common

PACKAGES = ('jax', 'flax', 'numpy', 'safetensors', 'torch')

# Run with -c and the path of the weights.
WRITE = """
import sys
import jax, numpy as np
from cvt_flax import create_model
from cvt_flax.weights import files
from cvt_flax.weights.layouts import OFFICIAL
rng = np.random.default_rng(0)
tensors = OFFICIAL.tensors(create_model(sys.argv[2]))
files.write_pytorch(
  sys.argv[1], {n: rng.standard_normal(t.shape, np.float32) for n, t in tensors.items() if t.leaves}
)
"""
LOAD = """
import sys, time, warnings
import torch
from cvt_flax import load_pretrained
import jax; jax.numpy.zeros(())
warnings.simplefilter('ignore')
start = time.perf_counter()
jax.block_until_ready(load_pretrained(sys.argv[1])[1])
print(time.perf_counter() - start)
"""


def main():
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  common.refuse_busy(arguments, 'Everything would take longer than it does')
  start = common.usage()
  large, layouts = 'cvt-w24', ('flax', 'official', 'huggingface')
  if arguments.quick:
    arguments.rounds, large, layouts = 1, 'cvt-13', ('flax',)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for name in (large, 'cvt-13'):
      run([sys.executable, '-c', WRITE, folder / f'{name}.pth', name])
    convert = [sys.executable, '-m', 'cvt_flax.convert', folder / f'{large}.pth']
    for to in layouts:
      results[f'convert {large}, official to {to}'] = [
        measure([*convert, folder / f'{to}{i}', f'--to={to}']) for i in range(arguments.rounds)
      ]
    results['load_pretrained cvt-13, after imports'] = [
      measure([sys.executable, '-c', LOAD, folder / 'cvt-13.pth'], prints_seconds=True)
      for _ in range(arguments.rounds)
    ]
  print('| | median s | peak GB |\n|---|---|---|')
  for what, runs in results.items():
    seconds, peak = statistics.median(s for s, _ in runs), max(p for _, p in runs)
    print(f'| {what} | {seconds:.1f} | {peak:.2f} |')
  record = {**common.hardware(), 'seconds_and_peak_gb_by_round': results}
  common.write(arguments, 'weights', PACKAGES, start, record)


def run(command):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  return subprocess.run(
    [str(part) for part in command], env=environment, check=True, stdout=subprocess.PIPE, text=True
  ).stdout


def measure(command, prints_seconds=False):
  """Returns the seconds that a command takes, and its memory at the peak in GB."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [str(part) for part in command],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  printed = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f'{command} ended with {process.returncode}')
  seconds = float(printed) if prints_seconds else time.perf_counter() - start
  return seconds, usage.ru_maxrss * 1024 / 1e9  # Linux counts in KiB


if __name__ == '__main__':
  main()
