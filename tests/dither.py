"""The random numbers of stochastic rounding, in NumPy alone."""

import jax
import numpy as np

ROTATIONS = [13, 15, 26, 6, 17, 29, 16, 24]


def threefry(keys, x, y, rounds):
  """Threefry2x32 of Random123."""
  keys = [int(k) for k in keys]
  keys.append(keys[0] ^ keys[1] ^ 0x1BD11BDA)
  mask = np.uint64(2**32 - 1)
  x = x.astype(np.uint64) + np.uint64(keys[0]) & mask
  y = y.astype(np.uint64) + np.uint64(keys[1]) & mask
  for i in range(rounds):
    left = np.uint64(ROTATIONS[i % 8])
    x = x + y & mask
    y = (y << left | y >> np.uint64(32) - left) & mask ^ x
    if i % 4 == 3:
      turn = i // 4 + 1
      x = x + np.uint64(keys[turn % 3]) & mask
      y = y + np.uint64(keys[(turn + 1) % 3] + turn) & mask
  return x, y


def dither(key, shape):
  """What rounding to nearest is shifted by: inside (-1/2, 1/2)."""
  rows, size = shape
  row, column = np.mgrid[:rows, : -(-size // 4)]
  words = threefry(jax.random.bits(key, (2,), np.uint32), row, column, 13)
  halves = [h for w in words for h in (w % 2**16, w >> np.uint64(16))]
  return (np.concatenate(halves, axis=1)[:, :size] + 0.5) / 2**16 - 0.5
