"""Transfers lie open beside the computation, in programs for two TPU slices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxdist as jd

LAYERS, WIDTH = 2, 256
COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
EVENT = re.compile(r' (send|recv|send-done|recv-done|conditional)\(')


@pytest.fixture(scope='module')
def slices():
  """A mesh of two slices of four chips that need not be there."""
  pytest.importorskip('libtpu', reason='needs the TPU compiler: jaxdist[tpu]')
  from jax.experimental import topologies

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TPU_SKIP_MDS_QUERY', '1')
    patch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
    patch.setenv('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    patch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:2x2', num_slices=2
    ).devices
  devices = sorted(devices, key=lambda d: (d.slice_index, d.id))
  return Mesh(
    np.array(devices).reshape(2, 4),
    ('dcn', 'chip'),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def schedule(tx, mesh):
  """What each computation does, in order of execution, and its bytes sent.

  Returns:
    For each computation with transfers or products of matrices the letters
    ``(`` for a transfer's start, ``)`` for its end and ``x`` for a product, and
    the bytes of the operands that it sends.
  """
  params = {
    f'w{i}': jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    for i in range(LAYERS)
  }

  def loss(params, x):
    for name in params:
      x = jnp.tanh(x @ params[name])
    return jnp.mean(x**2)

  where = {'mesh': mesh, 'axis': 'dcn'}
  batch = jax.ShapeDtypeStruct(
    (64, WIDTH),
    jnp.float32,
    sharding=NamedSharding(mesh, PartitionSpec('dcn')),
  )
  program = jd.train_step(loss, tx, **where).lower(
    jd.init(tx, params, **where), batch
  )
  found, name = {}, None
  for line in program.compile().as_text().splitlines():
    start = COMPUTATION.match(line)
    if start:
      name = start[1]
    event = EVENT.search(line)
    is_product = 'fusion(' in line and 'dot_general' in line
    if (event is None and not is_product) or 'fused_computation' in name:
      continue
    events, sent = found.get(name, ('', 0))
    if is_product:
      events += 'x'
    elif event[1] in ('send', 'recv'):
      events += '('
    elif event[1] != 'conditional':
      events += ')'
    if event and event[1] == 'send':
      shape = re.search(r'= \((?:f|u)32\[([\d,]+)\]', line)[1]
      sent += 4 * np.prod([int(n) for n in shape.split(',')])
    found[name] = events, sent
  return list(found.values())


def test_a_fragment_travels_beside_the_whole_step(slices):
  def make(**options):
    return jd.diloco(
      optax.sgd(0.1),
      optax.sgd(0.7, momentum=0.9, nesterov=True),
      jd.mean('dcn', jd.float4()),
      every=100,
      feedback=False,
      **options,
    )

  late = [x for x in schedule(make(), slices) if x[1]]
  ((events, whole),) = late
  assert events == '(())'  # After the step's products, in a branch of its own.
  streaming = schedule(make(fragments=2, delay=1, mix=0.5), slices)
  turns = [x for x in streaming if x[1]]
  assert len(turns) == 2
  for events, sent in turns:
    assert re.fullmatch(r'\(\(x+\)\)', events), events
    assert events.count('x') >= 2 * LAYERS
    assert sent == whole / 2
  idle = [events for events, sent in streaming if 'x' in events and not sent]
  assert len(idle) == 1, 'steps without a turn share one program'


def test_a_late_round_travels_beside_its_last_step(slices):
  tx = jd.co2(optax.sgd(0.1), jd.mean('dcn'), every=8)
  ((events, sent),) = [x for x in schedule(tx, slices) if x[1]]
  assert re.fullmatch(r'\(\(x+\)\)', events), events
  assert events.count('x') >= 2 * LAYERS
  assert sent == 4 * LAYERS * WIDTH**2
