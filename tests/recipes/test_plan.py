"""The planner: its model trains, and its figures are those of the program."""

import json
import math

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import plan
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from needs import needs_gpu_compiler, needs_tpu_compiler

import jaxdist as jd

TINY = decoder.Size(256, 1, 2, 1, 256, 1024)


def loss_and_grads(devices):
  """Of a tiny decoder, cut over some devices of one worker."""
  mesh = jax.make_mesh(
    (1, devices),
    (plan.WORKERS, decoder.AXIS),
    (AxisType.Auto,) * 2,
    devices=jax.devices()[:devices],
  )
  rng = np.random.default_rng(0)
  shapes = decoder.param_shapes(TINY)
  params = jax.tree.map(
    lambda s: jnp.asarray(0.05 * rng.normal(size=s.shape), s.dtype), shapes
  )
  tokens = rng.integers(0, TINY.vocabulary, (4, 33)).astype(np.int32)
  run = jax.jit(
    jax.shard_map(
      jax.value_and_grad(decoder.next_token_loss),
      mesh=mesh,
      in_specs=(P(), P(plan.WORKERS)),
      out_specs=P(),
      axis_names={plan.WORKERS},
      check_vma=False,
    )
  )
  place = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))
  params = jax.tree.map(place, params, decoder.fsdp_specs(params))
  return jax.device_get(run(params, place(tokens, P(plan.WORKERS))))


def test_cut_decoder_is_the_whole_one():
  (loss, grads), (cut_loss, cut_grads) = map(loss_and_grads, (1, 4))
  # Random logits of size 0.05 * 16 say little: nearly uniform.
  assert abs(loss - math.log(TINY.vocabulary)) < 0.5
  np.testing.assert_allclose(cut_loss, loss, rtol=1e-3)
  for whole, cut in zip(*map(jax.tree.leaves, (grads, cut_grads)), strict=True):
    size = np.linalg.norm(whole)
    assert size > 0
    # Products are in bfloat16, of eight bits, summed in another order.
    assert np.linalg.norm(cut - whole) < 0.03 * size


@pytest.mark.parametrize(
  'topology',
  [
    pytest.param('v5e:2x2', marks=needs_tpu_compiler),
    # Its compiler takes long over attention.
    pytest.param('h100:4', marks=[needs_gpu_compiler, pytest.mark.slow]),
  ],
)
def test_plan_of_a_tiny_pod(topology, monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(decoder.SIZES, 'tiny', TINY)
  plan.main(
    plan.Config(
      topology=topology,
      model='tiny',
      method=('int8', 'noloco'),
      batch=1,
      length=128,
      dcn_gbps=1.0,
      out=tmp_path,
    )
  )
  assert f'tiny on 2 x {topology}' in capsys.readouterr().out
  found = json.loads((tmp_path / 'plan.json').read_text())
  dense, int8, noloco = found['plans']
  numbers = sum(
    math.prod(x.shape) for x in jax.tree.leaves(decoder.param_shapes(TINY))
  )
  once = 1 / plan.EVERY
  for each, times in ((dense, 1.0), (int8, 0.25), (noloco, once)):
    sent = each['bytes_by_link'][each['far']]
    # A chip of four sends its share; vectors whole, scales, flag and tiles.
    share = numbers * 4 * times / 4
    assert share < sent < 1.1 * share + 32768 * times
    assert each['claimed'] == pytest.approx(sent, rel=0.1)
    assert 0 < each['memory'] < 1e9
  assert int8['seconds'] < dense['seconds']
  assert int8['break_even'] > 1e9 / 8
  assert noloco['seconds'] < int8['seconds']
  assert dense['gathered'] is None
  assert int8['gathered']['64'] == 63 * int8['gathered']['2']
  page = (tmp_path / 'report.html').read_text()
  assert page.count('<svg') == 2
  assert page.count('data:image/png;base64') == 3


def test_two_shots_stay_flat_and_gathers_grow():
  """1b on slices of 256 chips: bytes of a chip, for 2 to 64 slices."""
  params = decoder.param_shapes(decoder.SIZES['1b'])
  specs = decoder.fsdp_specs(params)
  mesh = AbstractMesh((2, 256), (plan.WORKERS, decoder.AXIS))
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)
    ),
    params,
    specs,
  )

  def sent(method, workers):
    exchange = jd.mean(plan.WORKERS, jd.quantize(bits=8), method)
    return jd.per_shard(exchange, specs).bytes_sent(placed, workers)

  payload = sent('gather', 2)
  for workers in (2, 4, 8, 16, 64):
    assert sent('gather', workers) == (workers - 1) * payload
    assert sent('two_shot', workers) <= 2 * payload * 1.1


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': '2b'}, '--model must be one of 10m'),
    ({'method': ('int9',)}, '--method must be of dense'),
    ({'topology': 'h100'}, '--topology must be a generation .* got h100'),
    ({'slices': 1}, '--slices must be at least 2, got 1'),
    ({'dcn_gbps': 0.0}, '--dcn-gbps must be positive'),
    ({'efficiency': 2.0}, r'--efficiency must be in'),
    ({'length': 700}, '--length above 512 must be a multiple'),
  ],
)
def test_plans_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    plan.check(plan.Config(**change))
