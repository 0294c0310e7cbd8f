"""Trains over slow links for real: hosts on one machine, beside PyTorch DDP.

  sudo -E python recipes/links.py

Needs Linux and root, and no second machine: two hosts are two network
namespaces whose links are held to 10 Gbit/s, 1 Gbit/s, 100 Mbit/s and 10
Mbit/s, one process and half of the cores each. Both train the language model of
lm.py with each method, and with PyTorch's DistributedDataParallel, plain and
with its PowerSGD hook, where torch is installed: the same parameters at the
start, data and optimizer. Bytes are those that the network interfaces counted.
Runs take turns, and each is a file in ``--out``: the same command goes on where
it was stopped. On two idle cores it takes about 21 minutes, 12 of them at 10
Mbit/s.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import links_found
import links_report
import lm
import methods
import netns
import record
import text
import tyro
from crew import Crew
from links_found import PEERS
from links_host import CODES, NO_EXCHANGE
from rich.console import Console

# What does not change a run.
FREE = ('methods', 'rates', 'rounds', 'torch', 'data', 'out')
FOLDER = Path(__file__).parent
HELP = f'What to train with.\n\n{methods.described()}\n\n'
# For one measurement: those who make it bound their own waits for each other.
PATIENCE_SECONDS = 3600.0
PROBE_SECONDS = 0.3
MOST_PROBED = 4_000_000


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  methods: Annotated[
    tuple[str, ...],
    tyro.conf.arg(
      metavar='NAME ...',
      help=HELP,
    ),
  ] = ('dense', 'quantized', 'local-sgd', 'sparse-loco')
  rates: tuple[str, ...] = ('10gbit', '1gbit', '100mbit', '10mbit')
  """What a link carries each way."""
  hosts: int = 2
  """Hosts, from 2 to 4; with fewer cores than hosts they share them."""
  rounds: int = 2
  """Runs of each method at each rate, with other seeds."""
  torch: bool = True
  """Compare with PyTorch too, if it is installed."""
  exchange_mb: float = 16.0
  """Megabytes of float32 gradients that are exchanged once, in some codes."""
  steps: int = 240
  """Optimizer steps of each run."""
  batch: int = 4
  """Sequences a worker a step."""
  length: int = 128
  """Bytes in a sequence."""
  every_eval: int = 20
  """Steps between validations, which the clock does not count."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""
  heads: int = 4
  """Attention heads."""
  data: Annotated[
    Path | None,
    tyro.conf.arg(
      metavar='PATH',
      help='Text to train on: a file or a folder.',
      help_behavior_hint="(default: the source of Python's standard library)",
    ),
  ] = None
  out: Path = Path('out/links')
  """Folder for the results."""

  def run(self) -> dict[str, Any]:
    """What lm.py is told."""
    names = ('steps', 'batch', 'length', 'every_eval')
    names += ('layers', 'width', 'heads')
    return {name: getattr(self, name) for name in names}


def check(config: Config) -> None:
  """Refuses what cannot work, before anything is made."""
  netns.check()
  if not 2 <= config.hosts <= 4:
    raise ValueError(f'--hosts must be from 2 to 4, got {config.hosts}.')
  if config.rounds < 1:
    raise ValueError(f'--rounds must be at least 1, got {config.rounds}.')
  for name, values in {
    'methods': [methods.find(name).name for name in config.methods],
    'rates': [netns.bits_per_second(rate) for rate in config.rates],
  }.items():
    if not values or len(set(values)) < len(values):
      raise ValueError(f'--{name} must name some, each once, got {values}.')
  if not config.exchange_mb > 0:
    raise ValueError(
      f'--exchange-mb must be positive, got {config.exchange_mb}.'
    )
  lm.check(lm.Config(**config.run(), workers=config.hosts))


def contenders(config: Config) -> list[str]:
  """Names of all runs, the limit first."""
  found = [NO_EXCHANGE, *(methods.find(name).name for name in config.methods)]
  if config.torch and importlib.util.find_spec('torch'):
    found += PEERS
  return found


@dataclasses.dataclass(frozen=True)
class Task:
  """A measurement, and the file that says it was made.

  Attributes:
    rate: of the links.
    path: where its result is.
    arguments: of the hosts' function.
    peer: whether torch makes it.
  """

  rate: str
  path: Path
  arguments: dict[str, Any]
  peer: bool = False


def tasks(config: Config) -> Iterator[Task]:
  """All measurements in order: in a round each contender has its turn."""
  runs = config.out / 'runs'
  for rate in config.rates:
    bits = netns.bits_per_second(rate)
    num_bytes = min(MOST_PROBED, round(bits / 8 * PROBE_SECONDS))
    probe = {'do': 'probe', 'num_bytes': num_bytes}
    yield Task(rate, runs / f'{rate}.link.json', probe)
    for code in CODES:
      told = {'do': 'exchange', 'code': code, 'megabytes': config.exchange_mb}
      yield Task(rate, runs / f'{rate}.{code}.json', told)
    for seed in range(config.rounds):
      for name in contenders(config):
        told = {'do': 'train', 'method': name, 'seed': seed}
        peer = name in PEERS
        if peer:
          told['start'] = str((config.out / f'start.{seed}.npz').absolute())
        yield Task(rate, runs / f'{rate}.{seed}.{name}.json', told, peer)


def open_folder(config: Config, data: text.Text) -> None:
  """Begins a comparison or goes on with one.

  Raises:
    ValueError: other settings were used before.
  """
  now = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in FREE
  }
  now['text'] = str(data)
  path = config.out / 'settings.json'
  before = json.loads(path.read_text()) if path.exists() else now
  for name, value in now.items():
    if before.get(name) != value:
      raise ValueError(
        f'--out must hold runs of the same settings, got another {name}: '
        f'{before.get(name)} before, {value} now.'
      )
  record.replace(path, json.dumps(now, indent=2) + '\n')
  (config.out / 'runs').mkdir(exist_ok=True)


def measure(config: Config, console: Console) -> None:
  """Makes all measurements that are not there yet."""
  missing = [task for task in tasks(config) if not task.path.exists()]
  if not missing:
    return
  told = {**config.run(), 'data': str(config.data) if config.data else None}
  with contextlib.ExitStack() as stack:
    hosts = stack.enter_context(netns.Hosts(config.hosts))
    first = hosts.addresses[0]

    def crew(script, port, **environment):
      return stack.enter_context(
        Crew(
          hosts,
          FOLDER / script,
          {**told, 'address': f'{first}:{port}'},
          {'JAX_PLATFORMS': 'cpu', **environment},
          config.out / 'logs',
        )
      )

    own = crew('links_host.py', 9701)
    peer = None
    if any(task.peer for task in missing):
      peer = crew('peer.py', 9702, GLOO_SOCKET_IFNAME=netns.DEVICE)
      for seed in range(config.rounds):
        path = (config.out / f'start.{seed}.npz').absolute()
        save = {'do': 'save_start', 'seed': seed, 'path': str(path)}
        own.ask(save, PATIENCE_SECONDS)
    limited = None
    for index, task in enumerate(missing):
      bits = netns.bits_per_second(task.rate)
      if task.rate != limited:
        hosts.limit(bits)
        limited = task.rate
      console.print(
        f'{index + 1} of {len(missing)}: {task.path.stem}', highlight=False
      )
      crew_of_it = peer if task.peer else own
      answers = crew_of_it.ask(task.arguments, PATIENCE_SECONDS)
      # What a host's program sends is the same for all.
      traffic = [x.pop('traffic', None) for x in answers].pop()
      found = {
        'hosts': answers,
        'traffic': traffic,
        'load': os.getloadavg()[0],
      }
      record.replace(task.path, json.dumps(found) + '\n')


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  console = Console()
  # This process only plans; it is to look for no accelerator.
  jax.config.update('jax_platforms', 'cpu')
  # Whatever ends this, the hosts are to be removed.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
  with contextlib.ExitStack() as stack:
    try:
      check(config)
      data = text.load(config.data)
      rows = config.batch * config.hosts
      text.check(data, config.length, rows, config.hosts)
      stack.enter_context(record.locked(config.out))
      open_folder(config, data)
    except ValueError as error:
      sys.exit(f'links.py: {error}')
    console.print(f'{config.hosts} hosts. Text: {data}.', highlight=False)
    if config.torch and not importlib.util.find_spec('torch'):
      console.print('PyTorch is not installed: there is no peer in this run.')
    try:
      measure(config, console)
    except KeyboardInterrupt:
      print(f'Saved. To go on:\n  python {shlex.join(sys.argv)}')
      sys.exit(128 + signal.SIGINT)
    except (OSError, RuntimeError) as error:
      sys.exit(f'links.py: {error}')
  found = links_found.read(config, contenders(config))
  for table in links_report.terminal_tables(found):
    console.print(table)
  facts = {**dataclasses.asdict(config), **lm.versions(), 'text': str(data)}
  links_report.write(config.out, found, facts)
  console.print(f'Report: {config.out / "report.html"}', highlight=False)


if __name__ == '__main__':
  main()
