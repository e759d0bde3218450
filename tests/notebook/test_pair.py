"""colab/cvt_flax.ipynb: its pair in text has the same cells; public names alone; one address."""

import ast
import json
import pathlib
import re
import shutil
import tempfile
from unittest import mock

import jax
import jupytext
import pytest
from packaging.requirements import Requirement

import cvt_flax
from cvt_flax import get_config, notebook
from cvt_flax.training.config import freeze

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = ROOT / 'colab' / 'cvt_flax.py'
NOTEBOOK = json.loads((ROOT / 'colab' / 'cvt_flax.ipynb').read_text())
CODE = [''.join(cell['source']) for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']
MOST_STATEMENTS = 15


def trees():
  """Every code cell as Python; lines of IPython's own are comments in the text."""
  for cell in jupytext.read(TEXT).cells:
    if cell.cell_type == 'code':
      source = re.sub(r'^(\s*)[!%].*', r'\1pass', cell.source, flags=re.MULTILINE)
      yield ast.parse(source)


def test_the_two_have_the_same_cells():
  """`jupytext --sync colab/cvt_flax.py` brings them together."""
  text = [(c.cell_type, c.source) for c in jupytext.read(TEXT).cells]
  assert [(c['cell_type'], ''.join(c['source'])) for c in NOTEBOOK['cells']] == text


def test_no_output_is_committed():
  for cell in NOTEBOOK['cells']:
    assert cell['cell_type'] == 'markdown' or (
      cell['outputs'] == [] and cell['execution_count'] is None
    )


def test_colab_is_told_of_the_accelerator():
  assert NOTEBOOK['metadata']['accelerator'] == 'TPU'
  assert NOTEBOOK['metadata']['colab']['gpuType'] == 'V5E1'


def test_only_public_names_are_used():
  used = set()
  for tree in trees():
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] == 'cvt_flax':
        assert node.module == 'cvt_flax'
        assert {alias.name for alias in node.names} <= {*cvt_flax.__all__, 'notebook'}
      if isinstance(node, ast.Import):
        assert not any(alias.name.startswith('cvt_flax') for alias in node.names)
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == 'notebook':
          used.add(node.attr)
  assert used == set(notebook.__all__)  # and none is there for nothing


def test_nothing_is_implemented_in_it():
  for tree in trees():
    nodes = list(ast.walk(tree))
    statements = [n for n in nodes if isinstance(n, ast.stmt)]
    doing = [n for n in statements if not isinstance(n, ast.Import | ast.ImportFrom)]
    assert len(doing) <= MOST_STATEMENTS, ast.unparse(tree)
    for node in nodes:
      assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.For | ast.While)


@pytest.mark.parametrize('backend', ['cpu', 'tpu'])
def test_what_the_rehearsal_leaves_out_can_be_trained(backend, monkeypatch, tmp_path):
  """The rehearsal trains on digits; with CIFAR-10 an epoch has more steps than are traced."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  trained = []
  names = {'jax': jax, 'get_config': get_config, 'SMOKE': False, 'WORK': tmp_path}
  names |= {'shutil': shutil, 'tempfile': tempfile, 'notebook': mock.MagicMock()}
  names |= {'train': lambda config, folder, **_: trained.append(config)}
  names['notebook'].compute_dtype.return_value = 'float32'
  (defined,) = (source for source in CODE if 'cifar = get_config' in source)
  (traced,) = (source for source in CODE if 'trace_steps' in source)
  exec(f'{defined}\n{traced}', names)
  (config,) = map(freeze, trained)
  steps_per_epoch = 45_000 // config.batch_size
  assert config.optimizer.warmup_epochs * steps_per_epoch < config.steps < steps_per_epoch


def test_every_link_to_the_repository_is_its_own():
  name = cvt_flax.REPOSITORY.partition('/')[2]
  files = [*ROOT.glob('*.md'), *ROOT.glob('*.toml'), *ROOT.glob('*.cff')]
  for folder in ('cvt_flax', 'colab', 'docs', 'configs', 'benchmarks', '.github'):
    files += [p for p in (ROOT / folder).rglob('*') if p.suffix in {'.md', '.py', '.ipynb', '.yml'}]
  for file in files:
    text = file.read_text(encoding='utf-8')
    links = set(re.findall(rf'git(?:hub|hubusercontent)(?:\.com)?/([\w.-]+/{name})\b', text))
    assert links <= {cvt_flax.REPOSITORY}, f'{file}: {links}'
  assert f"REPOSITORY = '{cvt_flax.REPOSITORY}'" in CODE[0]
  assert f'https://colab.research.google.com/github/{cvt_flax.REPOSITORY}/blob/main/colab/' in (
    TEXT.read_text()
  )


@pytest.mark.parametrize('python', ['3.12', '3.13'])
def test_it_installs_the_versions_of_the_requirements(python):
  """Those of jax[tpu] and jax[cuda12] are jax's, which tests/test_package.py holds."""
  pins = {}
  for line in (ROOT / 'requirements.txt').read_text().splitlines():
    if re.match(r'(jax|flax)==', line):
      requirement = Requirement(line)
      if requirement.marker.evaluate({'python_version': python}):
        pins[requirement.name] = requirement.specifier
  assert f'"{{library}}{pins["jax"]}" "flax{pins["flax"]}"' in CODE[0]
  for extra in ('tpu', 'cuda12'):
    assert f"'jax[{extra}]'" in CODE[0]
    file = ROOT / f'requirements-{extra.rstrip("12")}.txt'
    assert f'jax[{extra}]{pins["jax"]} ' in file.read_text()
