"""Trains replicas of the language model while faults of all kinds arrive.

  python recipes/elastic.py --replicas 4 --chaos 0 --minutes 20

Each replica is a process of its own (a Ray actor). Processes are killed, some
at once, stopped and woken, and slowed ten times; changes are NaN or garbage.
Training goes on. Afterwards it trains again without faults, to as many
committed tokens, and report.html says what each fault cost. With 20 minutes of
chaos it takes about 40.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import chaos
import elastic_report
import jax
import methods
import optax
import record
import text
import tyro
from flax import nnx
from model import Transformer, next_byte_loss
from place import hush_tpu_compiler
from rich.console import Console
from rich.live import Live

import jaxdist as jd
from jaxdist.elastic.settings import Patience

VALIDATION_ROWS = 128
CHAOS, CALM = 'with faults', 'without faults'


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  replicas: int = 4
  """Processes that train."""
  chaos: Annotated[
    int | None,
    tyro.conf.arg(
      metavar='SEED',
      help='Bring faults about, drawn from this seed.',
      help_behavior_hint='(default: no faults)',
    ),
  ] = None
  minutes: float = 20.0
  """Time of the run with faults, or of the only one; until the last fault."""
  fault_every: float = 20.0
  """Mean seconds between faults."""
  compare: bool = True
  """After the faults, train without any to as many committed tokens."""
  out: Path = Path('out/elastic')
  """Folder for checkpoints, numbers and the report."""
  overwrite: bool = False
  """Replace the results in --out."""
  data: Annotated[
    Path | None,
    tyro.conf.arg(
      metavar='PATH',
      help='Text to train on: a file or a folder.',
      help_behavior_hint="(default: the source of Python's standard library)",
    ),
  ] = None
  every: int = 40
  """Inner steps in a round."""
  quorum: int | None = None
  """Changes that are enough; by default of all replicas but one."""
  deadline: float = 10.0
  """Seconds that a round takes at most."""
  max_staleness: int = 8
  """Rounds that a change may be late."""
  bits: int = 4
  """Of a number in a change."""
  batch: int = 4
  """Sequences a replica a step."""
  length: int = 128
  """Bytes in a sequence."""
  lr: float = 8e-3
  """Learning rate, after a warm-up."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""
  heads: int = 4
  """Attention heads."""
  seed: int = 0
  """Fixes the initial parameters and the order of the data."""


def check(config: Config) -> None:
  """Refuses what cannot work, before anything starts."""
  for name in ('replicas', 'every', 'batch', 'length', 'layers', 'width'):
    value = getattr(config, name)
    if value < 1:
      raise ValueError(f'--{name} must be at least 1, got {value}.')
  for name in ('minutes', 'fault_every', 'lr'):
    value = getattr(config, name)
    if not 0 < value < math.inf:
      flag = name.replace('_', '-')
      raise ValueError(f'--{flag} must be positive, got {value}.')
  if config.heads < 1 or config.width % (2 * config.heads):
    raise ValueError(
      '--width must be an even multiple of --heads, got '
      f'{config.width} and {config.heads}.'
    )
  jd.quantize(bits=config.bits)
  Patience.checked(
    config.replicas,
    config.quorum,
    config.deadline,
    config.max_staleness,
    staleness=1.0,
    start_timeout=1.0,
  )
  done = config.out / 'runs.json'
  if done.exists() and not config.overwrite:
    raise ValueError(
      f'--out must not hold results, got {config.out}: add --overwrite to '
      'replace them.'
    )


def model_parts(config: Config, abstract: bool = False) -> tuple[Any, Any]:
  """The model's structure, and its parameters or their shapes."""
  make = lambda: Transformer(
    config.layers, config.width, config.heads, nnx.Rngs(config.seed)
  )
  return nnx.split(nnx.eval_shape(make) if abstract else make(), nnx.Param)


def builder(config: Config, data: text.Text, folder: Path):
  """What each replica runs; called here, and what it returns there."""

  def build(replica: int):
    from jaxdist import elastic

    graphdef, _ = model_parts(config, abstract=True)
    batches = text.training_batches(
      data, config.length, config.batch, config.seed
    )
    rate = optax.linear_schedule(0.0, config.lr, 200)
    program = elastic.program(
      lambda params, rows: next_byte_loss(nnx.merge(graphdef, params), rows),
      methods.muon(rate),
      # All replicas together read the text as one would in larger batches.
      lambda step: batches[step * config.replicas + replica],
    )
    return chaos.suffering(program, folder / f'{replica}.json', config.every)

  return build


def train(
  config: Config,
  name: str,
  console: Console,
  faults: list[chaos.Fault],
  tokens: float = math.inf,
) -> dict[str, Any]:
  """Trains until the time or the tokens are there.

  Args:
    config: the command line.
    name: of the run.
    console: for its progress.
    faults: to bring about.
    tokens: committed ones, after which to stop; if given, time does not count.

  Returns:
    What happened, as JSON.
  """
  from jaxdist import elastic

  folder = config.out / name.replace(' ', '-')
  data = text.load(config.data)
  held_out = text.validation_rows(data, config.length, 1, VALIDATION_ROWS)
  graphdef, params = model_parts(config)
  evaluate = jax.jit(
    lambda params: next_byte_loss(nnx.merge(graphdef, params), held_out)
  )
  seconds = 60 * config.minutes if tokens == math.inf else math.inf
  tokens_each = config.every * config.batch * config.length
  bringer = chaos.Chaos(faults, folder / 'orders')
  lines, events, samples = [], [], []
  committed, evaluated, sampled = 0.0, 0.0, -math.inf
  coordinator = elastic.Coordinator(
    builder(config, data, folder / 'orders'),
    params,
    replicas=config.replicas,
    outer=optax.sgd(0.8, momentum=0.5, nesterov=True),
    every=config.every,
    compressor=jd.quantize(bits=config.bits),
    quorum=config.quorum or max(1, config.replicas - 1),
    deadline=config.deadline,
    max_staleness=config.max_staleness,
    seed=config.seed,
    directory=folder / 'checkpoints',
    save_every=10,
    pool=bringer.pool,
  )
  made = time.monotonic()
  with contextlib.ExitStack() as stack:
    stack.enter_context(coordinator)
    rounds = coordinator.rounds(sys.maxsize)
    console.print(f'{name}: starting and compiling.', highlight=False)
    first = next(rounds)  # All replicas are there, and have moved once.
    events += first.events
    if console.is_terminal:
      live = stack.enter_context(Live(console=console, auto_refresh=False))
    stack.callback(bringer.stop)
    began = time.monotonic()
    bringer.start(lambda: coordinator.seats)
    for report in rounds:
      now = time.monotonic() - began
      committed += report.weight * tokens_each * report.committed
      line = {
        'seconds': now,
        'round': report.round,
        'round_seconds': report.seconds,
        'tokens': committed,
        'fresh': report.fresh,
        'late': report.late,
        'loss': report.loss if math.isfinite(report.loss) else None,
        'bytes': report.bytes_received,
      }
      # A fault waits for a replica that is starting.
      met = all(fault.done is not None for fault in faults)
      ends = (now >= seconds and met) or committed >= tokens
      if ends or now - evaluated > 15:
        evaluated = now
        line['val_loss'] = float(evaluate(coordinator.params))
      if ends or now - sampled > 5:
        sampled = now
        samples.append({'seconds': now, **chaos.usage()})
      lines.append(line)
      events += report.events
      if console.is_terminal:
        live.update(
          elastic_report.live_table(name, coordinator.seats, lines, events),
          refresh=True,
        )
      elif 'val_loss' in line:
        console.print(elastic_report.progress(name, line), highlight=False)
      if ends:
        break
  return {
    'name': name,
    'lines': lines,
    'events': [
      {**event._asdict(), 'seconds': event.seconds + made - began}
      for event in events
    ],
    'faults': [dataclasses.asdict(fault) for fault in faults],
    'samples': samples,
    'counts': coordinator.counts,
    'tokens_a_change': tokens_each,
  }


def prepare(out: Path) -> None:
  """What the replicas' processes inherit; before JAX and Ray begin."""
  # One thread each: they share the cores.
  os.environ['XLA_FLAGS'] = ' '.join(
    (
      os.environ.get('XLA_FLAGS', ''),
      '--xla_cpu_multi_thread_eigen=false',
      'intra_op_parallelism_threads=1',
    )
  )
  # Whoever comes back does not compile again.
  cache = {
    'jax_compilation_cache_dir': str((out / 'compiled').absolute()),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in cache.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def run(config: Config, console: Console) -> list[dict[str, Any]]:
  """All runs, and what they leave in the folder."""
  faults = []
  if config.chaos is not None:
    faults = chaos.schedule(
      config.chaos, config.replicas, 60 * config.minutes, config.fault_every
    )
    console.print(f'{len(faults)} faults from seed {config.chaos}.')
  name = CALM if config.chaos is None else CHAOS
  runs = [train(config, name, console, faults)]
  if faults and config.compare:
    tokens = runs[0]['lines'][-1]['tokens']
    runs.append(train(config, CALM, console, [], tokens))
  results = {'settings': settings(config), 'runs': runs}
  results['findings'] = elastic_report.findings(runs)
  record.replace(config.out / 'runs.json', json.dumps(results, indent=1))
  page = config.out / 'report.html'
  elastic_report.write(page, results)
  console.print(elastic_report.summary(results['findings']), highlight=False)
  console.print(f'Report: {page}', highlight=False)
  return runs


def settings(config: Config) -> dict[str, Any]:
  """The command line as JSON."""
  fields = dataclasses.asdict(config)
  return {
    name: str(value) if isinstance(value, Path) else value
    for name, value in fields.items()
  }


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  hush_tpu_compiler()
  try:
    check(config)
    with record.locked(config.out):
      for name in (CHAOS, CALM):
        shutil.rmtree(config.out / name.replace(' ', '-'), ignore_errors=True)
      prepare(config.out)
      run(config, Console())
  except (ValueError, ImportError) as error:
    sys.exit(f'elastic.py: {error}')
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == '__main__':
  main()
