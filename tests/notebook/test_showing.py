"""What a notebook shows: cvt_flax.notebook."""

import re
import types
import zipfile

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cvt_flax import create_model, get_config, notebook
from cvt_flax.data.sources import load
from cvt_flax.errors import UserError
from cvt_flax.predict import Prediction
from cvt_flax.training.look import training_images

LINES = [
  {'step': 5, 'epoch': 0.5, 'train/loss': 2.0, 'train/top1': 0.2},
  {'step': 10, 'epoch': 1.0, 'val/loss': 1.5, 'val/top1': 0.4},
  {'step': 20, 'epoch': 2.0, 'train/loss': 1.0, 'train/top1': 0.7},
  {'step': 20, 'epoch': 2.0, 'checkpoint': 10, 'test/loss': 1.4, 'test/top1': 0.5},
]


def words(figure):
  """All text in a figure."""
  figure.draw_without_rendering()
  return {text.get_text() for text in figure.findobj(lambda x: hasattr(x, 'get_text'))}


@pytest.mark.parametrize(
  'platform, capability, dtype',
  [
    ('cpu', None, 'float32'),
    ('tpu', None, 'bfloat16'),
    ('gpu', '7.5', 'float32'),  # Colab's T4
    ('gpu', '8.0', 'bfloat16'),
    ('gpu', '12.0', 'bfloat16'),
    ('gpu', 'gfx90a', 'float32'),
  ],
)
def test_dtype_and_words_of_a_device(platform, capability, dtype, monkeypatch):
  device = types.SimpleNamespace(platform=platform, device_kind=f'a {platform}')
  if capability:
    device.compute_capability = capability
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert notebook.compute_dtype() == dtype
  said = notebook.describe_devices()
  if platform == 'cpu':
    assert 'the CPU' in said and 'Change runtime type' in said
  else:
    assert f'1 x a {platform}, in {dtype}' in said


def test_a_model_is_drawn_from_its_attributes():
  found = words(notebook.draw_model(create_model('cvt-13'), 224))
  assert {'56×56×64', '28×28×192', '14×14×384', 'conv 7×7\nstride 4', 'class\ntoken'} <= found
  assert '197 queries, 50 keys\n10 blocks, 6 heads' in found
  with pytest.raises(UserError, match='not a CompactViT'):
    notebook.draw_model(create_model('mcvit'), 32)
  assert '8×8×96' in words(notebook.draw_model('cvt-nano-cifar10'))
  assert '16×16×96' in words(notebook.draw_model('cvt-nano-cifar10', 64))
  with pytest.raises(UserError, match='image_size is needed'):
    notebook.draw_model(create_model('cvt-13'))


def test_a_drawing_says_what_the_whole_network_computes():
  found = words(notebook.draw_model(create_model('cvt-13'), 224))
  assert 'the whole network: 4,566 million multiply-adds for an image' in found


def test_attention_of_every_stage_that_has_a_choice():
  figure = notebook.draw_attention('cvt-nano-cifar10', notebook.sample_images())
  assert len(figure.axes) == 2 * 4
  for axes in figure.axes[3::4]:
    title, of, largest = axes.get_xlabel().split('\n')
    assert (title, of) == ('stage 3: 4×4 keys', 'class token')
    assert re.fullmatch(r'largest \d+\.\d×', largest)
  plain, *mapped = (axes.images[0].get_array() for axes in figure.axes[:4])
  assert plain.shape == (224, 224, 3)
  assert all(np.abs(plain.astype(int) - m).mean() > 5 for m in mapped)


def test_predictions_are_drawn_in_their_order():
  china, flower = map(str, notebook.sample_images())
  found = [
    Prediction(china, (1, 0), ('temple', '$5'), (0.75, 0.25)),
    Prediction(flower, (2, 0), ('daisy', '$5'), (0.5, 0.125)),
  ]
  figure = notebook.draw_predictions(iter(found))
  assert [[b.get_width() for b in axes.patches] for axes in figure.axes[1::2]] == [
    [0.75, 0.25],
    [0.5, 0.125],
  ]
  assert {'temple', '$5', 'daisy', '75%', '50%', 'probability'} <= words(figure)
  ends = {axes.get_xlim()[1] for axes in figure.axes[1::2]}
  assert len(ends) == 1 and 0.75 < ends.pop() < 0.9  # one scale, no longer than it has to be


def test_training_images_are_drawn_with_their_targets():
  config = get_config('digits')
  config.augment.mixup, config.augment.cutmix, config.augment.label_smoothing = 0.0, 1.0, 0.0
  config.augment.mix_prob = 1.0
  figure = notebook.draw_training_images(config, step=3, count=5)
  captions = [axes.get_xlabel() for axes in figure.axes]
  expected = training_images(config, 3)
  assert len(captions) == 5 and len({tuple(row) for row in expected.targets}) > 1
  for caption, target in zip(captions, expected.targets[:5], strict=True):
    shares = {digit: f'{share:.0%}' for digit, share in enumerate(target) if share >= 0.05}
    assert dict(line.rsplit(' ', 1) for line in caption.split('\n')) == {
      f'{digit}': share for digit, share in shares.items()
    }
  for axes, pixels in zip(figure.axes, expected.pixels[:5], strict=True):
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), pixels)


@pytest.mark.parametrize('draw', [notebook.draw_predictions, None])
def test_nothing_to_draw(draw):
  with pytest.raises(UserError, match='is given'):
    draw([]) if draw else notebook.draw_attention('cvt-nano-cifar10', [])


def test_curves_have_every_split(monkeypatch):
  live = notebook.LiveCurves()
  monkeypatch.setattr(live, '_show', lambda: None)
  for line in LINES:
    live(line)
  loss, accuracy = live.draw().axes
  points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in loss.lines}
  assert points == {
    'train': [(0.5, 2.0), (2.0, 1.0)],
    'validation': [(1.0, 1.5)],
    'test': [(1, 1.4)],
  }
  assert len(accuracy.lines) == 3
  live(LINES[0])  # another run
  assert [list(line.get_ydata()) for line in live.draw().axes[0].lines] == [[2.0]]


def test_curves_are_drawn_again_once_a_second_and_at_the_end(monkeypatch):
  live, drawn, now = notebook.LiveCurves(), [], [0.0]
  monkeypatch.setattr(live, '_show', lambda: drawn.append(now[0]))
  monkeypatch.setattr(notebook.runs.time, 'monotonic', lambda: now[0])
  for now[0], line in zip((0.0, 0.5, 1.2, 1.3), LINES, strict=True):
    live(line)
  assert drawn == [0.0, 1.2, 1.3]


def test_a_script_has_no_place_for_curves(capsys):
  live = notebook.LiveCurves()
  live({'step': 1, 'epoch': 0.5, 'train/loss': 2.0})
  assert capsys.readouterr().out == ''


def test_curves_before_the_first_line():
  assert isinstance(notebook.LiveCurves().draw(), Figure)


def test_curves_of_two_epochs_are_marked_at_whole_ones():
  live = notebook.LiveCurves()
  live._lines = LINES
  for axes in live.draw().axes:
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_figures_that_are_too_wide_stand_below_each_other(tmp_path):
  (tmp_path / 'report').mkdir()
  for name, width in (('loss', 700), ('mistakes', 600)):
    Image.new('RGBA', (width, 30), 'red').save(tmp_path / 'report' / f'{name}.png')
  pixels = np.asarray(notebook.show_report(tmp_path, 'loss', 'mistakes'))
  assert pixels.shape == (30 + 40 + 30, 700, 3)
  assert (pixels[:30] == (255, 0, 0)).all() and (pixels[30:70] == 255).all()
  assert (pixels[70:, :600] == (255, 0, 0)).all() and (pixels[70:, 600:] == 255).all()


def test_figures_of_a_report_stand_side_by_side(tmp_path):
  for name, color, size in (('loss', (255, 0, 0, 255), (30, 20)), ('mistakes', (0,) * 4, (10, 40))):
    (tmp_path / 'report').mkdir(exist_ok=True)
    for ending in ('', '-dark'):
      Image.new('RGBA', size, color).save(tmp_path / 'report' / f'{name}{ending}.png')
  shown = notebook.show_report(tmp_path, 'loss', 'mistakes')
  assert (shown.mode, shown.size) == ('RGB', (30 + 40 + 10, 40))
  pixels = np.asarray(shown)
  assert (pixels[:20, :30] == (255, 0, 0)).all()
  assert (pixels[20:] == 255).all() and (pixels[:, 30:] == 255).all()  # what is transparent too
  with pytest.raises(UserError, match=r"one of loss, mistakes is needed, did you mean 'loss'"):
    notebook.show_report(tmp_path, 'los')
  with pytest.raises(UserError, match='a name is needed: one of loss, mistakes'):
    notebook.show_report(tmp_path)
  with pytest.raises(UserError, match='holds no figures'):
    notebook.show_report(tmp_path / 'other', 'loss')


def test_steps_are_traced_between_two_lines(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder, **_: calls.append(folder))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  with notebook.trace_steps(tmp_path) as watch:
    watch({'step': 1, 'val/loss': 1.0})
    assert not calls
    watch({'step': 5, 'train/loss': 1.0})
    assert calls == [str(tmp_path)]
    watch({'step': 10, 'train/loss': 1.0})
    watch({'step': 15, 'train/loss': 1.0})
  assert calls == [str(tmp_path), 'stop']


def test_a_trace_ends_when_the_run_fails(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda *_, **__: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  with pytest.raises(KeyError), notebook.trace_steps(tmp_path) as watch:
    watch({'step': 5, 'train/loss': 1.0})
    raise KeyError
  assert calls == ['start', 'stop']


def test_the_sample_archive_is_a_data_set(tmp_path):
  notebook.write_sample_archive(tmp_path / 'a.zip', count=3, side=40)
  with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
    archive.extractall(tmp_path / 'a')
  dataset = load(f'folder:{tmp_path / "a"}', holdout=0.0)
  assert dataset.class_names == ('china', 'flower') and len(dataset.train) == 6
  with Image.open(tmp_path / 'a' / 'flower' / '002.png') as image:
    assert image.size == (40, 40)
