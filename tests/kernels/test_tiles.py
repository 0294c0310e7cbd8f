"""Tiles: whose are found, what a file may say, and how they are tuned."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxdist.kernels import tiles, tune
from jaxdist.kernels.quantize import tpu
from jaxdist.kernels.schedule import CHIPS

FILES = {
  'default': ['quantize', 'quantize int8', 'top_k'],
  'tpu-v5': ['quantize', 'quantize sign'],
  'tpu-v5-lite': ['quantize int8 stochastic'],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(tiles, 'FOLDER', tmp_path)
  for name, entries in FILES.items():
    sizes = {'step': 2**18, 'chunk': 2**15}
    file = tmp_path / f'{name}.json'
    file.write_text(json.dumps(dict.fromkeys(entries, sizes)))
  tiles._lookup.cache_clear()
  yield tmp_path
  tiles._lookup.cache_clear()


@pytest.mark.parametrize(
  ('kernel', 'kind', 'source'),
  [
    ('quantize int8 stochastic', 'TPU v5 lite', 'tpu-v5-lite: * stochastic'),
    ('quantize int8 stochastic', 'TPU v5e', 'tpu-v5-lite: * stochastic'),
    # The family goes before what is more particular, but of any kind.
    ('quantize int8', 'TPU v5 lite', 'tpu-v5: quantize'),
    ('quantize sign feedback', 'TPU v5p', 'tpu-v5: quantize sign'),
    ('top_k 10', 'TPU v5', 'default: top_k'),
    ('quantize int8', 'TPU v9', 'default: quantize int8'),
    ('quantize e4m3', '', 'default: quantize'),
  ],
)
def test_order_of_lookup(folder, kernel, kind, source):
  assert tiles.find(kernel, kind).source == source.replace('*', kernel[:13])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'tpu-v6.json must be JSON'),
    ('[]', r'must hold entries by name, got ..\.'),
    ('{"": {}}', ': the first word must be one of'),
    ('{"quantise": {}}', "quantise: the first word must be one of .'dequantiz"),
    ('{"top_k": {"step": 1}}', "must have 'step' and 'chunk', got {'step': 1}"),
    ('{"top_k": {"step": 300000, "chunk": 4096}}', 'power of two, got 300000'),
    ('{"top_k": {"step": 4096, "chunk": 8192}}', 'chunk 8192 and step 4096'),
  ],
)
def test_what_a_file_may_not_say(folder, text, message):
  (folder / 'tpu-v6.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    tiles.find('top_k', 'TPU v6')


def test_no_entry(folder):
  with pytest.raises(ValueError, match=r"default.json must .* for 'scatter'"):
    tiles.find('scatter', 'TPU v5')


def test_files_of_the_package():
  files = {path.stem: tiles.read(path) for path in tiles.FOLDER.iterdir()}
  assert files['default'].keys() == set(tiles.KERNELS)
  kinds = {tiles.path(kind).stem for kind in tiles.SPELLINGS.values()}
  assert files.keys() <= {*kinds, 'default', 'tpu7x'}
  assert len(CHIPS) == len(kinds) + 2


def test_kernels_find_their_tiles_each_time():
  x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
  forced = tiles.Tiles(2**18, 2**15, 'a test')
  for source in ('a test', 'default: quantize'):
    with tiles.watched(forced if source == 'a test' else None) as found:
      jax.eval_shape(lambda x: tpu.quantize(x, None, format='int8'), x)
    assert [(k, t.source) for k, t in found.items()] == [
      ('quantize int8', source)
    ]


def test_climb_finds_the_best_and_keeps_to_the_rules():
  start = tiles.Tiles(2**19, 2**14, 'x')

  def seconds(one):
    assert one.step >= tune.LEAST_STEP and one.chunk <= one.step
    return 1 + abs(one.chunk.bit_length() - 18) + one.step / 2**19

  best, first, least = tune.climb(start, seconds)
  assert (best.step, best.chunk) == (2**18, 2**17)
  assert (first, least) == (5, 1.5)
  flat = tune.climb(start, lambda one: 1 - one.chunk / 2**30)
  assert flat[0] == start  # Not worth an entry.


def test_what_is_right_keeps_its_tiles_beside_what_is_not(folder):
  def seconds(case, one):
    return 1.0 if 'feedback' in case.op else 1 / one.chunk

  better = tune.tune('TPU v5', '(quantize|feedback) sign$', seconds)
  sizes = {name: (one.step, one.chunk) for name, one in better.items()}
  assert sizes == {
    'quantize sign': (2**18, 2**18),
    'quantize sign feedback': (2**18, 2**15),
  }


def test_entries_are_added_to_a_file(folder):
  file = folder / 'tpu-v5.json'
  tune.write(file, {'hadamard': tiles.Tiles(2**19, 2**13, 'x')})
  entries = tiles.read(file)
  assert list(entries) == ['hadamard', *FILES['tpu-v5']]
  assert entries['hadamard'].step == 2**19
