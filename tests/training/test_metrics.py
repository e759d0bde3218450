"""metrics.jsonl, TensorBoard events, and what the terminal shows."""

import io
import json
import re
import struct
import types

import pytest

from cvt_flax.training import progress
from cvt_flax.training.metrics import MetricWriter, read_metrics
from cvt_flax.training.progress import Progress


def write_lines(folder, steps, start=0, value=0.0, tensorboard=False):
  writer = MetricWriter(folder, start, tensorboard)
  for step in steps:
    writer.write(step, step / 10, {'train/loss': value + step})
  writer.close()


def steps_and_losses(folder):
  return [(line['step'], line['train/loss']) for line in read_metrics(folder / 'metrics.jsonl')]


# metrics.jsonl.


def test_a_line_is_one_json_object(tmp_path):
  writer = MetricWriter(tmp_path, 0, tensorboard=False)
  writer.write(7, 1 / 3, {'train/loss': 0.5, 'val/images': 20, 'val/per_class': [0.5, None]})
  # It is there before the file is closed: a killed run leaves what it wrote.
  text = (tmp_path / 'metrics.jsonl').read_text()
  writer.close()
  assert text.endswith('\n') and text.count('\n') == 1
  assert list(json.loads(text).items()) == [
    ('step', 7),
    ('epoch', 0.3333),
    ('train/loss', 0.5),
    ('val/images', 20),
    ('val/per_class', [0.5, None]),
  ]
  assert not (tmp_path / 'tensorboard').exists()


def test_a_number_that_is_not_finite_is_null(tmp_path):
  """NaN and Infinity are no JSON: a strict reader would refuse the file."""
  writer = MetricWriter(tmp_path, 0, tensorboard=True)
  values = {'a': float('nan'), 'b': float('inf'), 'c': float('-inf'), 'd': None, 'e': 1.5}
  writer.write(1, 0, values)
  writer.close()

  def refuse(constant):
    raise AssertionError(constant)

  line = json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
  assert line == {'step': 1, 'epoch': 0, 'a': None, 'b': None, 'c': None, 'd': None, 'e': 1.5}
  assert [name for _, name, _ in scalars(tmp_path)] == ['e']


def test_there_are_no_metrics_where_there_is_no_file(tmp_path):
  assert read_metrics(tmp_path / 'metrics.jsonl') == []


def test_on_resume_the_file_is_cut_back_to_the_restored_step(tmp_path):
  write_lines(tmp_path, [5, 10, 10, 15, 20])
  write_lines(tmp_path, [15], start=10, value=100)
  assert steps_and_losses(tmp_path) == [(5, 5.0), (10, 10.0), (10, 10.0), (15, 115.0)]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']  # nothing temporary is left


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path):
  write_lines(tmp_path, [5])
  write_lines(tmp_path, [])
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


@pytest.mark.parametrize('kept', range(1, 40, 6))
def test_a_torn_last_line_is_left_out(tmp_path, kept):
  """A kill may come after any byte of it."""
  write_lines(tmp_path, [5, 10])
  path = tmp_path / 'metrics.jsonl'
  last = '{"step": 11, "epoch": 1.1, "train/loss": 11.0}'
  path.write_text(path.read_text() + last[:kept])
  assert steps_and_losses(tmp_path) == [(5, 5.0), (10, 10.0)]
  write_lines(tmp_path, [11], start=10)
  assert steps_and_losses(tmp_path) == [(5, 5.0), (10, 10.0), (11, 11.0)]
  assert path.read_text().count('\n') == 3


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path):
  write_lines(tmp_path, [5, 10])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text().removesuffix('\n'))
  write_lines(tmp_path, [15], start=10)
  assert steps_and_losses(tmp_path) == [(5, 5.0), (10, 10.0), (15, 15.0)]


# TensorBoard.


def events(folder):
  """Returns all TensorBoard events of a run, in the order they were written."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted((folder / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # TFRecord: length uint64, its checksum uint32, the record, its checksum uint32
      (length,) = struct.unpack('<Q', data[:8])
      found.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def scalars(folder):
  return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_tensorboard_gets_the_scalars(tmp_path):
  writer = MetricWriter(tmp_path, 0, tensorboard=True)
  values = {'val/top1': 0.5, 'val/images': 20, 'val/per_class': [0.5, 0.25], 'rate': None}
  writer.write(3, 1.5, values)
  writer.close()
  assert scalars(tmp_path) == [(3, 'val/top1', 0.5), (3, 'val/images', 20.0)]


def test_tensorboard_is_told_what_a_resumed_run_takes_back(tmp_path):
  from tensorboardX.proto.event_pb2 import SessionLog

  def purges():
    logs = [e for e in events(tmp_path) if e.HasField('session_log')]
    return [e.step for e in logs if e.session_log.status == SessionLog.START]

  write_lines(tmp_path, [5, 10, 15], tensorboard=True)
  assert purges() == [1]  # a run may have been killed before its first checkpoint
  write_lines(tmp_path, [15], start=10, value=100, tensorboard=True)
  assert purges()[-1] == 11
  assert (15, 'train/loss', 115.0) in scalars(tmp_path)


# The terminal.


class Clock:
  now = 1000.0

  def perf_counter(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress, 'time', types.SimpleNamespace(perf_counter=clock.perf_counter))
  return clock


def take_steps(shown, clock, steps, seconds, loss=0.5):
  for step in steps:
    clock.now += seconds
    shown.step(step, loss)


def test_a_log_gets_one_plain_line_an_interval(clock):
  stream = io.StringIO()
  shown = Progress(total_steps=300, steps_per_epoch=100, batch_size=64, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 21), seconds=0.5)
  assert stream.getvalue() == ''  # steps alone write nothing
  shown.interval(20, 0.12345)
  shown.say('epoch 1  validation')
  assert stream.getvalue() == (
    'epoch 0.20/3  step 20/300  loss 0.1235  128 images/s  2:20 left\nepoch 1  validation\n'
  )


def test_a_log_says_soon_how_long_it_will_take(clock):
  stream = io.StringIO()
  shown = Progress(total_steps=300, steps_per_epoch=100, batch_size=64, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 31), seconds=1.0)
  assert stream.getvalue() == 'epoch 0.11/3  step 11/300  64 images/s  4:49 left\n'


def test_a_terminal_gets_one_line_that_is_written_over_about_once_a_second(clock):
  stream = Terminal()
  shown = Progress(total_steps=300, steps_per_epoch=100, batch_size=64, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 41), seconds=0.25)  # ten seconds
  text = stream.getvalue()
  assert '\n' not in text
  lines = text.split('\r\x1b[K')[1:]
  assert len(lines) == 8  # every fifth step: more than a second after the one before
  assert lines[-1] == 'epoch 0.40/3  step 40/300  loss 0.5000  256 images/s  1:05 left'
  shown.interval(40, 0.5)
  assert stream.getvalue() == text  # the line is there already
  shown.say('done')
  assert stream.getvalue() == text + '\r\x1b[Kdone\n'
  shown.end()
  assert stream.getvalue().endswith('done\n')  # it stays, and what comes next has its own line
  take_steps(shown, clock, [41], seconds=2.0)
  shown.end()
  assert stream.getvalue().endswith(' left\n')


@pytest.mark.parametrize(
  ('columns', 'line'),
  [
    (100, 'epoch 0.40/3  step 40/300  loss 0.5000  256 images/s  1:05 left'),
    (60, 'epoch 0.40/3  loss 0.5000  256 images/s  1:05 left'),
    (40, 'epoch 0.40/3  256 images/s  1:05 left'),
    (24, 'epoch 0.40/3  1:05 left'),
    (12, 'epoch 0.40/'),
  ],
)
def test_a_narrow_terminal_gets_what_fits(clock, monkeypatch, columns, line):
  monkeypatch.setenv('COLUMNS', str(columns))
  stream = Terminal()
  shown = Progress(total_steps=300, steps_per_epoch=100, batch_size=64, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 41), seconds=0.25)
  assert stream.getvalue().split('\r\x1b[K')[-1] == line


def test_a_terminal_that_cannot_write_over_a_line_gets_a_log(clock, monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  stream = Terminal()
  shown = Progress(total_steps=300, steps_per_epoch=100, batch_size=64, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 41), seconds=0.25)
  shown.interval(40, 0.5)
  assert stream.getvalue().startswith('epoch 0.40/3') and stream.getvalue().endswith('left\n')


def test_what_is_not_a_training_step_does_not_count(clock):
  shown = Progress(300, 100, 64, io.StringIO())
  clock.now += 100  # compilation
  shown.start()
  take_steps(shown, clock, range(1, 11), seconds=0.5)
  clock.now += 50  # an evaluation
  shown.start()
  take_steps(shown, clock, range(11, 21), seconds=0.5)
  assert shown.images_per_second() == pytest.approx(128)


def test_the_rate_is_that_since_the_last_call(clock):
  shown = Progress(300, 100, 64, io.StringIO())
  take_steps(shown, clock, [1], seconds=60)  # it compiles; the clock was not started
  assert shown.images_per_second() is None
  shown.start()
  take_steps(shown, clock, range(1, 11), seconds=0.5)
  assert shown.images_per_second() == pytest.approx(128)
  assert shown.images_per_second() is None
  take_steps(shown, clock, range(11, 16), seconds=0.25)
  assert shown.images_per_second() == pytest.approx(256)


def test_the_time_left_goes_by_all_steps_of_the_run(clock):
  stream = io.StringIO()
  shown = Progress(total_steps=100, steps_per_epoch=50, batch_size=10, stream=stream)
  shown.start()
  take_steps(shown, clock, range(1, 11), seconds=1)
  shown.images_per_second()
  take_steps(shown, clock, range(11, 21), seconds=3)
  shown.interval(20, 1.0)
  assert '  5 images/s  2:40 left' in stream.getvalue()  # 80 steps of two seconds


def test_the_rate_is_a_share_of_what_the_devices_can_do(clock):
  stream = io.StringIO()
  shown = Progress(100, 50, 10, stream, image_share=0.02)
  shown.start()
  take_steps(shown, clock, range(1, 11), seconds=0.5)
  shown.interval(10, 1.0)
  assert '  20 images/s  40.0% MFU  0:45 left' in stream.getvalue()


def test_a_resumed_run_counts_only_its_own_steps(clock):
  stream = io.StringIO()
  shown = Progress(total_steps=100, steps_per_epoch=50, batch_size=10, stream=stream)
  shown.start()
  take_steps(shown, clock, range(91, 96), seconds=2)
  shown.interval(95, 1.0)
  assert re.search(r'step 95/100 .* 5 images/s  0:10 left', stream.getvalue())


def test_before_the_first_step_there_is_no_rate(clock):
  stream = io.StringIO()
  Progress(100, 50, 10, stream).interval(0, 1.0)
  assert stream.getvalue() == 'epoch 0.00/2  step 0/100  loss 1.0000\n'


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0:00'),
    (59.4, '0:59'),
    (59.6, '1:00'),
    (3599.4, '59:59'),
    (3599.6, '1:00:00'),
    (360_000, '100:00:00'),
    (3_723, '1:02:03'),
  ],
)
def test_the_time_left_in_words(clock, seconds, text):
  stream = io.StringIO()
  shown = Progress(total_steps=2, steps_per_epoch=1, batch_size=1, stream=stream)
  shown.start()
  take_steps(shown, clock, [1], seconds=seconds or 1e-3)
  shown.interval(1, 0.0)
  assert stream.getvalue().endswith(f'  {text} left\n')


def test_without_a_stream_it_writes_to_standard_output(capsys):
  Progress(2, 1, 1).say('hello')
  assert capsys.readouterr().out == 'hello\n'
