"""Two codes after each other: choose some numbers, then code those."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.random_k import unseeded
from jaxdist.compressors.top_k import Sparse


def _contraction(first: Compressor, second: Compressor) -> float:
  one, two = first.contraction, second.contraction
  if not first.unbiased or one == 1:
    return one * two if two > 0 or first.linear else two
  if second.unbiased:
    return 2 - (2 - one) * (2 - two)
  return 1 - (math.sqrt(1 - one) + math.sqrt((1 - two) * (2 - one))) ** 2


def _check(first: Any, second: Any) -> None:
  for name, code in (('first', first), ('second', second)):
    if not isinstance(code, Compressor):
      raise TypeError(f'{name} must be a Compressor, got {code!r}.')
  if first.block_size is None:
    raise ValueError(
      'first must have a block_size, because second scales what is kept of '
      f'one block, got {first}.'
    )
  block = jax.ShapeDtypeStruct((1, first.block_size), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  payload = jax.eval_shape(
    lambda x, key: first.at(key).encode(x, key), block, key
  )
  values = getattr(payload, 'values', None)
  if (
    not isinstance(payload, Sparse)
    or getattr(values, 'dtype', 0) != block.dtype
  ):
    raise ValueError(
      'first must be a sparsifier with float32 values, such as top_k or '
      f'random_k, got {first}.'
    )
  k = values.shape[1]
  if second.block_size is not None and second.block_size < k:
    raise ValueError(
      f'second must have a block_size of at least {k}, which {first} keeps of '
      f'a block, got {second}.'
    )
  # Codes that cannot take rows of this length say so here.
  jax.eval_shape(lambda x, key: second.at(key).encode(x, key), values, key)


def chained(first: Compressor, second: Compressor) -> Compressor:
  r"""Keeps some numbers of each block and codes these with a second code.

  .. math::

    D(E(x))_S = D_2(E_2(x_S)), \qquad S \text{ chosen by the first code}

  **On the wire:** the indices of ``first``, and what ``second`` takes for the
  kept numbers of a block as one row: ``chained(top_k(0.05), quantize(bits=4))``
  with blocks of 1024 keeps 51 numbers of 10 + 4 bits and one scale, 0.75 bits a
  number in whole words.

  Contraction :math:`\delta_1 \delta_2`: what is lost of the kept numbers adds
  to what is not kept. If :math:`\delta_2` is negative, it is
  :math:`\delta_2`, unless ``first`` is random. If ``first`` scales what it
  keeps to be unbiased, noises multiply: :math:`2 - (2 - \delta_1)(2 -
  \delta_2)` for an unbiased ``second``. The contraction of ``second`` is that
  for its ``block_size``, which only has to be as large as what is kept.

  Args:
    first: a sparsifier, :func:`top_k` or :func:`random_k`, with float32 values.
    second: the code for the kept numbers.

  Returns:
    A :class:`Compressor`; linear and unbiased where both are.

  Raises:
    ValueError: if ``first`` is not such a code, or ``second`` cannot take as
      many numbers as it keeps.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.chained(jd.top_k(0.5), jd.sign())
    >>> x = jnp.array([[1., -3., 0., 5.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 0., -4.,  0.,  4.]], dtype=float32)

  References:
    Basu et al, `Qsparse-local-SGD <https://arxiv.org/abs/1906.02367>`_, 2019
  """
  _check(first, second)
  name = f'chained({first}, {second})'

  def codec(first, second):
    def encode(x, key):
      first_key, second_key = jax.random.split(key)
      payload = first.encode(x, first_key)
      values = second.encode(payload.values, second_key)
      return dataclasses.replace(payload, values=values)

    def decode(payload):
      values = second.decode(payload.values)
      return first.decode(dataclasses.replace(payload, values=values))

    return {'encode': encode, 'decode': decode}

  def seeded(shared_key):
    first_key, second_key = jax.random.split(shared_key)
    parts = codec(first.at(first_key), second.at(second_key))
    return dataclasses.replace(code, **parts, seeded=None)

  draws = first.seeded is not None or second.seeded is not None
  if draws:
    parts = {'encode': unseeded(name), 'decode': unseeded(name)}
  else:
    parts = codec(first, second)
  code = Compressor(
    name=name,
    **parts,
    block_size=first.block_size,
    contraction=_contraction(first, second),
    unbiased=first.unbiased and second.unbiased,
    linear=first.linear and second.linear,
    seeded=seeded if draws else None,
  )
  return code
