"""--mode=compile: what is told of a step that is compiled and not run."""

import json
import math
import os
import subprocess
import sys

import jax
import pytest

from cvt_flax.errors import UserError
from cvt_flax.training import hlo, plan, topology
from tests.conftest import ROOT


@pytest.fixture
def eight(config):
  config.mesh.data, config.batch_size, config.model.bn_group_size = 0, 32, 4
  config.optimizer.accumulate_steps = 1
  return config


def test_groups_within_a_device_leave_one_sum_over_devices(eight):
  """Of gradients, running statistics, loss and top-1: nothing that grows with the images."""
  found = plan.plan(eight, 'cpu:8')
  state = found.memory['state']
  ((kind, (count, size)),) = found.collectives.items()
  assert (kind, count) == ('all-reduce', 1)
  # The state: parameters four times (two moments, averages), statistics twice, scalars.
  assert found.parameters * 4 < size < state / 3
  assert found.images_a_device == 4 and found.mesh == {'data': 8, 'fsdp': 1}
  assert found.cycles is found.predicted_images_a_second is found.images_that_fit is None
  eight.batch_size = 64
  eight.model.bn_group_size = 8
  larger = plan.plan(eight, 'cpu:8')
  assert larger.collectives == found.collectives


def test_groups_over_devices_are_told(eight):
  """Mean and variance of q, k and v, and the sums of their gradients, some sent with others."""
  eight.model.bn_group_size = 32
  found = plan.plan(eight, 'cpu:8')
  assert found.collectives['all-reduce'][0] == 7


def test_what_a_loop_hides_is_left_out(eight):
  eight.optimizer.accumulate_steps = 2
  found = plan.plan(eight, 'cpu:1')
  assert found.flops is found.bytes_accessed is found.cycles is None
  assert 'flops' not in str(found)


def test_microbatches_are_of_all_devices(eight):
  """A device has one group of batch norms; each of four microbatches has a part of it."""
  eight.batch_size, eight.model.bn_group_size = 128, 16
  whole = plan.plan(eight, 'cpu:8')
  eight.optimizer.accumulate_steps = 4
  parts = plan.plan(eight, 'cpu:8')
  assert parts.memory['temporary'] < whole.memory['temporary'] / 2
  assert 'all-gather' not in parts.collectives


def test_what_is_split_over_fsdp_takes_less_a_device(eight, monkeypatch):
  from cvt_flax.training import sharding

  monkeypatch.setattr(sharding, '_SMALL', 8)
  whole = plan.plan(eight, 'cpu:8')
  eight.mesh.fsdp = 4
  split = plan.plan(eight, 'cpu:8')
  assert split.mesh == {'data': 2, 'fsdp': 4}
  assert split.memory['state'] < whole.memory['state'] / 2
  assert 'all-gather' in split.collectives


def test_a_step_that_does_not_fit(eight, monkeypatch):
  devices = jax.devices('cpu')[:1]
  monkeypatch.setattr(topology, 'find', lambda _: topology.Topology('t', devices, 10**4, 1e9))
  with pytest.raises(UserError, match=r'batch_size=32 does not fit, a device needs .* the largest'):
    plan.plan(eight)


def test_the_batch_that_would_fit_is_by_proportion(eight, monkeypatch):
  devices = jax.devices('cpu')[:1]
  monkeypatch.setattr(topology, 'find', lambda _: topology.Topology('t', devices, 10**9, 1e9))
  found = plan.plan(eight)
  of = found.memory
  # What is resident does not grow with the batch.
  assert found.images_that_fit == (10**9 - of['arguments']) * 32 // (of['needed'] - of['arguments'])
  assert f'about {found.images_that_fit} images would fit' in str(found)


def test_data_that_is_not_there(eight, tmp_path):
  eight.source, eight.data_dir = 'tfds:cifar10', str(tmp_path)
  with pytest.raises(UserError, match='tfds:cifar10 is not prepared: what its images take'):
    plan.plan(eight, 'cpu:1')
  eight.engine, eight.augment.crop_padding = 'stream', 0
  assert plan.plan(eight, 'cpu:1').images_a_device == 32
  eight.source, eight.data_dir = 'folder:nowhere', ''
  with pytest.raises(UserError, match="no folder 'nowhere'"):
    plan.plan(eight, 'cpu:1')


def test_what_training_would_refuse(eight):
  eight.class_weights = (1.0, 2.0, 3.0)
  with pytest.raises(UserError, match='class_weights=.*: one for each of the 2 classes'):
    plan.plan(eight, 'cpu:1')
  eight.class_weights, eight.image_size, eight.augment.crop_padding = (), 2, 0
  eight.model.cls_token, eight.model.pool = (False,), 'mean'
  with pytest.raises(UserError, match='leaves stage 0 of the model a single key'):
    plan.plan(eight, 'cpu:1')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v5f:2x2', "KIND:SHAPE is needed, .*, did you mean 'v5p'"),
    ('v5e', 'KIND:SHAPE is needed, such as v5e:4x4, .* or cpu$'),
    ('v5e:4x', 'KIND:SHAPE is needed'),
    ('cpu:none', 'a number of devices is needed, such as cpu:8'),
    ('cpu:0', 'a number of devices is needed, such as cpu:8'),
    ('cpu:9', 'jax has started with 8 CPU devices'),
  ],
)
def test_names_of_no_topology(name, message):
  with pytest.raises(UserError, match=f'--topology={name}: {message}'):
    topology.find(name)


def test_topologies_of_tpus(monkeypatch):
  """What the compiler is asked for; it is in libtpu, which the tests do without."""
  asked = []

  def describe(**arguments):
    asked.append(arguments)
    assert topology._NOWHERE.keys() <= os.environ.keys()
    if arguments['topology_name'] == 'v5e:3x5':
      raise RuntimeError('no such\n  layout')
    if arguments['topology_name'] == 'v4:2x2x1':
      raise RuntimeError('JAX TPU support not installed')
    return type('Described', (), {'devices': ['device']})

  monkeypatch.setattr(topology.topologies, 'get_topology_desc', describe)
  for variable in topology._NOWHERE:
    monkeypatch.delenv(variable, raising=False)
  one, slices = topology.find('v5e:1x1'), topology.find('4xv6e:16x16')
  assert one == topology.Topology('v5e:1x1', ['device'], 63 * 2**28, pytest.approx(1.5e9, 0.01))
  assert (slices.memory, slices.clock) == (125 * 2**28, None)
  assert not topology._NOWHERE.keys() & os.environ.keys()
  assert asked[0] | {'platform': 'tpu'} == {
    'platform': 'tpu',
    'topology_name': 'v5e:1x1',
    'chips_per_host_bounds': (1, 1, 1),
  }
  assert asked[1] == {'platform': 'tpu', 'topology_name': 'v6e:16x16', 'num_slices': 4}
  with pytest.raises(UserError, match='--topology=v5e:3x5: no such layout'):
    topology.find('v5e:3x5')
  with pytest.raises(UserError, match=r'for TPUs is needed: pip install "jax\[tpu\]=='):
    topology.find('v4:2x2x1')


HLO = r"""
%inside { %t = f32[999,999]{1,0} add(), metadata={op_name="inside"},
  backend_config={"estimated_cycles":"1000000"} }
ENTRY %main {
  %a = (f32[10]{0}, f32[10]{0}) all-reduce-start(%x), metadata={op_name="sum"}
  %b = f32[10]{0} all-reduce-done(%a), metadata={op_name="sum"}
  %c = (bf16[4,8]{1,0}, s32[]) all-reduce(%y, %z), backend_config={"estimated_cycles":"30"}
  %d = f32[8,8]{1,0} all-gather(%w), backend_config={"estimated_cycles":"12"}
  %e = f32[64,2]{1,0:T(8,128)} fusion(%d), kind=kLoop, metadata={op_name="jit(step)/p[\'a\']"}
  %f = f32[2,64]{1,0} fusion(%d), kind=kLoop, metadata={op_name="jit(step)/q"}
}
"""


def test_what_the_text_of_a_program_says():
  assert hlo.collectives(HLO) == {'all-reduce': [2, 40 + 64 + 4], 'all-gather': [1, 256]}
  assert hlo.cycles(HLO) == 42
  assert hlo.cycles('ENTRY nothing') is None
  assert hlo.largest(HLO, 2) == [
    "f32[64,2] 0.0 MiB of jit(step)/p['a']",
    'f32[2,64] 0.0 MiB of jit(step)/q',
  ]


def test_the_command_prints_for_people_and_as_json(config_file, quick_env):
  command = [sys.executable, ROOT / 'train.py', f'--config={config_file}', '--mode=compile']
  told = subprocess.run(
    [*command, '--topology=cpu:1'],
    env={**quick_env, 'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
    check=True,
  )
  *lines, last = told.stdout.splitlines()
  found = json.loads(last)
  assert lines[0] == 'compiling the step for cpu:1' and lines[1].startswith('cpu:1: 1 x cpu, mesh')
  assert 'no collectives' in lines
  assert found['batch_size'] == 16 and math.isfinite(found['flops'])
  assert told.stderr == ''


def test_a_topology_is_for_compiling(config_file, quick_env):
  command = [sys.executable, ROOT / 'train.py', f'--config={config_file}', '--topology=cpu:2']
  told = subprocess.run(command, env=quick_env, capture_output=True, text=True)
  assert told.returncode == 2
  assert told.stderr == 'train.py: --topology=cpu:2 is for --mode=compile\n'
