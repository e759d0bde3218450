"""What all tests share: eight CPU devices, an environment for subprocesses, peers."""

import collections
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import signal
import sys
import tempfile
import types

# Before JAX is imported. Eight forced devices let the tests of the mesh run anywhere; what does
# not ask for a mesh runs on the first of them.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
# Tests compile much and compute little: what XLA hands to LLVM is compiled without optimisation,
# which changes results by rounding alone.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
# And they compile the same small networks again and again, in one test after another. What the
# processes that tests start compile is kept by itself: one that is killed may leave half a file,
# of which the others warn.
_compiled = tempfile.TemporaryDirectory(prefix='cvt_flax-tests-')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _compiled.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['HF_HUB_OFFLINE'] = '1'  # tests need no network
os.environ['MPLBACKEND'] = 'agg'

import pytest

from benchmarks import timm_peer

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = ('torch', 'transformers', 'vit_pytorch')
_WANTING = 'wants the peer '

# vit-pytorch asks for torchvision, which fails to import beside a PyTorch built otherwise, and
# takes transformers down with it. None tells both that there is none; no comparison needs it.
sys.modules['torchvision'] = None


@pytest.fixture(scope='session')
def clean_env():
  """The environment for a subprocess that is to be what a user starts: one CPU device, no flags.

  Read-only: change it as in `{**clean_env, 'JAX_NUM_CPU_DEVICES': '2'}`. `cvt_flax` can be
  imported from any working directory.
  """
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_', 'PYTEST_'))}
  env['JAX_PLATFORMS'] = 'cpu'
  env['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [env.get('PYTHONPATH')])])
  return types.MappingProxyType(env)


@pytest.fixture(scope='session')
def quick_env(clean_env):
  """`clean_env` for a subprocess that compiles much: as quickly as these tests, and only once."""
  names = ('XLA_FLAGS', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
  cache = {'JAX_COMPILATION_CACHE_DIR': os.path.join(_compiled.name, 'of_processes')}
  return types.MappingProxyType({**clean_env, **{n: os.environ[n] for n in names}, **cache})


@pytest.fixture(scope='session')
def peer():
  """`peer('transformers')` imports a peer; where it is not installed the test is skipped.

  A submodule may be named: `peer('vit_pytorch.cvt')`. In CI a missing peer is a failure.
  """
  return _import_peer


def _import_peer(name: str) -> types.ModuleType:
  package = name.partition('.')[0]
  if package not in PEERS:
    raise ValueError(f'peer {package!r}: not one of {", ".join(PEERS)}')
  if package not in sys.modules:
    spec = _find_peer(package)
    if package == 'vit_pytorch':  # its __init__ imports torchvision, its modules do not need it
      module = types.ModuleType(package)
      module.__path__ = list(spec.submodule_search_locations)
      sys.modules[package] = module
  return importlib.import_module(name)


def _find_peer(package: str) -> importlib.machinery.ModuleSpec:
  """Says where a peer is, without importing it; where it is nowhere, skips or fails the test."""
  spec = importlib.util.find_spec(package)
  if spec is None:
    if os.environ.get('CI') == 'true':
      pytest.fail(f'{_WANTING}{package}, and CI installs every peer', pytrace=False)
    pytest.skip(f'{_WANTING}{package}')
  return spec


@pytest.fixture(scope='session')
def timm_file():
  """`timm_file('data/auto_augment.py')` loads one file of the peer timm as a module of its own.

  Missing is as for `peer`.
  """

  def load(path: str) -> types.ModuleType:
    _find_peer('timm')
    return timm_peer.load(path)

  return load


def pytest_unconfigure():
  _compiled.cleanup()


def pytest_terminal_summary(terminalreporter):
  """Says how many comparisons were skipped for want of which peer, and how to run them."""
  wanting = collections.Counter()
  for report in terminalreporter.stats.get('skipped', []):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ''
    if _WANTING in reason:
      wanting[reason.rpartition(_WANTING)[2]] += 1
  if wanting:
    each = ', '.join(f'{name} {count}' for name, count in sorted(wanting.items()))
    terminalreporter.write_line(
      f'{wanting.total()} comparisons with peers skipped ({each}). '
      'To run them: pip install -r requirements-peers.txt',
      yellow=True,
    )


@pytest.fixture(scope='session', autouse=True)
def threads_decode():
  """Where stream.workers is 0 threads decode, also in training: processes take seconds to start."""
  with pytest.MonkeyPatch.context() as patch:
    if importlib.util.find_spec('grain'):  # which the environment of Apache Beam lacks
      patch.setattr('cvt_flax.data.stream._workers', lambda split, cores_for_threads: 0)
    yield


@pytest.fixture(autouse=True)
def ctrl_c():
  """Command lines, run in the process of the tests, change what Ctrl-C does."""
  before = signal.getsignal(signal.SIGINT)
  yield
  signal.signal(signal.SIGINT, before)
