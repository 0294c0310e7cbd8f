"""A recipe finds its neighbours beside itself, as a script does."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

sys.path.insert(0, str(Path(__file__).parents[2] / 'recipes'))


@pytest.fixture(scope='module')
def compile_fast(tmp_path_factory):
  """Compiling takes nearly all of the time here: little, and once."""
  options = {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: jax.config.values[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='session')
def data():
  """A text that is read in no time."""
  import text

  words = b'the quick brown fox jumps over the lazy dog, and again: '
  return text.Text(
    np.frombuffer(words * 40, np.uint8),
    np.frombuffer(words * 4, np.uint8),
    'words',
  )
