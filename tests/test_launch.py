"""launch/: what starts a run on other machines, whose programs are played by scripts here."""

import math
import os
import subprocess
import sysconfig

import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / 'launch'
CACHE = 'JAX_COMPILATION_CACHE_DIR'
SCRIPTS = [*sorted(LAUNCH.glob('*.sh')), ROOT / '.ci' / 'run', ROOT / '.ci' / 'notebook_install']
# A program that writes down its arguments, and answers as a file says: a line each call, of an exit
# code and of what is printed.
PLAYER = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$LOG"
printf '\\1' >> "$LOG"
read -r code words < "$0.says"
sed -i 1d "$0.says"
printf '%s' "$words"
exit "${code:-0}"
"""


@pytest.fixture
def play(tmp_path, clean_env):
  """play(command, program=[answer, ...], ...) runs a command; returns it and all calls' words."""

  def run(command, **answers):
    folder = tmp_path / 'bin'
    folder.mkdir(exist_ok=True)
    for name, lines in answers.items():
      (folder / name).write_text(PLAYER)
      (folder / name).chmod(0o755)
      (folder / f'{name}.says').write_text(''.join(f'{line}\n' for line in lines))
    log = tmp_path / 'log'
    log.write_text('')
    env = {**clean_env, 'PATH': f'{folder}:{os.environ["PATH"]}', 'LOG': str(log)}
    env |= {'POLL_SECONDS': '0', 'SLURM_JOB_ID': '7', 'SLURM_CPUS_PER_TASK': '6'}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    return done, [call.split('\0')[:-1] for call in log.read_text().split('\1')[:-1]]

  return run


@pytest.mark.parametrize('script', SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_scripts_are_sound(script):
  shellcheck = os.path.join(sysconfig.get_path('scripts'), 'shellcheck')
  done = subprocess.run([shellcheck, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


TPU = [LAUNCH / 'tpu_vm.sh', 'cvt', 'us-west4-a', 'v5litepod-256', 'image', '10.0.0.2:/my runs']
ENDED, NOT_STARTED = 'train.py ended with', 'train.py did not start'
ARGUMENTS = ['--config=configs/digits.py', '--config.augment.crop_scale=(0.5, 1.0)']


def test_a_slice_is_made_and_trained_on(play):
  answers = ['1 NOT_FOUND', '0', '0 WAITING_FOR_RESOURCES', '0 ACTIVE', f'0 {ENDED} 0']
  done, calls = play([*TPU, *ARGUMENTS], gcloud=answers)
  assert done.returncode == 0, done.stderr
  asked, created, *waited, trained = calls
  assert created[:6] == ['gcloud', 'alpha', 'compute', 'tpus', 'queued-resources', 'create']
  assert '--runtime-version=v2-alpha-tpuv5-lite' in created and '--spot' not in created
  assert '--autocheckpoint-enabled' in created and '--zone=us-west4-a' in created
  assert [call[3:5] for call in (asked, *waited)] == [['queued-resources', 'describe']] * 3
  assert trained[1:5] == ['compute', 'tpus', 'tpu-vm', 'ssh'] and '--worker=all' in trained


def test_no_alpha_is_needed_where_nothing_of_it_is(play):
  answers = ['1 NOT_FOUND', '0', '0 ACTIVE', f'0 {ENDED} 0']
  done, calls = play([*TPU[:3], 'v6e-8', *TPU[4:], *ARGUMENTS], gcloud=answers)
  assert done.returncode == 0, done.stderr
  assert calls[1][1:5] == ['compute', 'tpus', 'queued-resources', 'create']
  assert not [word for call in calls for word in call if 'alpha' in word and 'tpuv6e' not in word]


def test_what_each_host_does(play):
  """The command of the hosts, run."""
  _, calls = play([*TPU, *ARGUMENTS], gcloud=['0 ACTIVE', f'0 {ENDED} 0'])
  (command,) = (word for word in calls[-1] if word.startswith('--command='))
  script = command.removeprefix('--command=')
  done, calls = play(['bash', '-c', script], mountpoint=['1'], sudo=['0', '0', '1', '75'])
  assert done.returncode == 75 and done.stdout == f'{ENDED} 75\n', done.stderr
  _, _, mount, remove, trained = calls
  assert mount == ['sudo', 'mount', '-t', 'nfs', '10.0.0.2:/my runs', '/runs']
  assert remove == ['sudo', 'docker', 'rm', '--force', 'cvt']
  expected = ['image', '--workdir=/runs/cvt', '--distributed=auto', *ARGUMENTS]
  assert trained[:3] == ['sudo', 'docker', 'run'] and trained[-5:] == expected
  assert {'--volume=/runs:/runs', f'--env={CACHE}=/runs/compiled'} <= set(trained)


@pytest.mark.parametrize(
  'ended',
  [
    [f'75 {ENDED} 75', '0 ACTIVE'],  # stopped for maintenance
    ['255', '1 a network that is away', '0 ACTIVE'],  # the connection was lost
    ['255', '0 SUSPENDED', '0', '1 NOT_FOUND', '0', '0 ACTIVE'],  # a spot slice was taken away
  ],
)
def test_what_was_stopped_goes_on(ended, play):
  answers = ['0 ACTIVE', *ended, f'0 {ENDED} 0']
  done, calls = play(['env', 'SPOT=1', *TPU, *ARGUMENTS], gcloud=answers)
  assert done.returncode == 0, done.stderr
  assert len(calls) == len(answers) and calls[-1][-5:] == calls[1][-5:]
  created = [call for call in calls if 'create' in call]
  assert all('--spot' in call for call in created)


@pytest.mark.parametrize('code', [2, 3])
def test_a_training_that_fails_ends_the_command(code, play):
  done, calls = play([*TPU, *ARGUMENTS], gcloud=['0 ACTIVE', f'1 {ENDED} {code}'])
  assert done.returncode == code and len(calls) == 2


def test_a_host_without_its_folder_says_so(play):
  _, calls = play([*TPU, *ARGUMENTS], gcloud=['0 ACTIVE', f'0 {ENDED} 0'])
  (command,) = (word for word in calls[-1] if word.startswith('--command='))
  script = command.removeprefix('--command=')
  done, calls = play(['bash', '-c', script], mountpoint=['1'], sudo=['0', '32'])
  assert done.returncode == 125 and done.stdout == f'{NOT_STARTED}\n' and len(calls) == 3


@pytest.mark.parametrize('words', [f'{ENDED} 1', f'{ENDED} 125', NOT_STARTED])
def test_an_error_that_comes_again_and_again_ends_the_command(words, play):
  failed = ['0 ACTIVE', f'1 {words}']
  done, calls = play([*TPU, *ARGUMENTS], gcloud=[*(failed * 5), '0 ACTIVE', f'0 {ENDED} 0'])
  assert done.returncode == 1 and len(calls) == 10
  assert 'five errors in a row' in done.stderr and words in done.stdout


@pytest.mark.parametrize('between', [['0 ACTIVE', '75'], ['0 SUSPENDED', '0', '0 ACTIVE', '1']])
def test_errors_with_something_else_between_them_do_not(between, play):
  failed = ['0 ACTIVE', f'1 {ENDED} 1'] * 3
  answers = [*failed, *between, *failed, '0 ACTIVE', f'0 {ENDED} 0']
  done, calls = play([*TPU, *ARGUMENTS], gcloud=answers)
  assert done.returncode == 0 and len(calls) == len(answers)


def test_a_slice_that_cannot_be_made(play):
  done, _ = play([*TPU, *ARGUMENTS], gcloud=['0 FAILED', '0 why it failed'])
  assert done.returncode == 1 and 'why it failed' in done.stderr


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (TPU, 'launch/tpu_vm.sh NAME ZONE ACCELERATOR IMAGE RUNS ARGUMENT'),
    ([*TPU[:3], 'v5e-256', *TPU[4:], 'x'], 'v5e-256: v4-N, v5litepod-N, v5p-N or v6e-N is needed'),
  ],
)
def test_what_no_slice_can_be_made_of(words, message, play):
  done, calls = play(words, gcloud=[])
  assert done.returncode == 2 and message in done.stderr and not calls


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (2, False), (75, True)])
def test_a_slurm_job_goes_on(code, requeued, play):
  done, calls = play([LAUNCH / 'slurm.sh', *ARGUMENTS], srun=[code], scontrol=['0'])
  assert done.returncode == code
  assert calls[0][-3:] == [*ARGUMENTS, '--distributed=auto'] and '--cpus-per-task=6' in calls[0]
  assert (calls[1:] == [['scontrol', 'requeue', '7']]) == requeued


def test_a_slurm_job_by_itself_is_of_a_config_that_is_there(play):
  _, calls = play([LAUNCH / 'slurm.sh'], srun=['0'])
  assert (ROOT / calls[0][-2].removeprefix('--config=')).is_file()


def test_a_slurm_job_keeps_what_it_compiles(play, tmp_path):
  srun = tmp_path / 'bin' / 'srun'
  srun.parent.mkdir()
  srun.write_text(f'#!/bin/bash\nprintf %s "${CACHE}"\n')
  srun.chmod(0o755)
  done, _ = play([LAUNCH / 'slurm.sh'])
  assert done.stdout == f'{tmp_path}/runs/compiled'
  done, _ = play(['env', f'{CACHE}=/elsewhere', LAUNCH / 'slurm.sh'])
  assert done.stdout == '/elsewhere'


def test_slurm_is_needed():
  env = {name: value for name, value in os.environ.items() if name != 'SLURM_JOB_ID'}
  done = subprocess.run([LAUNCH / 'slurm.sh'], env=env, capture_output=True, text=True)
  assert done.returncode and 'sbatch launch/slurm.sh' in done.stderr


def test_the_jobset():
  jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and jobset['kind'] == 'JobSet'
  assert jobset['spec'].keys() == {'failurePolicy', 'replicatedJobs'}
  ((replicated),) = jobset['spec']['replicatedJobs']
  assert replicated.keys() == {'name', 'replicas', 'template'}
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}}
  job |= replicated['template']
  kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)

  job = job['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert {'name': CACHE, 'value': '/runs/compiled'} in container['env']
  sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  hosts = math.prod(map(int, sides)) // container['resources']['limits']['google.com/tpu']
  assert job['parallelism'] == job['completions'] == hosts
  # Of what cannot succeed the Job fails by this reason, of all else by another.
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes'] == {'containerName': 'train', 'operator': 'In', 'values': [2, 3]}
  (fatal,) = jobset['spec']['failurePolicy']['rules']
  assert fatal['action'] == 'FailJobSet' and fatal['onJobFailureReasons'] == ['PodFailurePolicy']
  assert fatal.keys() == {'name', 'action', 'onJobFailureReasons'}
  (config,) = (a for a in container['args'] if a.startswith('--config='))
  assert (ROOT / config.removeprefix('--config=')).is_file()


def test_the_image_holds_what_training_needs():
  lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
  copied = [word for line in lines if line.startswith('COPY') for word in line.split()[1:-1]]
  assert {'cvt_flax', 'configs', 'train.py', 'requirements.txt'} <= set(copied)
  assert all((ROOT / name).exists() for name in copied)
