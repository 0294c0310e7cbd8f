"""Trains a byte-level transformer with 8 workers, dense and then compressed.

  python recipes/lm.py

No download: the text is the source of Python's standard library. No
accelerator: a CPU is divided into 8 devices, and what the workers send is read
from the program compiled for them. On two cores it takes 5 to 6 minutes and
ends with 59 times fewer bytes at a validation loss 1.5% above dense (1.264 and
1.245 nats a byte).
"""

import contextlib
import dataclasses
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import jax
import methods
import numpy as np
import optax
import record
import report
import text
import tyro
from flax import nnx
from model import Transformer, next_byte_loss
from place import AXIS, find_place, prepare_devices
from record import Folder, Run
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

import jaxdist as jd

# What the text says counts, not where it lies.
FREE = ('data', 'out', 'resume', 'overwrite', 'keep_going')
VALIDATION_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  method: Annotated[
    str,
    tyro.conf.arg(
      metavar='NAME',
      help=f'What to compare with dense.\n\n{methods.described()}\n\n',
    ),
  ] = 'local-sgd'
  data: Annotated[
    Path | None,
    tyro.conf.arg(
      metavar='PATH',
      help='Text to train on: a file or a folder.',
      help_behavior_hint="(default: the source of Python's standard library)",
    ),
  ] = None
  out: Path = Path('out/lm')
  """Folder for metrics, checkpoints and the report."""
  resume: bool = False
  """Go on with the comparison in --out."""
  overwrite: bool = False
  """Replace the comparison in --out."""
  steps: int = 1400
  """Optimizer steps of each run."""
  workers: Annotated[
    int | None,
    tyro.conf.arg(
      metavar='INT',
      help='Data-parallel workers; simulated on one device if there are fewer '
      'devices.',
      help_behavior_hint='(default: one a device; 8 on a CPU or one device)',
    ),
  ] = None
  batch: int = 4
  """Sequences a worker a step."""
  length: int = 128
  """Bytes in a sequence."""
  lr: Annotated[
    float | None,
    tyro.conf.arg(
      metavar='FLOAT',
      help='Peak learning rate of both runs.',
      help_behavior_hint='(default: what suits each method)',
    ),
  ] = None
  seed: int = 0
  """Fixes the initial parameters and the order of the data."""
  every_eval: int = 100
  """Steps between validations; each is followed by a checkpoint."""
  keep_going: bool = False
  """Train on, with a warning, when --out cannot be written to (disk full)."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""
  heads: int = 4
  """Attention heads."""


def check(config: Config) -> None:
  """Refuses what cannot work, before anything starts."""
  methods.find(config.method)
  for name in (
    *('steps', 'batch', 'length', 'every_eval', 'layers', 'width', 'heads'),
    *(['workers'] if config.workers is not None else []),
  ):
    value = getattr(config, name)
    if value < 1:
      flag = name.replace('_', '-')
      raise ValueError(f'--{flag} must be at least 1, got {value}.')
  if config.width % (2 * config.heads):
    raise ValueError(
      '--width must be an even multiple of --heads, got '
      f'{config.width} and {config.heads}.'
    )
  if config.lr is not None and not 0 < config.lr < math.inf:
    raise ValueError(f'--lr must be positive, got {config.lr}.')
  # JAX drops the bits of a seed above 32.
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'--seed must be in [0, 2**32), got {config.seed}.')
  if config.resume and config.overwrite:
    raise ValueError('--resume and --overwrite exclude each other.')


def train(
  config: Config,
  method: str | methods.Method,
  data: text.Text,
  folder: Folder | None = None,
  watch: Callable[[dict[str, Any]], bool | None] = lambda line: None,
) -> Run:
  """Trains one model with one method, and prints nothing.

  An experiment may call it many times::

    prepare_devices(8)
    data = text.load(None)
    runs = [train(Config(seed=seed), 'dense', data) for seed in range(3)]

  Args:
    config: the command line; ``config.method`` is not read.
    method: a name in ``methods.METHODS``, or a method of an experiment's own.
    data: what to read.
    folder: where to keep metrics and checkpoints, and to go on from its newest
      checkpoint; None to keep nothing.
    watch: shown the metrics of each step; training stops if it returns True.

  Returns:
    The run; it is whole if it has ``config.steps`` lines.
  """
  if isinstance(method, str):
    method = methods.find(method)
  name = method.name
  place = find_place(config.workers)
  rows = config.batch * place.workers
  batches = text.training_batches(data, config.length, rows, config.seed)
  held_out = place.put(
    text.validation_rows(data, config.length, place.workers, VALIDATION_ROWS)
  )

  model = Transformer(
    config.layers, config.width, config.heads, nnx.Rngs(config.seed)
  )
  graphdef, params = nnx.split(model, nnx.Param)

  def loss_fn(params, batch):
    return next_byte_loss(nnx.merge(graphdef, params), batch)

  peak = config.lr or method.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=config.steps // 10,
    decay_steps=config.steps,
    end_value=0.05 * peak,
  )
  tx = method.build(AXIS, schedule)
  state = jd.init(tx, params, **place.arguments())
  step_fn = jd.train_step(loss_fn, tx, **place.arguments())
  step_fn = step_fn.lower(state, place.put(batches[0])).compile()
  evaluate = jax.jit(lambda state, rows: loss_fn(jd.mean_params(state), rows))

  if place.mesh is not None:
    traffic = jd.traffic(step_fn)
  else:
    counted = place._replace(mesh=place.counted_on)
    traffic = jd.traffic(
      jd.train_step(loss_fn, tx, **counted.arguments()),
      jd.init(tx, jax.eval_shape(lambda: params), **counted.arguments()),
      counted.put(batches[0]),
    )

  run = Run(name, [], traffic)
  first = 0
  if folder:
    checkpoints = folder.checkpoints(name)
    first = jd.latest_step(checkpoints) or 0
    if first:
      state = jd.restore(checkpoints, state)
      # An older one, if the newest was damaged.
      first = jd.latest_step(checkpoints)
    run.lines = folder.truncate(name, first)
    folder.save_traffic(run)
  before = run.seconds if run.lines else 0.0
  started = time.perf_counter()

  for index in range(first, config.steps):
    began = time.perf_counter()
    state, metrics = step_fn(state, place.put(batches[index]))
    loss = float(np.mean(metrics['loss']))
    line = {
      'run': name,
      'step': index + 1,
      # JSON has no NaN; such a step is skipped by all workers together.
      'loss': loss if math.isfinite(loss) else None,
      'bytes_sent': round((index + 1) * traffic.bytes_a_step),
      'step_seconds': time.perf_counter() - began,
      'skipped': int(np.max(metrics['skipped'])),
      'seconds': before + time.perf_counter() - started,
    }
    last = index + 1 == config.steps
    evaluated = last or (index + 1) % config.every_eval == 0
    if evaluated:
      line['val_loss'] = float(evaluate(state, held_out))
    run.lines.append(line)
    stop = watch(line)
    if folder:
      save = evaluated or stop
      folder.append(line, sync=save)
      if save:
        folder.save(name, index + 1, state)
    if stop:
      break
  return run


class Interrupt:
  """Ctrl-C ends the run after the current step; the second one ends it now."""

  def __init__(self, console: Console):
    self.asked = False
    self.console = console
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self.ask)

  def ask(self, number, frame) -> None:
    del frame
    self.asked = True
    signal.signal(number, signal.SIG_DFL)
    self.console.show_cursor(True)  # In case that the second one follows.
    self.console.print('Stopping after this step. Ctrl-C again quits at once.')


def compare(config: Config, data: text.Text, folder: Folder) -> bool:
  """Trains dense and then the method, with a progress bar.

  Args:
    config: the command line.
    data: what to read.
    folder: what to write.

  Returns:
    Whether all is done; if not, the user wants to go on later.
  """
  console = Console()
  interrupt = Interrupt(console)
  place = find_place(config.workers)
  console.print(f'{place.words}. Text: {data}.', highlight=False)
  progress = Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn('{task.fields[words]}'),
    TimeRemainingColumn(),
    TextColumn('left'),
    console=console,
  )
  runs = []
  for name in run_names(config):
    done = jd.latest_step(folder.checkpoints(name)) or 0
    if done == config.steps:
      runs.append(folder.load(name))
      console.print(f'{name}: finished before.', highlight=False)
      continue
    if interrupt.asked:
      return False
    task = progress.add_task(
      name, total=config.steps, completed=done, words='compiling'
    )

    def watch(line, name=name, task=task):
      loss = math.nan if line['loss'] is None else line['loss']
      words = f'loss {loss:.3f}, {report.size(line["bytes_sent"])} sent'
      progress.update(task, completed=line['step'], words=words)
      if 'val_loss' in line:
        console.print(
          f'{name} step {line["step"]}: {words}, '
          f'validation loss {line["val_loss"]:.4f}',
          highlight=False,
        )
      return interrupt.asked

    with progress:
      runs.append(train(config, name, data, folder, watch))
    progress.remove_task(task)
    if len(runs[-1].lines) < config.steps:
      return False

  console.print(report.terminal_table(runs, place.words))
  page = folder.path / 'report.html'
  title = f'{config.method} and dense data parallel, {place.workers} workers'
  report.write(page, runs, title, settings(config, data) | versions())
  console.print(f'Report: {page}', highlight=False)
  return True


def run_names(config: Config) -> list[str]:
  """Dense first, and once only if it is also the method."""
  return list(dict.fromkeys([methods.DENSE, config.method]))


def settings(config: Config, data: text.Text) -> dict[str, Any]:
  """All that decides the numbers: a comparison goes on only with the same."""
  fields = dataclasses.asdict(config)
  place = find_place(config.workers)
  return {
    **{name: value for name, value in fields.items() if name not in FREE},
    'workers': place.workers,
    'lr': {
      name: config.lr or methods.find(name).learning_rate
      for name in run_names(config)
    },
    'devices': place.words,
    'text': str(data),
  }


def versions() -> dict[str, str]:
  """What ran."""
  found = {
    'python': platform.python_version(),
    'platform': platform.platform(),
  }
  for name in ('jaxdist', 'jax', 'flax', 'optax'):
    # It can also run from a checkout.
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  with contextlib.ExitStack() as stack:
    try:
      check(config)
      prepare_devices(config.workers)
      data = text.load(config.data)
      workers = find_place(config.workers).workers
      text.check(data, config.length, config.batch * workers, workers)
      stack.enter_context(record.locked(config.out))
      folder = Folder(config.out, config.keep_going)
      folder.open(settings(config, data), config.resume, config.overwrite)
    except ValueError as error:
      sys.exit(f'lm.py: {error}')
    done = compare(config, data, folder)
  if not done:
    again = [word for word in sys.argv if word != '--overwrite']
    again += ['--resume'] if '--resume' not in again else []
    print(f'Saved. To go on:\n  python {shlex.join(again)}')
    sys.exit(128 + signal.SIGINT)


if __name__ == '__main__':
  main()
