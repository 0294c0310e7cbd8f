"""The README's Python runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.S)


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_example_runs(number, capsys):
  block = BLOCKS[number]
  if 'elastic' in block:
    pytest.importorskip('ray', reason='needs jaxdist[ray]')
    # Functions whose types are checked, as here, cannot be sent to others.
    subprocess.run([sys.executable, '-c', block], check=True, timeout=300)
    return
  exec(block, {})
  if 'traffic' in block:
    assert 'all-gather' in capsys.readouterr().out


def test_all_examples_were_found():
  assert len(BLOCKS) == 7
