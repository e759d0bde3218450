"""What the documents name is there: files, headings, configs and their variants, config keys."""

import pathlib
import re

import pytest

from cvt_flax.training import command_help
from cvt_flax.training.config import keys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
  path
  for pattern in ('*.md', 'docs/*.md', 'benchmarks/**/*.md', 'cvt_flax/**/*.md')
  for path in ROOT.glob(pattern)
)
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request):
  return request.param


def anchors(path):
  """Returns the names that GitHub gives the headings of a document."""
  headings = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_links_lead_somewhere(document):
  for link in re.findall(r'\]\((?!https?:)([^)\s]+)\)', document.read_text()):
    name, _, anchor = link.partition('#')
    target = document.parent / name if name else document
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('file', [*DOCUMENTS, *CONFIGS], ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_and_their_variants_are_there(file):
  for name, variant in re.findall(r'(\w+)\.py(?::(\w+))?', file.read_text()):
    config = ROOT / 'configs' / f'{name}.py'
    if config.is_file():
      assert not variant or variant in command_help.variants_of(config), f'{name}:{variant}'
    else:
      assert not variant, f'{name}:{variant}'
  for name in re.findall(r'configs/(\w+)\.py', file.read_text()):
    assert name == 'NAME' or (ROOT / 'configs' / f'{name}.py').is_file(), name


def test_config_keys_are_there(document):
  known = {name for name, _, _ in keys()}
  for name in re.findall(r'--config\.([a-z0-9_.]+)', document.read_text()):
    assert name.rstrip('.') in known, name
