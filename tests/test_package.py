"""The package as a whole: its public names, what importing it costs, what it declares it needs."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cvt_flax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PYTHONS = ['3.11', '3.12', '3.13', '3.14']
REFUSED = ['3.10', '3.15']

# Distributions whose import name differs from their own.
IMPORTED_AS = {
  'absl-py': 'absl',
  'orbax-checkpoint': 'orbax',
  'pillow': 'PIL',
  'scikit-learn': 'sklearn',
}
# Used where they are installed, by functions that need them.
OPTIONAL = {'IPython', 'apache_beam', 'huggingface_hub', 'torch', 'transformers', 'vit_pytorch'}


def requirements(file, python):
  """{distribution: Requirement} that `file`, without what it includes, asks for on `python`."""
  environment = {'python_version': python, 'sys_platform': 'linux'}
  found = {}
  for line in (ROOT / file).read_text().splitlines():
    line = re.sub(r'(^|\s)#.*', '', line).strip()
    if not line or line.startswith('-r '):
      continue
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate(environment):
      name = canonicalize_name(requirement.name)
      assert name not in found, f'{file}: {name} twice on Python {python}'
      found[name] = requirement
  return found


def floors():
  """{distribution: Requirement} of pyproject.toml."""
  found = [Requirement(line) for line in PYPROJECT['project']['dependencies']]
  return {canonicalize_name(requirement.name): requirement for requirement in found}


def pin(requirement):
  """The one version that `requirement` allows."""
  (specifier,) = requirement.specifier
  assert specifier.operator == '==', f'{requirement} is not a pin'
  return Version(specifier.version)


def loaded(code, env):
  """The top-level names of what a fresh interpreter has imported after `code`."""
  code += '\nimport json, sys\nprint(json.dumps([name.partition(".")[0] for name in sys.modules]))'
  run = subprocess.run(
    [sys.executable, '-c', code], env=env, check=True, stdout=subprocess.PIPE, text=True
  )
  return set(json.loads(run.stdout))


@pytest.mark.parametrize('name', cvt_flax.__all__)
def test_public_name_resolves_and_is_listed(name):
  assert getattr(cvt_flax, name).__doc__
  assert name in dir(cvt_flax)


def test_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match=r"'cvt_flax' has no attribute 'CVT'"):
    cvt_flax.CVT  # noqa: B018


def test_import_loads_no_library(clean_env):
  before = loaded('', clean_env)
  added = loaded('import importlib, typing, cvt_flax\ndir(cvt_flax)', clean_env) - before
  assert not {name for name in added if name not in sys.stdlib_module_names} - {'cvt_flax'}


def test_no_module_loads_another_framework(clean_env):
  code = (
    'import importlib, pkgutil, cvt_flax\n'
    'for module in pkgutil.walk_packages(cvt_flax.__path__, "cvt_flax."):\n'
    '  importlib.import_module(module.name)\n'
  )
  assert not loaded(code, clean_env) & {'tensorflow', 'tensorboard', 'torchvision', *OPTIONAL}


def test_tests_see_eight_devices_and_subprocesses_one(clean_env):
  assert len(jax.devices()) == 8
  code = 'import jax; print(len(jax.devices()), jax.default_backend())'
  out = subprocess.check_output([sys.executable, '-c', code], env=clean_env, text=True)
  assert out.split() == ['1', 'cpu']


def test_version_is_declared_once():
  assert 'version' in PYPROJECT['project']['dynamic']
  assert PYPROJECT['tool']['setuptools']['dynamic']['version'] == {'attr': 'cvt_flax.__version__'}
  assert str(Version(cvt_flax.__version__)) == cvt_flax.__version__


def test_every_package_is_in_the_wheel():
  folders = {file.parent for file in (ROOT / 'cvt_flax').rglob('*.py')}
  names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(PYPROJECT['tool']['setuptools']['packages']) == names | {'cvt_flax.configs'}


@pytest.mark.parametrize('python', PYTHONS)
def test_pins_satisfy_the_floors(python):
  pins = requirements('requirements.txt', python)
  assert pins.keys() == floors().keys()
  for name, floor in floors().items():
    assert floor.specifier.contains(pin(pins[name]), prereleases=True), f'{pins[name]}, {floor}'


@pytest.mark.parametrize('python', REFUSED)
def test_other_pythons_are_refused_with_the_reason(python):
  refusal = requirements('requirements.txt', python)['cvt-flax']
  assert refusal.url.endswith('cvt_flax%20needs%20Python%203.11%20to%203.14')
  # The first line of all, so that nothing is fetched before it.
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  assert next(line for line in lines if line and line[0] != '#').startswith('cvt_flax @ ')


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize('file', ['requirements-tpu.txt', 'requirements-cuda.txt'])
def test_accelerators_take_the_same_jax(file, python):
  accelerated = requirements(file, python)
  assert accelerated.keys() == {'jax'}
  assert pin(accelerated['jax']) == pin(requirements('requirements.txt', python)['jax'])


@pytest.mark.parametrize('file', ['requirements-dev.txt', 'requirements-peers.txt'])
def test_tools_and_peers_are_pinned(file):
  ours = requirements('requirements.txt', '3.13')
  for name, requirement in requirements(file, '3.13').items():
    assert pin(requirement) == pin(ours.get(name, requirement))


def test_every_import_is_declared():
  names = [requirement.name for requirement in floors().values()]
  declared = {IMPORTED_AS.get(name, name.replace('-', '_')) for name in names}
  files = [ROOT / 'train.py', *(ROOT / 'cvt_flax').rglob('*.py'), *(ROOT / 'configs').glob('*.py')]
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      for name in names:
        top = name.partition('.')[0]
        # OPTIONAL: where it may be imported stands in the import contract.
        known = top in {'cvt_flax', *OPTIONAL, *declared, *sys.stdlib_module_names}
        assert known, f'{file.relative_to(ROOT)}:{node.lineno}: {top} is not in pyproject.toml'
