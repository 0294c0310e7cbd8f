"""Plans a training run on a TPU pod, or GPUs, that you don't have.

  python recipes/plan.py --topology v5e:4x4 --slices 2 --model 100m
  python recipes/plan.py --topology h100:8 --slices 4 --model 1b

Compiles the real training step of a decoder-only transformer (AdamW, FSDP
inside slices, one worker a slice; of GPUs, hosts are slices) for that pod, on a
CPU, once for each method, and reads from the programs: memory, bytes a chip
sends over each link in a step, and how much of the transfers compute hides. A
cost model makes step times of that. Needs `pip install 'jaxdist[recipes,tpu]'`,
no TPU; for GPUs, XLA's compiler for them, and says how to get it.
"""

import dataclasses
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import decoder
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import PartitionSpec
from plan_report import Plan, terminal_table, write
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import jaxdist as jd

# Between the workers, and inside one: of TPUs and of GPUs.
SLICES = ('between slices', 'chip links')
HOSTS = ('between hosts', 'inside a host')
WORKERS = 'dcn'
DENSE = 'dense'
EVERY = 100  # steps between the exchanges of an outer loop


def adamw() -> optax.GradientTransformation:
  return optax.adamw(3e-4)


def dense(exchange: jd.Communicator) -> optax.GradientTransformation:
  return optax.chain(jd.communicate(exchange), adamw())


def with_feedback(exchange: jd.Communicator) -> optax.GradientTransformation:
  return optax.chain(jd.error_feedback(exchange), adamw())


def diloco(
  exchange: jd.Communicator, **options
) -> optax.GradientTransformation:
  outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
  return jd.diloco(adamw(), outer, exchange, every=EVERY, **options)


def streaming(exchange: jd.Communicator) -> optax.GradientTransformation:
  return diloco(exchange, fragments=4, delay=1, mix=0.5)


def noloco(exchange: jd.Communicator) -> optax.GradientTransformation:
  return jd.noloco(adamw(), EVERY, pairing=exchange)


def co2(exchange: jd.Communicator) -> optax.GradientTransformation:
  return jd.co2(adamw(), exchange, EVERY)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train.

  Attributes:
    help: what it does, in one line.
    exchange: between the slices, for one chip's shards.
    transform: what uses it.
    every: steps between exchanges.
    code: that the exchange may gather, or send in two rounds.
  """

  help: str
  exchange: jd.Communicator
  transform: Callable[[jd.Communicator], optax.GradientTransformation]
  every: int = 1
  code: jd.Compressor | None = None


def mean(code: jd.Compressor | None = None, **options) -> jd.Communicator:
  return jd.mean(WORKERS, code, **options)


def coded(help: str, code: jd.Compressor, **options) -> Method:
  return Method(help, mean(code, **options), with_feedback, code=code)


def outer(help: str, exchange: jd.Communicator, loop) -> Method:
  return Method(help.format(EVERY), exchange, loop, every=EVERY)


INT8 = jd.quantize(bits=8)
METHODS = {
  DENSE: Method('gradients averaged in float32', mean(), dense),
  'late': Method(
    'the same, one step late, behind the compute', mean(delay=1), dense
  ),
  'int8': coded('8 bits a number', INT8),
  'int8-late': coded(
    '8 bits a number, one step late, behind the compute', INT8, delay=1
  ),
  'int4': coded('4 bits a number', jd.quantize(bits=4)),
  'sign': coded('1 bit a number', jd.sign()),
  'top-k': coded('the largest 1%', jd.top_k(0.01)),
  'power-sgd': Method(
    'matrices of rank 4', jd.low_rank_mean(WORKERS, rank=4), with_feedback
  ),
  'diloco': outer(
    'the change of {} steps, in 4-bit floats', mean(jd.float4()), diloco
  ),
  'streaming': outer(
    'the same, a fragment at a time, behind the compute',
    mean(jd.float4()),
    streaming,
  ),
  'noloco': outer(
    'averages of pairs every {} steps, in float32',
    jd.gossip(WORKERS, 'random_pairs'),
    noloco,
  ),
  'co2': outer(
    'the change of {} steps, in float32, a round late, behind the compute',
    mean(),
    co2,
  ),
}


def described() -> str:
  return '\n\n'.join(f'{name}: {m.help}' for name, m in METHODS.items())


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  topology: str = 'v5e:4x4'
  """TPU generation and the chips along each side of one slice; of GPUs, which
  (a100, h100, h200 or b200) and how many a host has, such as h100:8."""
  slices: int = 2
  """How many of them, linked by the data-centre network."""
  model: str = '100m'
  """Parameters of the model: 10m, 100m, 1b, 3b or 8b."""
  method: Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar='NAME', help=f'Beside dense.\n\n{described()}\n\n'),
  ] = ('int8', 'sign', 'top-k')
  batch: int = 2
  """Sequences a chip a step."""
  length: int = 2048
  """Tokens in a sequence."""
  dcn_gbps: Annotated[
    float | None,
    tyro.conf.arg(
      metavar='FLOAT',
      help='Gbit/s of a chip between slices or hosts.',
      help_behavior_hint='(default: as published)',
    ),
  ] = None
  efficiency: float = 0.5
  """Share of the chip's best rates that compute reaches."""
  out: Path = Path('out/plan')
  """Folder for report.html, plan.json and the schedules."""


def check(config: Config) -> None:
  """Refuses what cannot work, before anything compiles."""
  if config.model not in decoder.SIZES:
    names = ', '.join(decoder.SIZES)
    raise ValueError(f'--model must be one of {names}, got {config.model}.')
  for name in config.method:
    if name not in METHODS:
      names = ', '.join(METHODS)
      raise ValueError(f'--method must be of {names}, got {name}.')
  for name, least in (('slices', 2), ('batch', 1), ('length', 2)):
    if getattr(config, name) < least:
      raise ValueError(
        f'--{name} must be at least {least}, got {getattr(config, name)}.'
      )
  if not re.fullmatch(r'\w+:\d+(x\d+)*', config.topology):
    raise ValueError(
      '--topology must be a generation and the chips along each side, such as '
      f'v5e:4x4, or a GPU and their number, such as h100:8, got '
      f'{config.topology}.'
    )
  if config.length > decoder.CHUNK and config.length % decoder.CHUNK:
    raise ValueError(
      f'--length above {decoder.CHUNK} must be a multiple of it, got '
      f'{config.length}.'
    )
  if config.dcn_gbps is not None and not config.dcn_gbps > 0:
    raise ValueError(f'--dcn-gbps must be positive, got {config.dcn_gbps}.')
  if not 0 < config.efficiency <= 1:
    raise ValueError(
      f'--efficiency must be in (0, 1], got {config.efficiency}.'
    )


def pod(config: Config) -> jax.sharding.Mesh:
  """One worker a slice; its chips share parameters and batch."""
  name, _, sides = config.topology.partition(':')
  chips = math.prod(map(int, sides.split('x')))
  per_chip = 2 if name == 'tpu7x' else 1
  axes = {WORKERS: config.slices, decoder.AXIS: chips * per_chip}
  return jd.topology_mesh(config.topology, axes, slices=config.slices)


def links(config: Config, device: jax.Device, far: str) -> dict[str, jd.Link]:
  """What the pod's links carry, by the table or by the command line."""
  kind = device.device_kind
  known = dict(jd.LINKS[kind])
  if config.dcn_gbps is not None:
    latency = known.get(far, jd.Link(1.0, 1e-4)).latency
    known[far] = jd.Link(config.dcn_gbps * 1e9 / 8, latency)
  if far not in known:
    raise ValueError(f'--dcn-gbps must be given: none is published for {kind}.')
  return known


def compiled_traffic(config: Config, mesh, name: str):
  """The method's program, read; bytes claimed for numbers of slices."""
  params = decoder.param_shapes(decoder.SIZES[config.model])
  specs = decoder.fsdp_specs(params)
  exchange = jd.per_shard(METHODS[name].exchange, specs)
  tx = METHODS[name].transform(exchange)
  where = {'mesh': mesh, 'axis': WORKERS, 'specs': specs}
  state = jd.init(tx, params, **where)
  step = jd.train_step(
    decoder.next_token_loss, tx, batch_spec=PartitionSpec(decoder.AXIS), **where
  )
  rows = mesh.size * config.batch
  batch = jax.ShapeDtypeStruct((rows, config.length + 1), jnp.int32)
  traffic = jd.traffic(step, state, batch)
  placed = jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)
    ),
    params,
    specs,
  )
  counts = sorted({2, 4, 8, 16, 64, config.slices})
  every = METHODS[name].every
  sent = lambda exchange: {
    n: exchange.bytes_sent(placed, n) / every for n in counts
  }
  code = METHODS[name].code
  gathered = jd.per_shard(mean(code, method='gather'), specs)
  return traffic, sent(exchange), sent(gathered) if code else None


def break_even(traffic, dense, known, far, efficiency) -> float:
  """Bandwidth between slices at which a method is as fast as dense."""

  def seconds(sent):
    def at(rate):
      link = jd.Link(rate, known[far].latency)
      return jd.step_time(
        sent, known | {far: link}, efficiency=efficiency
      ).total

    return at

  return jd.break_even(seconds(traffic), seconds(dense))


def make_plans(config: Config, console: Console) -> tuple[list[Plan], dict]:
  """Compiles dense and each method, and prices their steps."""
  mesh = pod(config)
  device = mesh.devices.flat[0]
  far, near = SLICES if device.platform == 'tpu' else HOSTS
  known = links(config, device, far)
  plans, found = [], {}
  names = dict.fromkeys([DENSE, *config.method])
  with Progress(
    SpinnerColumn(),
    TextColumn('{task.description}'),
    TimeElapsedColumn(),
    console=console,
  ) as progress:
    for name in names:
      task = progress.add_task(f'compiling {name}', total=1)
      start = time.perf_counter()
      traffic, claimed, gathered = compiled_traffic(config, mesh, name)
      found[name] = traffic
      taken = time.perf_counter() - start
      cost = jd.step_time(traffic, known, efficiency=config.efficiency)
      plans.append(
        Plan(
          method=name,
          slices=config.slices,
          far=far,
          near=near,
          memory=traffic.memory.total,
          bytes_by_link=traffic.by_link(),
          claimed=claimed[config.slices],
          seconds=cost.total,
          exposed=cost.exposed[far],
          break_even=None
          if name == DENSE
          else break_even(traffic, found[DENSE], known, far, config.efficiency),
          compile_seconds=taken,
          by_slices=claimed,
          gathered=gathered,
        )
      )
      progress.update(task, completed=1)
  return plans, found


def main(config: Config) -> None:
  console = Console()
  try:
    check(config)
    plans, found = make_plans(config, console)
  except (ValueError, ImportError) as error:
    console.print(f'[red]{error}[/]')
    sys.exit(2)
  title = f'{config.model} on {config.slices} x {config.topology}'
  console.print(terminal_table(plans, title))
  config.out.mkdir(parents=True, exist_ok=True)
  for name, traffic in found.items():
    traffic.plot_schedule(config.out / f'schedule-{name}.png')
  facts = dataclasses.asdict(config) | {
    'command': shlex.join(['python', *sys.argv]),
    'out': str(config.out),
  }
  (config.out / 'plan.json').write_text(
    json.dumps(
      {
        'config': facts,
        'plans': [dataclasses.asdict(plan) for plan in plans],
        'traffic': {k: json.loads(v.to_json()) for k, v in found.items()},
      },
      indent=2,
    )
  )
  write(config.out, plans, title, facts)
  console.print(f'Report: {config.out / "report.html"}')


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  main(tyro.cli(Config, description=__doc__))
