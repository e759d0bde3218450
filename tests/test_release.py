"""What a release is described by: CITATION.cff, CHANGELOG.md, the workflow."""

import pathlib
import re

import yaml  # which flax needs

import cvt_flax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def read(name):
  return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_has_what_cff_asks_for():
  citation = read('CITATION.cff')
  assert citation['cff-version'] == '1.2.0'
  assert {'message', 'title', 'authors'} <= citation.keys()
  assert citation['version'] == cvt_flax.__version__
  (paper,) = citation['references']
  assert {'type', 'title', 'authors'} <= paper.keys()
  assert [author['family-names'] for author in paper['authors']] == [
    'Wu', 'Xiao', 'Codella', 'Liu', 'Dai', 'Yuan', 'Zhang'
  ]  # fmt: skip


def test_the_workflow_runs_what_everyone_runs():
  workflow = read('.github/workflows/ci.yml')
  job = workflow['jobs']['everything']
  assert [step['run'] for step in job['steps'] if 'run' in step] == ['.ci/run']
  pythons = [step['with']['python-version'].split() for step in job['steps'] if 'with' in step][0]
  for version in re.search(r'for version in (.*);', (ROOT / '.ci/run').read_text())[1].split():
    assert version in pythons


def test_the_changelog_has_the_forms_sections():
  text = (ROOT / 'CHANGELOG.md').read_text()
  assert text.startswith('# Changelog\n') and '\n## [Unreleased]\n' in text
  kinds = set(re.findall(r'^### (.*)$', text, re.MULTILINE))
  assert kinds <= {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
