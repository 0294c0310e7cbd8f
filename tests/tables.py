"""Tables of what is public, for contracts that hold for all of it."""

import jax

import jaxdist as jd

BLOCK = 128
SHARED_KEY = jax.random.key(11)

_codes = [
  jd.identity(block_size=BLOCK),
  jd.top_k(0.1, block_size=BLOCK),
  jd.top_k(0.1, block_size=BLOCK, values='bfloat16'),
  jd.top_k(1.0, block_size=BLOCK),
  jd.global_top_k(0.1),
  jd.global_top_k(0.1, values='bfloat16'),
  jd.random_k(0.1, block_size=BLOCK),
  jd.random_k(0.25, block_size=BLOCK, unbiased=True),
  jd.quantize(bits=8, block_size=BLOCK),
  jd.quantize(bits=4, block_size=BLOCK),
  jd.quantize(bits=2, block_size=BLOCK),
  jd.quantize(bits=8, stochastic=True, block_size=BLOCK),
  jd.quantize(bits=4, stochastic=True, block_size=BLOCK),
  jd.quantize(bits=2, stochastic=True, block_size=BLOCK),
  jd.float4(block_size=BLOCK),
  jd.float8(block_size=BLOCK),
  jd.sign(block_size=BLOCK),
  jd.ternary(block_size=BLOCK),
  jd.natural(block_size=BLOCK),
  jd.codebook(3, block_size=BLOCK),
  jd.codebook(5, density=0.2, block_size=BLOCK),
  jd.codebook(2, density=0.2, block_size=None),
  jd.chained(
    jd.top_k(0.1, block_size=BLOCK), jd.quantize(bits=4, block_size=BLOCK)
  ),
  jd.chained(
    jd.top_k(0.1, block_size=BLOCK),
    jd.quantize(bits=2, stochastic=True, block_size=BLOCK),
  ),
  jd.chained(
    jd.random_k(0.25, block_size=BLOCK, unbiased=True),
    jd.quantize(bits=4, stochastic=True, block_size=BLOCK),
  ),
  jd.chained(
    jd.random_k(0.25, block_size=BLOCK, unbiased=True),
    jd.sign(block_size=BLOCK),
  ),
  jd.rotated(jd.quantize(bits=4, block_size=BLOCK)),
  jd.rotated(jd.random_k(0.25, block_size=BLOCK, unbiased=True)),
  jd.sketch(0.25, block_size=BLOCK),
  jd.sketch(0.25, family='gaussian', block_size=BLOCK),
]

# Every public compressor by name; those that are seeded as they are made.
COMPRESSORS = {code.name: code for code in _codes}
