"""What the benchmarks compare with computes the same, and the tools run."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import common, scale
from benchmarks.plain import plain
from benchmarks.tpu_cost import by_layer
from cvt_flax import create_model

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


def test_the_plain_port_has_our_logits_loss_and_gradients():
  """So every fast path has those that automatic differentiation of plain layers has."""
  ours = create_model('cvt-nano', num_classes=5)
  networks = ours, plain(ours)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(1, 35, 35, 3)).astype(np.float32)
  variables = jax.jit(ours.init)(jax.random.key(0), images)
  # After initialisation class token and biases are 0, and scores nearly so.
  variables['params'] = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables['params']
  )
  logits = [jax.jit(m.apply)(variables, images) for m in networks]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5 * np.abs(logits[1]).max())

  def loss(params, network):
    state = {**variables, 'params': params}
    return network.apply(state, images, train=True, mutable=['batch_stats'])[0].var()

  (value, actual), (expected_value, expected) = (
    jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables['params'], network)
    for network in networks
  )
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  # What moves all keys alike moves nothing: those gradients are rounding errors alone.
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-6 * largest
    ),
    actual,
    expected,
  )


def test_cycles_are_of_the_layer_that_an_instruction_is_of():
  text = '\nENTRY main {\n' + ''.join(
    f' %x = f32[] add(), metadata={{op_name="jit(step)/{way}/stage0/blocks_0/{name}/mul"}}, '
    f'backend_config={{"estimated_cycles":"{cycles}"}}\n'
    for way, name, cycles in [
      ('jvp(CvT)', 'attn/conv_proj_q/conv', 1),
      ('jvp(CvT)', 'attn/conv_proj_q/bn', 2),
      ('transpose(jvp(CvT))', 'attn/proj_q', 4),
      ('jvp(CvT)', 'attn/bhts', 8),
      ('jvp(CvT)', 'norm1', 16),
      ('jvp(CvT)', 'mlp/fc1', 32),
      ('transpose(jvp(CvT))', 'mlp/fc2', 64),
      ('jvp(CvT)', 'add', 128),
    ]
  )
  assert by_layer(text, 2) == {
    'depthwise convolution, forward': 0.5,
    'batch norm, forward': 1,
    'linear layers, backward': 34,
    'attention, forward': 4,
    'layer norm, forward': 8,
    'linear layers, forward': 16,
    'the rest, forward': 64,
  }


def test_the_document_of_scale_has_the_tables_of_its_results():
  results = BENCHMARKS / 'results'
  document = (results / 'scale.md').read_text()
  (name,) = set(re.findall(r'[\d-]+-scale\.json', document))
  plans = scale.read(results / name)
  for table, rows in scale.TABLES.items():
    assert table(plans, rows) in document
  for line in scale.sizing(plans, scale.OFFICIAL).splitlines()[2:]:
    _, config, *_, hours, _ = (cell.strip(' `') for cell in line.split('|'))
    text = (BENCHMARKS.parent / 'configs' / f'{config}.py').read_text()
    assert f'{hours} chip-hours' in ' '.join(text.split())


def test_the_size_of_a_slice_is_counted():
  """64 chips, each 32 images in 20 ms, and 2e8 bytes to sum over two links, which is 4 ms more."""
  row = scale.Row('cvt13_imagenet', 'v5e:8x8', 2048, 32)
  said = {
    'mesh': {'data': 64, 'fsdp': 1},
    'images_a_device': 32,
    'multiply_adds_an_image': 1_970_000_000,
    'memory': {'needed': 2**31},
    'predicted_images_a_second': 1600.0,
    'collectives': {'all-reduce': [1, 200_000_000]},
  }
  cells = [cell.strip() for cell in scale.sizing({row: said}, [row]).splitlines()[-1].split('|')]
  images = 2048 / 0.024
  hours = 300 * 1_281_167 / images / 3600
  assert cells[2:7] == ['64', '32', '2.00 GiB', '24.0', '4.0']
  assert cells[7] == f'{6 * 1.97e9 * images / 64 / 197e12:.0%}' == '8%'
  assert cells[8:] == ['85,333', '305', '1,792', '300', f'{hours:,.1f}', f'{64 * hours:,.0f}', '']
  assert scale.summing('v5e:16x16', said) == 2 * 2e8 / 200e9
  assert scale.summing('v5e:8x16', said) == 2 * 2e8 / 150e9


def test_plans_are_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(scale, 'PACKAGES', ('jax',))
  path = tmp_path / 'scale.json'
  assert scale.read(path) == {}
  plans = {scale.QUICK[0]: {'cycles': None}, scale.QUICK[1]: {'cycles': 7}}
  scale.write(path, plans)
  assert scale.read(path) == plans
  for text in ('{"plans": [', '{"results": 1}', '{"plans": [{"row": {"x": 1}, "said": 1}]}'):
    path.write_text(text)
    with pytest.raises(SystemExit, match='scale.json is not what this program writes'):
      scale.read(path)


@pytest.mark.parametrize(
  'flags, busy, written',
  [([], 0.0, True), ([], None, True), ([], 0.2, False), (['--quick'], 0.0, False)],
)
def test_what_is_written(flags, busy, written, tmp_path, monkeypatch, capsys):
  (tmp_path / 'benchmarks').mkdir()
  monkeypatch.setattr(common, 'ROOT', tmp_path)
  monkeypatch.setattr(common, 'taken_by_others', lambda start: busy)
  arguments = common.parser('A program.', clocked=True).parse_args(flags)
  common.write(arguments, 'name', ('numpy',), None, {'hardware': common.hardware()})
  files = list(tmp_path.glob('benchmarks/results/*-name.json'))
  assert len(files) == written
  assert ('NOT A RESULT' in capsys.readouterr().out) == (busy == 0.2)
  for file in files:
    record = json.loads(file.read_text())
    assert list(record) == ['date', 'cores_taken_by_others', 'versions', 'arguments', 'hardware']
    assert record['versions'].keys() == {'python', 'numpy'}
    assert record['arguments'] == {'quick': False, 'busy': False}
    assert record['hardware'].keys() == {'processor', 'cores'}


def test_a_busy_machine_is_refused(monkeypatch):
  monkeypatch.setattr(common.time, 'sleep', lambda seconds: None)
  monkeypatch.setattr(common, 'taken_by_others', lambda start: 1.5)
  parser = common.parser('A program.', clocked=True)
  for flag in ('--busy', '--quick'):
    common.refuse_busy(parser.parse_args([flag]), 'Why')
  with pytest.raises(SystemExit, match=r'other programs take 1\.5 cores\. Why\. Wait, or'):
    common.refuse_busy(parser.parse_args([]), 'Why')


def test_loading_timm_leaves_no_torchvision_behind(timm_file):
  assert timm_file('data/transforms.py').RandomResizedCropAndInterpolation(32)
  assert sys.modules['torchvision'] is None  # as in conftest.py
  assert not [name for name in sys.modules if name.startswith('torchvision.')]


# What each table has that its program prints.
PRINTED = {
  'attention_heads': 'a projection each',
  'checkpoints': 'training waits',
  'input': 'cores for 8 chips',
  'layers': 'times the floor',
  'model': 'the train step allocates',
  'official': 'logits differ from PyTorch by',
  'parity': 'vit-pytorch',
  'resident': 'The batches take',
  'scale': 'collectives',
  'tpu_cost': 'bytes accessed an image',
  'weights': 'peak GB',
}
# Other than the defaults: keys of cvt-small have strides that transformers has to be told.
OPTIONS = {'model': ('--model=cvt-small',)}
WITH_PEERS = {
  'input': ('torch',),
  'model': ('torch', 'transformers'),
  'official': ('torch', 'transformers'),
  'parity': ('torch', 'transformers', 'vit_pytorch'),
  'weights': ('torch',),
}


def test_every_program_is_tried():
  programs = {p.stem for p in BENCHMARKS.glob('*.py') if "__name__ == '__main__'" in p.read_text()}
  assert programs == set(PRINTED)


@pytest.mark.parametrize('name', PRINTED)
def test_a_quick_run(name, peer, timm_file):
  for package in WITH_PEERS.get(name, ()):
    peer(package)
  if name == 'input':
    timm_file('data/mixup.py')
  results = sorted((BENCHMARKS / 'results').iterdir())
  command = [sys.executable, BENCHMARKS / f'{name}.py', '--quick', *OPTIONS.get(name, ())]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert PRINTED[name] in done.stdout
  assert sorted((BENCHMARKS / 'results').iterdir()) == results  # nothing is written
