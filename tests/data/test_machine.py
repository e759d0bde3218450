"""Cores and memory, with control groups made on the spot."""

import math
import os

import pytest

from cvt_flax.data import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
  """Returns a function that writes files of the group of this process, or of the one above it."""
  monkeypatch.setattr(machine, '_CGROUPS', tmp_path / 'cgroup')
  monkeypatch.setattr(machine, '_OWN_CGROUP', tmp_path / 'own')
  (tmp_path / 'own').write_text('4:memory:/old\n0::/pod/container\n')
  (tmp_path / 'cgroup/pod/container').mkdir(parents=True)

  def write(place, **files):
    for name, text in files.items():
      (tmp_path / 'cgroup' / place / name.replace('_', '.')).write_text(f'{text}\n')

  return write


@pytest.mark.parametrize(
  ('quota', 'cores'), [('max 100000', 8), ('150000 100000', 2), ('50000 100000', 1)]
)
def test_cores_are_those_of_the_affinity_or_the_quota(quota, cores, groups, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
  groups('pod/container', cpu_max=quota)
  assert machine.cores() == cores


def test_memory_is_what_the_tightest_group_leaves(groups):
  of_machine = machine.available_memory()
  assert 0 < of_machine < math.inf
  groups('pod/container', memory_max='max', memory_current=5 * GIB)
  assert machine.available_memory() == pytest.approx(of_machine, rel=0.2)
  stat = (
    f'anon 7\ninactive_file {GIB // 128}\nactive_file {GIB // 256}\nslab_reclaimable {GIB // 256}'
  )
  groups('pod', memory_max=GIB // 16, memory_current=GIB // 32, memory_stat=stat)
  assert machine.available_memory() == GIB // 32 + GIB // 64  # what files have, too


def test_without_control_groups(tmp_path, monkeypatch):
  monkeypatch.setattr(machine, '_OWN_CGROUP', tmp_path / 'nothing')
  assert machine.cores() >= 1 and machine.available_memory() > 0
