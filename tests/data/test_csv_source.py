"""Lists of images in CSV files."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from cvt_flax.data import csv_source, images, sources
from cvt_flax.errors import UserError


def write(path, *lines, newline='\n'):
  path.write_bytes(newline.join([*lines, '']).encode(errors='surrogateescape'))
  return f'csv:{path}'


def error_of(source):
  with pytest.raises(UserError) as error:
    sources.load(source)
  message = str(error.value)
  assert '\n' not in message
  return message


def names(split):
  return [split.path(i) for i in range(len(split))]


def test_images_are_read_from_the_folder_of_the_list(tmp_path):
  for number, name in enumerate(['1.png', 'deep/er/2.png', 'a,b "c".png']):
    (tmp_path / 'set' / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (3, 2), (number, 0, 0)).save(tmp_path / 'set' / name)
  elsewhere = tmp_path / 'elsewhere.png'
  Image.new('RGB', (3, 2), (3, 0, 0)).save(elsewhere)
  source = write(
    tmp_path / 'set/list.csv',
    'path,label',
    '1.png,dog',
    'deep/er/2.png,cat',
    '"a,b ""c"".png",dog',
    f'{elsewhere},cat',
  )
  data = sources.load(source, holdout=0)
  assert data.name == 'list' and data.class_names == ('cat', 'dog')
  assert data.validation is None and data.test is None
  assert data.train.name == f'{tmp_path}/set/list.csv train'
  examples = list(data.train)
  assert [images.decode(e.image, e.name).getpixel((0, 0))[0] for e in examples] == [0, 1, 2, 3]
  assert [(e.label, e.index) for e in examples] == [(1, 0), (0, 1), (1, 2), (0, 3)]
  assert examples[1].name == f'{tmp_path}/set/deep/er/2.png'
  assert examples[3].name == str(elsewhere)
  assert data.train.labels.dtype == np.int32


def test_spaces_around_a_field_are_not_of_it(tmp_path):
  source = write(
    tmp_path / 'list.csv',
    'path, label, split',
    '1.png, cat , train',
    '2.png,cat,train ',
    '" 3.png",dog,val',
    '4.png,dog,train',
  )
  data = sources.load(source, holdout=0)
  assert data.class_names == ('cat', 'dog')
  assert names(data.train) == [f'{tmp_path}/{n}.png' for n in (1, 2, 4)]
  assert names(data.validation) == [f'{tmp_path}/ 3.png']


@pytest.mark.parametrize(
  'train,validation,test', [('train', 'val', 'test'), ('Training', 'VALID', 'evaluation')]
)
def test_splits_columns_in_any_order_and_more_of_them(tmp_path, train, validation, test):
  source = write(
    tmp_path / 'x.csv',
    'split,note,label,path',
    f'{test},,b,1',
    f'{train},x,b,2',
    '',
    f'{validation},,a,3',
    f'{train},,a,4',
    f'{test},,a,5',
    newline='\r\n',
  )
  data = sources.load(source)
  assert [names(s) for s in (data.train, data.validation, data.test)] == [
    [f'{tmp_path}/{i}' for i in part] for part in ('24', '3', '15')
  ]
  assert [s.labels.tolist() for s in (data.train, data.validation, data.test)] == [
    [1, 0],
    [0],
    [1, 0],
  ]
  assert data.held_out.size == 0


def test_a_list_without_validation_lends_part_of_train(tmp_path):
  rows = [f'{i}.png,{"ab"[i % 2]}' for i in range(40)]
  data = sources.load(write(tmp_path / 'x.csv', 'path,label', *rows))
  assert (len(data.train), len(data.validation)) == (36, 4)


def test_a_list_for_evaluation_only(tmp_path):
  data = sources.load(write(tmp_path / 'x.csv', 'path,label,split', '1,a,test', '2,b,test'))
  assert data.train is None and data.validation is None and len(data.test) == 2


@pytest.mark.parametrize(
  'labels,classes',
  [
    ('10 9 2 10', ('2', '9', '10')),
    ('10 9 x', ('10', '9', 'x')),
    ('10 9 -1', ('-1', '10', '9')),
    ('10 9 ²', ('10', '9', '²')),
    ('1 01 1', ('01', '1')),
  ],
)
def test_classes_are_sorted_by_name_or_number(tmp_path, labels, classes):
  labels = labels.split()
  data = sources.load(
    write(tmp_path / 'x.csv', 'label,path', *(f'{c},{i}' for i, c in enumerate(labels))), holdout=0
  )
  assert data.class_names == classes
  assert [classes[c] for c in data.train.labels] == labels


def test_what_a_spreadsheet_puts_in_front_is_not_part_of_the_header(tmp_path):
  (tmp_path / 'x.csv').write_bytes('\ufeffpath,label\n1,a\n2,b\n'.encode())
  assert len(sources.load(f'csv:{tmp_path}/x.csv', holdout=0).train) == 2


def test_names_that_are_not_utf8(tmp_path):
  odd = os.fsdecode(b'caf\xe9.png')
  file = io.BytesIO()
  Image.new('RGB', (3, 2)).save(file, 'PNG')
  (tmp_path / odd).write_bytes(file.getvalue())
  source = write(tmp_path / 'x.csv', 'path,label', f'{odd},a', '2,b')
  example = sources.load(source, holdout=0).train[0]
  assert example.image == file.getvalue() and example.name == f'{tmp_path}/{odd}'


def test_labels_that_are_not_utf8(tmp_path):
  source = write(tmp_path / 'x.csv', 'path,label', '1,a', os.fsdecode(b'2,K\xe4se'))
  with pytest.raises(UserError, match=r'x.csv line 3 has a label that is not UTF-8: save the list'):
    sources.load(source, holdout=0)


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path / 'x.csv', 'path,label', '1,a', '2,b')
  assert names(sources.load('csv:~/x.csv', holdout=0).train) == [f'{tmp_path}/1', f'{tmp_path}/2']


def test_a_missing_image_is_found_when_it_is_read(tmp_path):
  train = sources.load(
    write(tmp_path / 'x.csv', 'path,label', '1.png,a', '2.png,b'), holdout=0
  ).train
  with pytest.raises(UserError, match=f'cannot read {tmp_path}/2.png: No such file'):
    images.decode(train[1].image, train[1].name)


@pytest.mark.parametrize(
  'lines,message',
  [
    (
      ['path,lable', '1,a'],
      "{file} line 1 has no column 'label' (it has 'path', 'lable'; needed are path and label, and "
      "split where there is more than train), did you mean 'lable'?",
    ),
    (['a.png,cat', 'b.png,dog'], "{file} line 1 has no column 'path' (it has 'a.png', 'cat'; "),
    (['path,label,path', '1,a,2'], "{file} line 1 has two columns 'path'"),
    (['path,label'], '{file} lists no images; wanted is a line for each, below the header'),
    (['path,label', '1,a', '2,'], '{file} line 3 has no label'),
    (['path,label', '1,a', ' ,b'], '{file} line 3 has no path'),
    (['path,label,split', '1,a,', '2,b,train'], '{file} line 2 has no split'),
    (['path,label', '1,a', '', '2'], '{file} line 4 has 1 fields, but the header has 2; quote a'),
    (['path,label', '1,a', '2,3,b'], '{file} line 3 has 3 fields, but the header has 2; quote a'),
    (['path,label', '1\0,a'], '{file} line 2 has a NUL in its path'),
    (['path,label', '"1,a', '2,b'], '{file} line 3 is not CSV: unexpected end of data'),
    (
      ['path,label,split', '1,a,train', '2,b,vla'],
      "{file} line 3 has the unknown split 'vla' (allowed: train, training, validation, val, "
      "valid, test, evaluation), did you mean 'val'?",
    ),
    (
      ['path,label,split', '1,cat,train', '2,dog,train', '3,cta,test', '4,cta,test'],
      "{file} line 4: class 'cta' has no image in train, did you mean 'cat'?",
    ),
    (['path,label', '1,a', '2,a'], "has one class only, 'a'; a classifier needs two or more"),
  ],
)
def test_bad_lists(tmp_path, lines, message):
  assert message.format(file=tmp_path / 'x.csv') in error_of(write(tmp_path / 'x.csv', *lines))


def test_a_list_that_is_empty_or_not_there(tmp_path):
  path = tmp_path / 'x.csv'
  assert error_of(f'csv:{path}') == f'cannot read {path}: No such file or directory'
  path.touch()
  assert error_of(f'csv:{path}') == (
    f'{path} is empty; its first line names the columns, path,label,split'
  )


def test_files_are_not_looked_up_and_names_take_little_memory(tmp_path):
  rows = (
    f'n{i // 700:08d}/n{i // 700:08d}_{i * 7919 % 30011}.JPEG,n{i // 700:08d}'
    for i in range(20_000)
  )
  source = write(tmp_path / 'x.csv', 'path,label', *rows)
  with pytest.MonkeyPatch.context() as patch:
    for name in ('stat', 'lstat', 'scandir'):
      patch.setattr(os, name, None)
    data = csv_source.load_csv(source.removeprefix('csv:'))
  assert sum(map(len, data.train.blocks)) < 6 * 20_000
  for i in (0, 63, 64, 12_345, 19_999):
    assert data.train.path(i) == (
      f'{tmp_path}/n{i // 700:08d}/n{i // 700:08d}_{i * 7919 % 30011}.JPEG'
    )


def test_the_digest_tells_what_is_listed(tmp_path):

  def digest(*rows, folder='.'):
    (tmp_path / folder).mkdir(exist_ok=True)
    source = write(tmp_path / folder / 'x.csv', 'path,label', *rows)
    return sources.load(source, holdout=0).train.digest()

  rows = [f'{i},{"ab"[i % 2]}' for i in range(100)]
  first = digest(*rows)
  assert digest(*rows, folder='moved') == first
  others = {
    digest(*rows[:-1]),
    digest(*rows, '100,a'),
    digest(*rows[1:], rows[0]),
    digest('x,a', *rows[1:]),
    digest('0,b', *rows[1:]),
  }
  assert len(others | {first}) == 6


@pytest.mark.parametrize('name', ['2.png', './2.png', '{folder}/2.png'])
def test_a_file_is_in_one_split_alone(tmp_path, name):
  rows = ['1.png,a,train', 'x/../2.png,b,train', '3.png,b,test']
  source = write(tmp_path / 'x.csv', 'path,label,split', *rows)
  assert len(sources.load(source, holdout=0).train) == 2
  again = f'{name.format(folder=tmp_path)},b,test'
  source = write(tmp_path / 'x.csv', 'path,label,split', *rows, again)
  assert f'x.csv lists {tmp_path}/x/../2.png in train and in test' in error_of(source)


def test_what_is_listed_again_is_not_held_out(tmp_path):
  """Where nothing is held out, an image may count more by it."""
  rows = [f'{i}.png,{"ab"[i % 2]}' for i in range(10)]
  source = write(tmp_path / 'x.csv', 'path,label', *rows, rows[3], './4.png,a')
  assert len(sources.load(source, holdout=0).train) == 12
  with pytest.raises(UserError, match='has 2 images again, and of which images train_share=0.5 wo'):
    sources.load(source, holdout=0, train_share=0.5)
  for held_out in ({}, {'holdout': 0, 'test_holdout': 0.2}):
    with pytest.raises(UserError, match='has 2 images again, which might be held out and'):
      sources.load(source, **held_out)


def test_no_file_is_named():
  assert error_of('csv:') == "source 'csv:' names no file: csv:FILE is needed"
