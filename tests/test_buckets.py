"""Every number is exchanged exactly once, however leaves and buckets fall."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxdist as jd
from jaxdist.communicators import buckets

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(sizes=SIZES, bucket_size=st.integers(1, 64))
def test_every_number_is_in_one_bucket(sizes, bucket_size):
  seen = [np.zeros(size, int) for size in sizes]
  plan = buckets.plan(sizes, bucket_size)
  for bucket in plan:
    assert 0 < buckets.bucket_length(bucket) <= bucket_size
    for leaf, start, stop in bucket:
      assert start < stop
      seen[leaf][start:stop] += 1
  assert all((count == 1).all() for count in seen)
  assert len(plan) == math.ceil(sum(sizes) / bucket_size)


@settings(max_examples=20)
@given(
  sizes=SIZES,
  bucket_size=st.integers(1, 64),
  size=st.integers(1, 16),
  extra=st.integers(0, 3),
)
def test_blocks_and_back(sizes, bucket_size, size, extra):
  leaves = [np.random.default_rng(n).normal(size=(n, 1)) for n in sizes]
  leaves = [jnp.asarray(x, jnp.float32) for x in leaves]
  plan = buckets.plan(sizes, bucket_size)
  matrices = []
  for bucket in plan:
    blocks = math.ceil(buckets.bucket_length(bucket) / size) + extra
    matrices.append(buckets.to_blocks(leaves, bucket, blocks, size))
    assert matrices[-1].shape == (blocks, size)
  back = buckets.from_blocks(matrices, plan, [x.shape for x in leaves])
  for want, got in zip(leaves, back, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('method', ['psum', 'gather', 'two_shot'])
@pytest.mark.parametrize('workers', [2, 3])
@pytest.mark.parametrize('bucket_bytes', [1, 128 * 4, 5 * 128 * 4, 2**28])
def test_mean_is_exact_for_any_bucket_size(method, workers, bucket_bytes):
  shapes = [(5,), (300, 3), (1,), (), (0,), (129,), (2, 2, 64)]
  rng = np.random.default_rng(0)
  tree = [rng.integers(-8, 8, (workers, *s)).astype(np.float32) for s in shapes]
  communicator = jd.mean(
    'data', jd.identity(block_size=128), method, bucket_bytes=bucket_bytes
  )
  exchange = lambda x: communicator.exchange(x, communicator.init(x))[:2]
  mean, sent = jax.jit(jax.vmap(exchange, axis_name='data'))(tree)
  for x, m, s in zip(tree, mean, sent, strict=True):
    # Small integers: sums are exact. XLA multiplies by 1/3: one rounding more.
    want = np.broadcast_to(x.sum(0) / np.float32(workers), x.shape)
    np.testing.assert_allclose(m, want, rtol=2e-7)
    np.testing.assert_array_equal(s, x)
