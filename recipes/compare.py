"""Compares methods on the language model: same text, steps and seeds.

  python recipes/compare.py
  python recipes/compare.py --methods dense diloco noloco --steps 1400

Model, text and workers are those of lm.py. Each finished run is a file in
``--out``, so that the same command goes on where it was stopped, and one with
more methods or seeds trains only what is new. After each seed ``report.html``
and ``results.json`` are written anew. A run takes about 40 seconds on two idle
cores, all methods with five seeds about an hour.
"""

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import compared
import jax
import lm
import methods
import record
import text
import tyro
from compared import Compared
from interrupt import Interrupt
from place import find_place, prepare_devices
from rich.console import Console

import jaxdist as jd

# What does not change a run.
FREE = ('methods', 'seeds', 'mbits', 'data', 'out')
HELP = (
  'What to train; the first is what the others are compared with.\n\n'
  f'{methods.described()}\n\n'
)
ALL = tuple(methods.METHODS)


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  methods: Annotated[
    tuple[str, ...],
    tyro.conf.arg(
      metavar='NAME ...',
      help=HELP,
      help_behavior_hint='(default: all)',
    ),
  ] = ALL
  seeds: int = 5
  """Runs of each method, with other initial parameters and data."""
  steps: int = 300
  """Optimizer steps of each run."""
  mbits: tuple[float, ...] = (100.0, 1000.0, 10_000.0)
  """Links to predict times for, in Mbit/s for each worker."""
  data: Annotated[
    Path | None,
    tyro.conf.arg(
      metavar='PATH',
      help='Text to train on: a file or a folder.',
      help_behavior_hint="(default: the source of Python's standard library)",
    ),
  ] = None
  out: Path = Path('out/compare')
  """Folder for the results."""
  workers: int = 8
  """Data-parallel workers."""
  batch: int = 4
  """Sequences a worker a step."""
  length: int = 128
  """Bytes in a sequence."""
  every_eval: int = 30
  """Steps between validations."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""

  def run(self, seed: int) -> lm.Config:
    """What lm.py is told."""
    fields = dataclasses.asdict(self)
    shared = {field.name for field in dataclasses.fields(lm.Config)}
    return lm.Config(
      **{name: x for name, x in fields.items() if name in shared}, seed=seed
    )


def check(config: Config) -> None:
  """Refuses what cannot work, before anything starts."""
  if not config.methods or len(set(config.methods)) < len(config.methods):
    raise ValueError(
      f'--methods must name some, each once, got {list(config.methods)}.'
    )
  if config.seeds < 1:
    raise ValueError(f'--seeds must be at least 1, got {config.seeds}.')
  if not config.mbits or not all(rate > 0 for rate in config.mbits):
    raise ValueError(f'--mbits must be positive, got {list(config.mbits)}.')
  lm.check(config.run(seed=0))


def settings(config: Config, data: text.Text) -> dict:
  """All that decides the numbers of a run."""
  fields = dataclasses.asdict(config)
  return {
    **{name: value for name, value in fields.items() if name not in FREE},
    'text': str(data),
  }


def open_folder(config: Config, data: text.Text) -> None:
  """Begins a comparison or goes on with one.

  Raises:
    ValueError: other settings were used before.
  """
  path = config.out / 'settings.json'
  now = settings(config, data)
  before = json.loads(path.read_text()) if path.exists() else now
  for name, value in now.items():
    if before.get(name) != value:
      raise ValueError(
        f'--out must hold runs of the same settings, got another {name}: '
        f'{before.get(name)} before, {value} now.'
      )
  record.replace(path, json.dumps(now, indent=2) + '\n')
  (config.out / 'runs').mkdir(exist_ok=True)
  # Seeds of a method share a program.
  jax.config.update('jax_compilation_cache_dir', str(config.out / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def run_file(config: Config, name: str, seed: int) -> Path:
  """Where a finished run is."""
  return config.out / 'runs' / f'{name}.{seed}.json'


def load(config: Config, seeds: int) -> list[Compared]:
  """What the first seeds of all methods have come to."""
  found = []
  for name in config.methods:
    runs = [
      json.loads(run_file(config, name, seed).read_text())
      for seed in range(seeds)
    ]
    found.append(Compared.of(name, runs, config.mbits))
  return found


def train_all(
  config: Config, data: text.Text, console: Console
) -> list[Compared] | None:
  """Trains what is not there yet, seed by seed, with a progress bar.

  Args:
    config: the command line.
    data: what to read.
    console: where the bar is.

  Returns:
    All methods with all seeds; None if the user wants to go on later.
  """
  interrupt = Interrupt(console, jd.World())
  place = find_place(config.workers).words
  console.print(f'{place}. Text: {data}.', highlight=False)
  facts = {**settings(config, data), 'devices': place, **lm.versions()}
  progress = lm.progress_bar(console)
  overall = progress.add_task(
    'runs', total=config.seeds * len(config.methods), words=''
  )
  with progress:
    for seed in range(config.seeds):
      for name in config.methods:
        if interrupt.asked:
          return None
        path = run_file(config, name, seed)
        if not path.exists():
          task = progress.add_task(
            f'{name}, seed {seed}', total=config.steps, words='compiling'
          )

          def watch(line, task=task):
            words = f'loss {line["loss"]:.3f}'
            progress.update(task, completed=line['step'], words=words)
            return interrupt.asked

          run = lm.train(config.run(seed), name, data, watch=watch)
          progress.remove_task(task)
          if len(run.lines) < config.steps:
            return None
          record.replace(path, record.as_line(compared.kept(run)))
          console.print(
            f'{name}, seed {seed}: {run.val_loss:.4f}', highlight=False
          )
        progress.advance(overall)
      found = load(config, seed + 1)
      compared.write(config.out, found, facts)
  return found


def compare(config: Config, recipe: str) -> list[Compared]:
  """The whole command; other recipes call it with methods of their own.

  Args:
    config: the command line.
    recipe: whose, for messages.

  Returns:
    All methods with all seeds.
  """
  console = Console()
  with contextlib.ExitStack() as stack:
    try:
      names = tuple(methods.find(name).name for name in config.methods)
      config = dataclasses.replace(config, methods=names)
      check(config)
      prepare_devices(config.workers)
      data = text.load(config.data)
      rows = config.batch * config.workers
      text.check(data, config.length, rows, config.workers)
      stack.enter_context(record.locked(config.out))
      open_folder(config, data)
    except ValueError as error:
      sys.exit(f'{recipe}: {error}')
    found = train_all(config, data, console)
  if found is None:
    print(f'Saved. To go on:\n  python {shlex.join(sys.argv)}')
    sys.exit(128 + signal.SIGINT)
  console.print(compared.terminal_table(found))
  console.print(f'Report: {config.out / "report.html"}', highlight=False)
  return found


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  compare(config, 'compare.py')


if __name__ == '__main__':
  main()
