"""Bad arguments are refused where the user wrote them."""

import inspect

import pytest

import jaxdist as jd

WITH_BLOCKS = {
  'identity': jd.identity,
  'top_k': lambda **options: jd.top_k(0.1, **options),
  'random_k': lambda **options: jd.random_k(0.1, **options),
  'sketch': lambda **options: jd.sketch(0.1, **options),
  'quantize': jd.quantize,
  'float4': jd.float4,
  'float8': jd.float8,
  'sign': jd.sign,
  'ternary': jd.ternary,
  'natural': jd.natural,
  'codebook': jd.codebook,
}


@pytest.mark.parametrize('name', WITH_BLOCKS)
@pytest.mark.parametrize('size', [0, -128, 100, 1025])
def test_block_sizes_are_multiples_of_128(name, size):
  rule = f'block_size must be a positive multiple of 128, got {size}'
  with pytest.raises(ValueError, match=rule):
    WITH_BLOCKS[name](block_size=size)


@pytest.mark.parametrize(
  'factory',
  [
    jd.top_k,
    jd.random_k,
    jd.sketch,
    jd.global_top_k,
    lambda density: jd.codebook(density=density),
  ],
)
@pytest.mark.parametrize('density', [0.0, -0.5, 1.01, float('nan')])
def test_densities_are_parts(factory, density):
  rule = f'density must be above 0 and at most 1, got {density}'
  with pytest.raises(ValueError, match=rule):
    factory(density)


def test_choices_are_listed():
  with pytest.raises(ValueError, match='bits must be 8 or 4 or 2, got 3'):
    jd.quantize(bits=3)
  for levels in (1, 17):
    with pytest.raises(
      ValueError, match=f'levels must be 2 to 16, got {levels}'
    ):
      jd.codebook(levels)
  for factory in (jd.top_k, jd.global_top_k):
    rule = "values must be 'float32' or 'bfloat16', got 'float16'"
    with pytest.raises(ValueError, match=rule):
      factory(0.1, values='float16')

  rule = "family must be 'count' or 'gaussian', got 'srht'"
  with pytest.raises(ValueError, match=rule):
    inspect.unwrap(jd.sketch)(0.1, family='srht')


def test_wrong_types():
  # The tests' type checker would answer first: take it off.
  with pytest.raises(TypeError, match=r'block_size must be an int, got 128\.0'):
    inspect.unwrap(jd.sign)(block_size=128.0)
  with pytest.raises(TypeError, match='levels must be an int, got True'):
    inspect.unwrap(jd.codebook)(True)
  with pytest.raises(TypeError, match="density must be a number, got 'all'"):
    inspect.unwrap(jd.top_k)('all')
  with pytest.raises(TypeError, match='stochastic must be True or False, got'):
    inspect.unwrap(jd.quantize)(stochastic=1)
  with pytest.raises(TypeError, match='unbiased must be True or False, got 1'):
    inspect.unwrap(jd.random_k)(0.1, unbiased=1)
  with pytest.raises(TypeError, match='second must be a Compressor, got 4'):
    inspect.unwrap(jd.chained)(jd.top_k(0.1), 4)
  with pytest.raises(TypeError, match='compressor must be a Compressor, got 4'):
    inspect.unwrap(jd.rotated)(4)


@pytest.mark.parametrize(
  'first',
  [jd.sign(), jd.identity(), jd.top_k(0.1, values='bfloat16')],
  ids=repr,
)
def test_chained_wants_a_sparsifier_first(first):
  with pytest.raises(ValueError, match='first must be a sparsifier') as error:
    jd.chained(first, jd.quantize(bits=4))
  assert f'got {first}.' in str(error.value)


def test_chained_wants_room_for_what_is_kept():
  with pytest.raises(ValueError, match=r'first must have a block_size.*global'):
    jd.chained(jd.global_top_k(0.1), jd.sign())
  with pytest.raises(ValueError, match='second must have a block_size of at l'):
    jd.chained(jd.top_k(0.5), jd.sign(block_size=128))
  with pytest.raises(ValueError, match=r'power of two, got 102'):
    jd.chained(jd.top_k(0.1), jd.rotated(jd.sign()))


def test_rotated_wants_a_power_of_two():
  for code in (jd.sign(block_size=384), jd.global_top_k(0.1)):
    rule = r'compressor must have a block_size that is a power of two.*'
    with pytest.raises(ValueError, match=rule + str(code.block_size)):
      jd.rotated(code)
