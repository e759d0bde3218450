"""colab/cvt_flax.ipynb, from its first cell to its last, in small."""

import base64
import io
import pathlib

import jupytext
import nbclient
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope='module')
def executed(quick_env, tmp_path_factory):
  """The notebook after CVT_SMOKE=1 of it, in a process and a folder of its own, and that folder."""
  folder = tmp_path_factory.mktemp('notebook')
  # As in conftest.py: a torchvision that does not fit is none.
  start = folder / 'ipython' / 'profile_default' / 'startup' / 'start.py'
  start.parent.mkdir(parents=True)
  start.write_text("import sys; sys.modules['torchvision'] = None\n")
  (folder / 'here').mkdir()
  env = dict(quick_env)
  env |= {'CVT_SMOKE': '1', 'IPYTHONDIR': str(folder / 'ipython'), 'HF_HUB_OFFLINE': '1'}
  env.pop('MPLBACKEND')
  notebook = jupytext.read(ROOT / 'colab' / 'cvt_flax.ipynb')
  resources = {'metadata': {'path': str(folder / 'here')}}
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources=resources
  ).execute(env=env)
  return notebook, folder / 'here'


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_no_cell_is_left_out_and_none_warns(executed):
  for cell in code(executed[0]):
    assert cell.execution_count
    for output in cell.outputs:
      text = output.get('text', '')
      lines = [line for line in text.splitlines() if 'TqdmWarning' not in line]  # of ipywidgets
      assert output.output_type != 'error' and not any('Warning' in x for x in lines), text


def test_where_all_is_installed_nothing_is(executed):
  assert code(executed[0])[0].outputs == []


def test_every_picture_is_one(executed):
  shown = 0
  for cell in code(executed[0]):
    for output in cell.outputs:
      if 'image/png' in output.get('data', {}):
        with Image.open(io.BytesIO(base64.b64decode(output.data['image/png']))) as image:
          low_high = image.convert('L').getextrema()
        assert low_high[1] - low_high[0] > 100  # and not an empty sheet
        shown += 1
      else:
        assert '<Figure' not in output.get('data', {}).get('text/plain', '')
  assert shown == 14


def test_it_leaves_what_it_promises(executed):
  work = executed[1] / 'runs' / 'notebook'
  assert {p.name for p in executed[1].iterdir()} == {'runs'}
  for path in (
    'weights/model.safetensors',
    'digits/report/index.html',
    'own_images/report/index.html',
    'huggingface/config.json',
  ):
    assert (work / path).is_file(), path
  assert list((work / 'trace').rglob('*.xplane.pb'))


def test_a_run_goes_on_where_it_was(executed):
  said = [''.join(output.get('text', '') for output in cell.outputs) for cell in code(executed[0])]
  assert any('going on from step 76' in text for text in said)
