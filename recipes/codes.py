"""Prints what each code sends for a 1024 x 1024 matrix: claimed and compiled.

  python recipes/codes.py

On a CPU, in under a minute. Bytes a worker sends in one exchange, along a ring:
as the communicator claims it, and as the compiled program says.
"""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import jaxdist as jd

CODES = [
  None,
  jd.quantize(bits=8),
  jd.quantize(bits=4),
  jd.quantize(bits=2),
  jd.float8(),
  jd.float4(),
  jd.natural(),
  jd.ternary(),
  jd.codebook(3),
  jd.sign(),
  jd.top_k(0.05),
  jd.top_k(0.01),
  jd.chained(jd.top_k(0.05), jd.quantize(bits=4)),
  jd.random_k(0.05),
  jd.global_top_k(0.01),
]


def compiled_bytes(communicator, workers: int) -> float:
  """What one exchange sends, with the second residual where there is one."""
  mesh = jax.make_mesh(
    (workers,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:workers],
  )
  spec = PartitionSpec('data')

  def exchange(x):
    state = communicator.init(x[0], feedback=True)
    result, sent, _ = communicator.exchange(x[0], state)
    return result[None], sent[None]

  step = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)
  x = jax.ShapeDtypeStruct(
    (workers, 1024, 1024), 'float32', sharding=NamedSharding(mesh, spec)
  )
  return jd.traffic(jax.jit(step), x).bytes_a_step


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  table = Table('code')
  for workers in (2, 8):
    for title in ('claimed', 'compiled', 'times fewer'):
      table.add_column(f'{title}, {workers}', justify='right')
  params = jax.ShapeDtypeStruct((1024, 1024), 'float32')
  rows = [(str(code), jd.mean('data', code)) for code in CODES]
  rows += [('low_rank_mean, rank 4', jd.low_rank_mean('data', 4))]
  for name, communicator in rows:
    cells = []
    for workers in (2, 8):
      claimed = communicator.bytes_sent(params, workers)
      dense = jd.mean('data').bytes_sent(params, workers)
      cells += [
        f'{claimed:,.0f}',
        f'{compiled_bytes(communicator, workers):,.0f}',
        f'{dense / claimed:.1f}',
      ]
    table.add_row(name, *cells)
  Console(width=120).print(table)


if __name__ == '__main__':
  main()
