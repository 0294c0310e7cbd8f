"""Trains a byte-level transformer with 8 workers, dense and then compressed.

  python recipes/lm.py

No download: the text is the source of Python's standard library. No
accelerator: a CPU is divided into 8 devices, and what the workers send is read
from the program compiled for them. On two cores it takes about 5 minutes and
ends with 59 times fewer bytes at a validation loss 2.4% above dense (1.274 and
1.245 nats a byte).

Over several processes, begun anew after a failure from the last checkpoint:

  python -m jaxdist.launch --processes 4 --restarts 3 recipes/lm.py
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

import methods
import numpy as np
import optax
import record
import report
import text
import tyro
from interrupt import Interrupt
from jax.experimental import multihost_utils
from place import AXIS, find_place, launch, prepare_devices
from record import Folder, Run
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)
from task import Task

import jaxdist as jd

# What the text says counts, not where it lies.
FREE = ('data', 'out', 'resume', 'overwrite', 'check_sync', 'keep_going')


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
  check_sync: int = 0
  """Steps between comparisons of all copies of the state; 0: none."""
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
  if config.check_sync < 0:
    raise ValueError(
      f'--check-sync must be at least 0, got {config.check_sync}.'
    )
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


def schedule(config: Config, peak: float) -> optax.Schedule:
  """The learning rate: up over a tenth of the steps, then down to nearly 0."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=config.steps // 10,
    decay_steps=config.steps,
    end_value=0.05 * peak,
  )


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
  task = Task.of(config, data)
  peak = config.lr or method.learning_rate
  tx = method.build(AXIS, schedule(config, peak))
  state = task.start(tx)
  step_fn, traffic = task.compile(tx, state)
  evaluate = task.evaluation()

  run = Run(name, [], traffic)
  first = 0
  if folder:
    checkpoints = folder.checkpoints(name)
    # First of all: a run that was given up saves nothing from here on.
    saver = jd.Saver(checkpoints)
    first = jd.latest_step(checkpoints) or 0
    jd.assert_same(f'the checkpoints of {name}', {'step': first})
    if first:
      state = jd.restore(checkpoints, state)
      # An older one, if the newest was damaged.
      first = jd.latest_step(checkpoints)
    run.lines = folder.truncate(name, first)
    folder.save_traffic(run)
  before = run.seconds if run.lines else 0.0
  stages = method.stages(first)
  started = time.perf_counter()

  for index in range(first, config.steps):
    began = time.perf_counter()
    state, metrics = step_fn(state, task.batch(index))
    metrics = multihost_utils.process_allgather(metrics, tiled=True)
    seconds = time.perf_counter() - began
    stages[method.stage(index)] += 1
    line = {
      'run': name,
      'step': index + 1,
      'loss': float(np.mean(metrics['loss'])),
      'bytes_sent': round(methods.total(methods.bytes_a_step, traffic, stages)),
      'step_seconds': seconds,
      'skipped': int(np.max(metrics['skipped'])),
      'seconds': before + time.perf_counter() - started,
    }
    last = index + 1 == config.steps
    evaluated = last or (index + 1) % config.every_eval == 0
    if evaluated:
      line['val_loss'] = evaluate(state)
    if config.check_sync and (index + 1) % config.check_sync == 0:
      jd.assert_in_sync(state)
    run.lines.append(line)
    stop = watch(line)
    if folder:
      save = evaluated or stop
      folder.append(line, sync=save)
      if save:
        folder.save(saver, index + 1, state)
    if stop:
      break
  return run


def progress_bar(console: Console) -> Progress:
  """A bar for each task, with words of its own."""
  return Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn('{task.fields[words]}'),
    TimeRemainingColumn(),
    TextColumn('left'),
    console=console,
  )


def compare(
  config: Config,
  data: text.Text,
  folder: Folder,
  world: jd.World,
) -> int:
  """Trains dense and then the method, with a progress bar.

  Args:
    config: the command line.
    data: what to read.
    folder: what to write.
    world: the processes.

  Returns:
    The signal by which the user wants to go on later; 0 if all is done.
  """
  console = Console(quiet=world.process != 0)
  interrupt = Interrupt(console, world)
  place = find_place(config.workers)
  console.print(f'{place.words}. Text: {data}.', highlight=False)
  progress = progress_bar(console)
  runs = []
  for name in run_names(config):
    done = jd.latest_step(folder.checkpoints(name)) or 0
    if done == config.steps:
      runs.append(folder.load(name))
      console.print(f'{name}: finished before.', highlight=False)
      continue
    if interrupt.alone and interrupt.asked:
      return interrupt.asked
    task = progress.add_task(
      name, total=config.steps, completed=done, words='compiling'
    )

    def watch(line, name=name, task=task):
      words = f'loss {line["loss"]:.3f}, {report.size(line["bytes_sent"])} sent'
      progress.update(task, completed=line['step'], words=words)
      if 'val_loss' in line:
        console.print(
          f'{name} step {line["step"]}: {words}, '
          f'validation loss {line["val_loss"]:.4f}',
          highlight=False,
        )
      return interrupt.stops_after(line['step'])

    with progress:
      runs.append(train(config, name, data, folder, watch))
    progress.remove_task(task)
    if len(runs[-1].lines) < config.steps:
      return interrupt.asked or signal.SIGTERM

  if not folder.writes:
    return 0
  console.print(report.terminal_table(runs, place.words))
  page = folder.path / 'report.html'
  title = f'{config.method} and dense data parallel, {place.workers} workers'
  report.write(page, runs, title, settings(config, data) | versions())
  console.print(f'Report: {page}', highlight=False)
  return 0


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
      world = jd.initialize()
      prepare_devices(config.workers, world.processes)
      data = text.load(config.data)
      workers = find_place(config.workers).workers
      text.check(data, config.length, config.batch * workers, workers)
      folder = Folder(config.out, config.keep_going, writes=world.process == 0)
      if folder.writes:
        stack.enter_context(record.locked(config.out))
      if world.restarts and folder.begun_by(launch()):
        config = dataclasses.replace(config, resume=True, overwrite=False)
      decisive = settings(config, data)
      folder.check(decisive, config.resume, config.overwrite)
    except ValueError as error:
      print(f'lm.py: {error}', file=sys.stderr)
      sys.exit(2)  # As a wrong option does: there is no use in trying again.
    # All have looked into the folder before one writes to it, and it has
    # before the others go on.
    jd.assert_same('the settings of lm.py', decisive)
    if not config.resume:
      folder.begin(decisive, launch())
    jd.assert_same('the folder of lm.py', {'begun': True})
    stopped = compare(config, data, folder, world)
  if stopped:
    if folder.writes:
      again = [word for word in sys.argv if word != '--overwrite']
      again += ['--resume'] if '--resume' not in again else []
      print(f'Saved. To go on:\n  python {shlex.join(again)}')
    # Whoever sends SIGTERM is to see that nothing failed.
    sys.exit(128 + stopped if stopped == signal.SIGINT else 0)


if __name__ == '__main__':
  main()
