"""The page that a recipe leaves: one file that needs no network."""

import html
import io
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Readable on white and on black.
COLORS = ('#3d7edb', '#e0701b', '#2f9e6e', '#a55bd0')
# Stands for the colour of the page's text, light or dark.
TEXT = '#0a0b0c'
STYLE = {
  'font.size': 10,
  'text.color': TEXT,
  'axes.labelcolor': TEXT,
  'axes.edgecolor': TEXT,
  'xtick.color': TEXT,
  'ytick.color': TEXT,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': TEXT,
  'grid.alpha': 0.12,
}


def size(count: float) -> str:
  """A number of bytes with three digits and a unit.

  >>> size(0), size(999), size(3_413_504), size(5e12)
  ('0 B', '999 B', '3.41 MB', '5 TB')
  """
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 999.5:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'


def duration(seconds: float) -> str:
  """Milliseconds, seconds or minutes.

  >>> duration(0.2801), duration(12.34), duration(61)
  ('280 ms', '12.3 s', '1 min 1 s')
  """
  if seconds < 1:
    return f'{1000 * seconds:.3g} ms'
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes} min {seconds} s'


def over_time(axes, label: str) -> None:
  """Makes the x axis one of seconds, logarithmic, with 1, 2 and 5 in words."""
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(lambda value, _: duration(value))
  axes.set_xlabel(label)


def html_table(columns, cells) -> str:
  """An HTML table of plain text."""

  def line(tag, row):
    return ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)

  body = ''.join(f'<tr>{line("td", row)}</tr>\n' for row in cells)
  return (
    '<div class="scroll"><table>\n'
    f'<thead><tr>{line("th", columns)}</tr></thead>\n'
    f'<tbody>\n{body}</tbody>\n</table></div>'
  )


def svg(draw, what: Any, label: str, height: float = 4.0) -> str:
  """What ``draw`` draws, as an SVG element in the page's text colour."""
  file = io.StringIO()
  # Names inside differ between the figures of a page, not between reports.
  with matplotlib.rc_context({**STYLE, 'svg.hashsalt': label}):
    # A figure made without pyplot needs no display and no backend.
    figure = Figure(figsize=(8, height), layout='constrained')
    draw(figure.subplots(), what)
    figure.savefig(file, format='svg', transparent=True)
  text = file.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  # HTML knows these names without being told where they are defined.
  text = re.sub(r' xmlns(:\w+)?="[^"]*"', '', text)
  text = text.replace(TEXT, 'currentColor')
  return text.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)


def page(title: str, body: str) -> str:
  """A whole page.

  Args:
    title: one line of text.
    body: HTML.

  Returns:
    HTML, styled for light and dark.
  """
  return _PAGE.format(title=html.escape(title), body=body)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
  :root {{
    --page: #fcfcfb; --text: #1d1f23; --quiet: #5d636d; --line: #dfe1e5;
    --card: #ffffff;
  }}
  @media (prefers-color-scheme: dark) {{
    :root {{
      --page: #131519; --text: #e4e6ea; --quiet: #9aa1ac; --line: #30343c;
      --card: #1a1d22;
    }}
  }}
  body {{
    max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem;
    background: var(--page); color: var(--text);
    font: 1rem/1.55 system-ui, sans-serif;
  }}
  h1 {{ margin: 0 0 .5rem; font-size: 1.6rem; line-height: 1.25; }}
  h2 {{ margin: 2.5rem 0 .75rem; font-size: 1.1rem; }}
  p {{ margin: 0 0 1.25rem; color: var(--quiet); }}
  figure {{
    margin: 0; padding: 1rem; background: var(--card);
    border: 1px solid var(--line); border-radius: .5rem;
  }}
  svg {{ display: block; width: 100%; height: auto; }}
  .scroll {{ overflow-x: auto; }}
  table {{
    width: 100%; border-collapse: collapse; font-size: .92rem;
    font-variant-numeric: tabular-nums;
  }}
  th, td {{
    padding: .4rem .5rem; border-bottom: 1px solid var(--line);
    text-align: right; white-space: nowrap;
  }}
  th {{ color: var(--quiet); font-weight: 600; }}
  th:first-child, td:first-child {{ padding-left: 0; text-align: left; }}
  .facts :is(th, td) {{ text-align: left; }}
  .facts td:last-child {{ white-space: normal; overflow-wrap: anywhere; }}
  .units {{ margin-top: .5rem; font-size: .85rem; }}
  figure + .scroll {{ margin-top: 1rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
