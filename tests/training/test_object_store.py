"""A run folder in an object store, which an emulator of Google's on the loopback stands in for."""

import importlib.util
import signal
import socket
import subprocess
import sys
from http import HTTPStatus

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

from cvt_flax import storage
from cvt_flax.errors import UserError
from tests.conftest import ROOT
from tests.training.compare import lines_without_times

RUN = 'gs://bucket/runs/tiny'


def with_generations(patch):
  """Adds to the emulator what TensorStore builds on: writes of an object that nobody else wrote."""
  upload, download = objects._media_upload, objects.download

  def generation(request, storage):
    bucket, name = request.params['bucket_name'], request.params.get('object_id')
    try:
      return storage.get_file_obj(bucket, name or request.query['name'][0])['generation']
    except NotFound:
      return '0'

  def upload_if(request, response, storage):
    (wanted,) = request.query.get('ifGenerationMatch', [None])
    if wanted not in (None, generation(request, storage)):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    upload(request, response, storage)

  def download_with(request, response, storage):
    response['x-goog-generation'] = generation(request, storage)
    download(request, response, storage)

  patch.setattr(objects, '_media_upload', upload_if)
  patch.setattr(objects, 'download', download_with)
  for _, handlers in server.HANDLERS:
    if handlers.get('GET') is download:
      patch.setitem(handlers, 'GET', download_with)


@pytest.fixture(scope='module')
def store():
  """What a process needs in its environment to take the emulator for the store."""
  with pytest.MonkeyPatch.context() as patch:
    with_generations(patch)
    yield from serve()


def serve():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  emulator = server.create_server('127.0.0.1', port, in_memory=True, default_bucket='bucket')
  emulator.start()
  address = f'http://127.0.0.1:{port}'
  yield {
    'STORAGE_EMULATOR_HOST': address,
    'TENSORSTORE_GCS_HTTP_URL': address,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would ask Google what kind the bucket is
  }
  emulator.stop()


def start(words, env):
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen([sys.executable, *map(str, words)], env=env, cwd=ROOT, **pipes)


def finish(process):
  said, errors = process.communicate(timeout=300)
  return process.returncode, said, errors


def test_a_run_is_stopped_goes_on_is_read_and_answers_there(
  store, config_file, npz, trained, quick_env, tmp_path
):
  env = {**quick_env, **store}
  train = [ROOT / 'train.py', f'--config={config_file}', f'--workdir={RUN}']
  process = start([*train, '--config.tensorboard=true'], env)
  for line in process.stdout:
    if 'validation:' in line:
      process.send_signal(signal.SIGTERM)
      break
  code, _, errors = finish(process)
  assert code == 75 and 'saved step' in errors and 'Traceback' not in errors, errors
  code, said, errors = finish(start([*train, '--config.tensorboard=true'], env))
  assert code == 0 and 'going on from step' in said, errors
  code, said, errors = finish(start(train, env))
  assert code == 0 and f'{RUN} is finished' in said, errors

  script = f"""
import numpy as np
from etils import epath
from cvt_flax import load_pretrained, predict_dataset

model, variables = load_pretrained('{RUN}')
print(model.embed_dims)
for name in ('experiment.json', 'metrics.jsonl', 'report/index.html', 'predictions.npz'):
  epath.Path('{RUN}', name).copy('{tmp_path}/' + epath.Path(name).name)
print(*sorted(p.name for p in epath.Path('{RUN}').iterdir()))
(shard,) = predict_dataset('{RUN}', 'npz:{npz}', 'gs://bucket/answers', split='test')
print(shard, len(np.load(shard.open('rb'))['classes']))
try:
  load_pretrained('{RUN}-2')
except Exception as e:
  print(e)
"""
  code, said, errors = finish(start(['-c', script], env))
  assert code == 0 and said.startswith('(8,)'), errors
  assert 'tensorboard' in said and 'tmp' not in said
  assert 'gs://bucket/answers/shard-00000-of-00001.npz 50\n' in said
  assert f'{RUN}-2 holds no run: of an object store only run folders are read' in said
  _, folder, _ = trained
  assert lines_without_times(tmp_path) == lines_without_times(folder)
  assert (tmp_path / 'index.html').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('place', 'message'),
  [
    ('ftp://bucket/run', 'ftp://bucket/run: a folder of this machine, or gs://BUCKET/FOLDER'),
    ('gs://bucket/run', 'gs://bucket/run: gcsfs is needed: pip install gcsfs'),
  ],
)
def test_places_that_cannot_be_used(place, message, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=message):
    storage.path_of(place)


def test_a_store_that_is_out_of_reach(monkeypatch):
  class Path:
    def __init__(self, place):
      pass

    def exists(self):
      raise OSError('no\n  credentials')

  monkeypatch.setattr(storage.epath, 'Path', Path)
  with pytest.raises(UserError, match='gs://bucket/run cannot be reached: no credentials'):
    storage.path_of('gs://bucket/run')


def test_a_home_that_the_shell_has_left(monkeypatch, tmp_path):
  """As it does in --workdir=~/runs."""
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.path_of('~/runs') == tmp_path / 'runs'
