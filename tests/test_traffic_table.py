"""How traffic is printed."""

import builtins
import io
import textwrap

import pytest

import jaxdist as jd


def row(**changes):
  values = {
    'kind': 'all-reduce',
    'dtype': 'float32',
    'shape': (1000, 3),
    'operand_bytes': 12000,
    'bytes_sent': 21000.0,
    'axis': 'data',
    'link': 'chip links',
    'group_size': 8,
    'times': 1.0,
    'source': 'psum',
  }
  return jd.Collective(**{**values, **changes})


TABLE = jd.Traffic(
  (
    row(start=0.2, end=0.7),
    row(times=0.2, in_unknown_branch=True),
    row(start=0.9, end=1.0),
    row(shape=(), operand_bytes=4, bytes_sent=16 / 3, group_size=3),
  )
)


def test_text():
  assert str(TABLE) == textwrap.dedent("""\
    collective  dtype    shape   axis  link        group   bytes  times  count  bytes a step  overlap  source
    all-reduce  float32  1000x3  data  chip links      8  21,000      1      2        42,000      30%  psum
    all-reduce  float32  1000x3  data  chip links      8  21,000   0.2?      1         4,200       0%  psum
    all-reduce  float32  scalar  data  chip links      3    5.33      1      1          5.33       0%  psum
    A device sends 46,205.33 bytes a step (chip links: 46,205.33).
    ? in a branch of unknown frequency, counted as always taken""")  # noqa: E501


def test_rich_text():
  rich = pytest.importorskip('rich.console')
  console = rich.Console(width=160, record=True, file=io.StringIO())
  console.print(TABLE)
  console.print(jd.Traffic(()))
  text = console.export_text()
  assert '46,205.33 bytes' in text
  assert '0.2?' in text
  assert 'nothing is sent' in text


def test_text_without_rich(monkeypatch):
  real_import = builtins.__import__

  def without_rich(name, *args, **kwargs):
    if name.split('.')[0] == 'rich':
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without_rich)
  assert '46,205.33 bytes' in str(TABLE)
