"""Damaged checkpoints are found, and the one before is restored."""

import errno
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdist as jd
from jaxdist.keys import is_key

# Orbax leaves reads that it has begun and then given up.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def make_state(step, mesh):
  """A state of several dtypes, whole and in parts."""
  rng = np.random.default_rng(step)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  split = NamedSharding(mesh, PartitionSpec('data'))
  return {
    'params': {'w': normal(40, 30), 'b': normal(30).astype(jnp.bfloat16)},
    'residual': jd.PerWorker(jax.device_put(normal(4, 40, 30), split)),
    'key': jax.random.key(step),
    'words': jnp.asarray(rng.integers(0, 2**32, 500), jnp.uint32),
    'empty': jnp.zeros((0, 3)),
    'step': step,
  }


def bits(state):
  """All bytes of a state."""
  data = lambda x: jax.random.key_data(x) if is_key(x) else x
  return [np.asarray(data(x)).tobytes() for x in jax.tree.leaves(state)]


@pytest.fixture(scope='module')
def saved(tmp_path_factory, make_mesh):
  """A directory with steps 1 and 2, and the states in them."""
  directory = tmp_path_factory.mktemp('saved')
  states = {step: make_state(step, make_mesh(4)) for step in (1, 2)}
  for step, state in states.items():
    jd.save(directory, step, state, metadata={'seed': [step, 0.1, 'é']})
  return directory, states


@pytest.fixture
def copy(saved, tmp_path):
  """Makes a fresh copy of them."""

  def make():
    directory = tmp_path / 'copy'
    shutil.rmtree(directory, ignore_errors=True)
    return Path(shutil.copytree(saved[0], directory))

  return make


def data_file(path):
  """The file with the numbers."""
  files = (path / 'state').rglob('d/*')
  return max(files, key=lambda file: file.stat().st_size)


def flip(file, bit):
  data = bytearray(file.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  file.write_bytes(data)


def damage(path, rng):
  """Flips bits of a random file, cuts it off or removes it; in words."""
  file = rng.choice(sorted(file for file in path.rglob('*') if file.is_file()))
  size = file.stat().st_size
  what = rng.choice(['flip', 'flip', 'cut', 'remove'])
  what = what if size else 'remove'  # Some say all by their name.
  if what == 'flip':
    for _ in range(rng.choice([1, 1, 8])):
      flip(file, rng.randrange(8 * size))
  elif what == 'cut':
    os.truncate(file, rng.randrange(size))
  else:
    file.unlink()
  return f'{what} {file}'


def restore(directory, like):
  """What is restored, and the warnings about damage."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    state = jd.restore(directory, like)
  kinds = [str(w.message) for w in caught]
  return state, [m for m in kinds if 'damaged' in m or 'not written' in m]


def check_random_damage(saved, copy, trials):
  """Counts what was found; all else must be harmless."""
  states = saved[1]
  expected = {step: bits(state) for step, state in states.items()}
  rng = random.Random(trials)
  found = 0
  for _ in range(trials):
    directory = copy()
    what = damage(directory / '2', rng)
    state, messages = restore(directory, states[1])
    step = jd.latest_step(directory)
    assert bits(state) == expected[step], what
    assert jd.checkpoint_metadata(directory)['seed'] == [step, 0.1, 'é'], what
    assert (step == 1) == bool(messages), what
    assert (step == 1) == (directory / '2.damaged').exists(), what
    found += step == 1
  return found


def test_random_damage_is_found_or_harmless(saved, copy):
  assert check_random_damage(saved, copy, 12) > 0


@pytest.mark.slow
def test_random_damage_is_found_or_harmless_200_times(saved, copy):
  print(check_random_damage(saved, copy, 200), 'of 200 found')


def test_every_flip_among_the_numbers_is_found(saved, copy):
  """But not each file is read, nor each byte of one."""
  directory, states = copy(), saved[1]
  file = data_file(directory / '2')
  good = file.read_bytes()
  rng = random.Random(0)
  found = set()
  for _ in range(12):
    flip(file, rng.randrange(8 * len(good)))
    try:
      assert bits(jd.restore(directory, states[1], step=2)) == bits(states[2])
    except jd.CorruptCheckpointError as error:
      found.add(str(error).partition('damaged: ')[2].split(' ')[0])
    file.write_bytes(good)
  # The one in parts names its part.
  assert any(name.startswith("['residual'].value[") for name in found)
  assert len(found) >= 3
  # Named, there is nothing to fall back to, and nothing is set aside.
  assert sorted(os.listdir(directory)) == ['1', '2', 'saving-1']


def test_the_report_names_leaf_and_files(saved, copy):
  directory, states = copy(), saved[1]
  data_file(directory / '2').unlink()
  with pytest.warns(
    jd.CorruptCheckpointWarning,
    match=r"/2 is damaged: \['.* cannot be read any more\. Restored step 1 inst"
    r'ead; the damaged one is now .*/2\.damaged\.',
  ):
    state = jd.restore(directory, states[2])
  assert bits(state) == bits(states[1])
  # Training goes on to the same step again, and again it is damaged.
  jd.save(directory, 2, states[2])
  data_file(directory / '2').unlink()
  with pytest.warns(jd.CorruptCheckpointWarning, match=r'2\.damaged-2\.'):
    jd.restore(directory, states[2])
  names = ['1', '2.damaged', '2.damaged-2', 'saving-2']
  assert sorted(os.listdir(directory)) == names


def test_what_cannot_be_set_aside_is_no_reason_to_go_back(
  saved, copy, monkeypatch
):
  directory, states = copy(), saved[1]
  data_file(directory / '2').unlink()

  def refuse(*args):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr(os, 'replace', refuse)
  monkeypatch.setattr(os, 'rename', refuse)
  message = r'/2 is damaged: .* set aside \(Read-only file system\): name the'
  with pytest.raises(jd.CorruptCheckpointError, match=message):
    jd.restore(directory, states[2])
  assert bits(jd.restore(directory, states[2], step=1)) == bits(states[1])


def test_without_a_good_one_all_stay_and_it_raises(saved, copy):
  directory, states = copy(), saved[1]
  for step in '12':
    data_file(directory / step).unlink()
  with pytest.raises(jd.CorruptCheckpointError, match=r'all .*/2 is .*/1 is'):
    jd.restore(directory, states[1])
  assert sorted(os.listdir(directory)) == ['1', '2', 'saving-1']
  shutil.rmtree(directory / '1')
  with pytest.raises(jd.CorruptCheckpointError, match='/2 is damaged'):
    jd.restore(directory, states[1])


def test_a_damaged_record_is_found(saved, copy):
  """Also where it is good JSON with the right names."""
  directory = copy()
  file = directory / '2' / 'jaxdist' / 'data.json'
  record = json.loads(file.read_text())
  record['metadata']['seed'][0] = 3
  file.write_text(json.dumps(record))
  with pytest.raises(jd.CorruptCheckpointError, match='the record of its leav'):
    jd.checkpoint_metadata(directory)
  _, messages = restore(directory, saved[1][1])
  assert len(messages) == 1
  assert jd.checkpoint_metadata(directory)['seed'][0] == 1


def test_another_model_or_place_is_no_damage(saved, copy, make_mesh):
  directory, states = copy(), saved[1]
  other = states[1] | {'words': jnp.zeros(3, jnp.uint32)}
  with pytest.raises(ValueError, match=r"\['words'\] has shape") as caught:
    jd.restore(directory, other)
  assert not isinstance(caught.value, jd.CorruptCheckpointError)
  split = NamedSharding(make_mesh(3), PartitionSpec('data'))
  other = states[1] | {
    'words': jax.ShapeDtypeStruct((500,), jnp.uint32, sharding=split)
  }
  with pytest.raises(ValueError, match='partitioned 3 times') as caught:
    jd.restore(directory, other)
  assert not isinstance(caught.value, jd.CorruptCheckpointError)
  assert sorted(os.listdir(directory)) == ['1', '2', 'saving-1']


def test_shards_are_checked_in_any_other_cut(saved, copy, make_mesh):
  """In smaller, larger and crossing parts, and in host memory."""
  directory, states = copy(), saved[1]
  specs = {
    2: PartitionSpec('data'),
    4: PartitionSpec(None, 'data'),
    8: PartitionSpec(None, 'data'),
  }
  file = data_file(directory / '2')
  good = file.read_bytes()
  likes = [
    states[1]
    | {
      'residual': jd.PerWorker(
        jax.ShapeDtypeStruct(
          (4, 40, 30), jnp.float32, sharding=NamedSharding(make_mesh(n), spec)
        )
      )
    }
    for n, spec in specs.items()
  ]
  likes.append(
    jax.tree.map(np.asarray, states[1] | {'key': ()})
    | {'key': states[1]['key']}
  )
  for like in likes:
    assert bits(jd.restore(directory, like, step=2)) == bits(states[2])
  flip(file, 8 * 12000)
  for like in likes:
    with pytest.raises(jd.CorruptCheckpointError, match='is not what was sav'):
      jd.restore(directory, like, step=2)
  file.write_bytes(good)
