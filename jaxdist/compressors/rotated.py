"""A random rotation around another code, so that no number stands out."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.random_k import unseeded
from jaxdist.kernels.hadamard import api as rotation


def _gain(size: int) -> float:
  """A power of two that a rotated number cannot exceed its row's largest by."""
  return 2.0 ** (size.bit_length() // 2)


def rotated(compressor: Compressor) -> Compressor:
  r"""Rotates each block at random, codes it, and rotates back.

  .. math::

    D(E(x)) = R^T D'(E'(R x)), \qquad R = H \, \mathrm{diag}(\pm 1)

  with :math:`H` the orthonormal Walsh-Hadamard matrix and signs drawn from a
  key that all workers share. A rotated block looks Gaussian whatever it was, so
  codes with one scale a block come near their Gaussian error on all blocks.

  **On the wire:** what the inner code takes.

  Contraction, linear and unbiased as the inner code: a rotation keeps lengths.

  Args:
    compressor: the inner code; its ``block_size`` is a power of two.

  Returns:
    A :class:`Compressor`, to be used through ``.at(shared_key)``.

  Raises:
    ValueError: if the block size of ``compressor`` is not a power of two.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.rotated(jd.sign()).at(jax.random.key(0))
    >>> x = jnp.array([[2., 0., 0., 0.]])
    >>> code.decode(code.encode(x, jax.random.key(1)))
    Array([[2., 0., 0., 0.]], dtype=float32)

  References:
    Suresh et al, `Distributed Mean Estimation with Limited Communication
    <https://arxiv.org/abs/1611.00429>`_, 2017
  """
  if not isinstance(compressor, Compressor):
    raise TypeError(f'compressor must be a Compressor, got {compressor!r}.')
  size = compressor.block_size
  if size is None or size & (size - 1):
    raise ValueError(
      'compressor must have a block_size that is a power of two, '
      f'got {compressor} with {size}.'
    )
  name = f'rotated({compressor})'

  def seeded(shared_key):
    rotation_key, inner_key = jax.random.split(shared_key)
    inner = compressor.at(inner_key)

    def encode(x, key):
      # Scaled down so that no finite row overflows; powers of two are exact.
      y = rotation.rotate(x / _gain(x.shape[1]), rotation_key)
      return inner.encode(y, key)

    def decode(payload):
      y = inner.decode(payload)
      x = rotation.unrotate(y, rotation_key) * _gain(y.shape[1])
      # Near the end of float32's range the inner code's error may leave it.
      # A row that is not finite has a NaN after the rotation, which stays.
      largest = float(jnp.finfo(jnp.float32).max)
      return jnp.clip(x, -largest, largest)

    return dataclasses.replace(code, encode=encode, decode=decode, seeded=None)

  code = Compressor(
    name=name,
    encode=unseeded(name),
    decode=unseeded(name),
    block_size=size,
    contraction=compressor.contraction,
    unbiased=compressor.unbiased,
    linear=compressor.linear,
    seeded=seeded,
  )
  return code
