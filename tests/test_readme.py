"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.S)


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_example_runs(number, capsys):
  if 'elastic' in BLOCKS[number]:
    pytest.importorskip('ray', reason='needs jaxdist[ray]')
  exec(BLOCKS[number], {})
  if 'traffic' in BLOCKS[number]:
    assert 'all-gather' in capsys.readouterr().out


def test_all_examples_were_found():
  assert len(BLOCKS) == 7
