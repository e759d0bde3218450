"""Files and folders that are there when they are whole."""

import os
import pathlib

import pytest

from cvt_flax import storage
from cvt_flax.errors import UserError


def test_new_paths_appear_when_they_are_whole(tmp_path):
  with storage.new_path(tmp_path / 'a' / 'w') as path:
    path.mkdir()
    (path / 'x').write_text('x')
    assert not (tmp_path / 'a' / 'w').exists()
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['w']


@pytest.mark.parametrize('folder', [True, False])
def test_a_failure_leaves_nothing(folder, tmp_path):
  with pytest.raises(ZeroDivisionError), storage.new_path(tmp_path / 'w') as path:
    path.mkdir() if folder else path.write_text('half')
    1 / 0  # noqa: B018
  assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_folders_that_were_made_for_it(tmp_path):
  (tmp_path / 'mine').mkdir()
  with pytest.raises(ZeroDivisionError), storage.new_path(tmp_path / 'mine' / 'a' / 'b' / 'w'):
    1 / 0  # noqa: B018
  assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*')] == ['mine']


def test_the_working_directory_may_be_filled(tmp_path, monkeypatch):
  (tmp_path / 'w').mkdir()
  monkeypatch.chdir(tmp_path / 'w')
  with storage.new_path(pathlib.Path('.'), folder=True) as path:
    path.mkdir()
    (path / 'x').write_text('x')
  assert (tmp_path / 'w' / 'x').exists()


def test_nothing_is_written_over(tmp_path):
  (tmp_path / 'w').write_text('mine')
  with pytest.raises(UserError, match='w exists'), storage.new_path(tmp_path / 'w'):
    pass
  assert (tmp_path / 'w').read_text() == 'mine'


@pytest.mark.parametrize('place', ['gs://bucket/weights', 's3://bucket/weights.pth'])
def test_an_object_store_is_not_written_to_as_a_folder(place):
  with pytest.raises(UserError, match=f'^{place}: a place on this machine is needed'):
    storage.local_path(place)


def test_a_store_is_told_from_a_folder():
  with pytest.raises(UserError, match="^gs:/bucket/x: give 'gs://BUCKET/FOLDER' as a str"):
    storage.path_of(pathlib.Path('gs://bucket/x'))
  with pytest.raises(UserError, match='as a str; pathlib drops'):
    storage.local_path(pathlib.Path('s3://bucket/x'))
  assert storage.path_of('a:/b') == pathlib.Path('a:/b')


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
  def full(_):
    raise OSError(28, 'No space left on device')

  storage.write_whole(tmp_path / 'x', b'before')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    storage.write_whole(tmp_path / 'x', b'after')
  assert [p.name for p in tmp_path.iterdir()] == ['x']
  assert (tmp_path / 'x').read_bytes() == b'before'


def test_an_empty_folder_is_filled(tmp_path):
  (tmp_path / 'w').mkdir()
  with storage.new_path(tmp_path / 'w', folder=True) as path:
    path.mkdir()
    (path / 'x').write_text('x')
  assert (tmp_path / 'w' / 'x').exists()
  with pytest.raises(UserError, match='w exists'), storage.new_path(tmp_path / 'w', folder=True):
    pass


def test_a_file_does_not_take_the_place_of_an_empty_folder(tmp_path):
  (tmp_path / 'w.csv').mkdir()
  with pytest.raises(UserError, match=r'w\.csv exists'):
    storage.check_new(tmp_path / 'w.csv')
  with pytest.raises(UserError, match=r'w\.csv exists'), storage.new_path(tmp_path / 'w.csv'):
    pass


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with (
    pytest.raises(UserError, match='cannot be written'),
    storage.new_path(tmp_path / 'file' / 'w'),
  ):
    pass
