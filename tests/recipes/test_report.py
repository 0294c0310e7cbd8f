"""The report of the language model, of odd runs too."""

import doctest
import json
import math

import record
import report

import jaxdist as jd


def test_report_doctests():
  assert doctest.testmod(report).failed == 0


def test_report_survives_odd_runs(tmp_path):
  row = jd.Collective(
    'all-reduce', 'float32', (3,), 12, 12.0, 'data', 'inside a host', 2, 1.0, ''
  )
  line = {'step': 1, 'loss': math.nan, 'bytes_sent': 12, 'step_seconds': 1.0}
  diverged = {'val_loss': math.inf, 'run': 'dense', 'seconds': 2.0}
  folder = record.Folder(tmp_path)
  folder.append({**line, **diverged}, sync=False)

  def refuse(constant):
    raise AssertionError(f'{constant} is no JSON')

  written = folder.metrics.read_text()
  assert json.loads(written, parse_constant=refuse)['val_loss'] is None
  (line,) = folder.load_lines('dense')
  assert math.isnan(line['loss']) and math.isnan(line['val_loss'])
  odd = [
    record.Run(
      name, [{**line, 'run': name, 'bytes_sent': sent}], jd.Traffic(rows)
    )
    for name, sent, rows in (('dense', 12, (row,)), ('<silent>', 0, ()))
  ]
  report.write(tmp_path / 'page.html', odd, '<title>', {'a': 1})
  page = (tmp_path / 'page.html').read_text()
  assert 'sends nothing' in page and '&lt;silent&gt;' in page
  assert '<silent>' not in page
