"""Saves beside training, on full disks, killed, and of several processes."""

import contextlib
import errno
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import abstract, place

import jaxdist as jd
from jaxdist.checkpoint import saving


def test_a_saver_writes_what_there_was(tmp_path, make_mesh):
  """Also when the state is donated, and overwritten, right behind it."""
  step = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  host = np.zeros(3)
  start = {
    'w': jnp.zeros(300_000),
    'e': jd.PerWorker(jnp.zeros((8, 1000))),
  }
  state = place(start, make_mesh())
  with jd.Saver(tmp_path, keep=3) as saver:
    for number in (1, 2, 3):
      state = jax.block_until_ready(step(state))
      host[:] = number
      saver.save(number, {**state, 'host': host}, metadata={'n': number})
    state = jax.block_until_ready(step(state))
    host[:] = 9
  for number in (1, 2, 3):
    like = {**abstract(state), 'host': host}
    for leaf in jax.tree.leaves(jd.restore(tmp_path, like, step=number)):
      np.testing.assert_array_equal(leaf, number)
    assert jd.checkpoint_metadata(tmp_path, number) == {'n': number}
  # Writing is too fast here to be overtaken for sure.
  for leaf in (host, jnp.zeros(300_000)):
    copied = saving.copied(leaf)
    assert not np.shares_memory(copied, np.asarray(leaf))


@contextlib.contextmanager
def small_files():
  """No file may grow beyond 64 kB: what a full disk does, for one process."""
  resource = pytest.importorskip('resource')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(seed):
  return {'w': np.random.default_rng(seed).normal(size=50_000)}


NOT_SAVED = (
  r'step 2 was not saved in .*: File too large\. Checkpoints that were there '
  r'still are'
)


def test_a_full_disk_is_named_and_training_can_go_on(tmp_path, capfd, caplog):
  jd.save(tmp_path, 1, noise(1))
  with small_files(), pytest.raises(OSError, match=NOT_SAVED) as caught:
    jd.save(tmp_path, 2, noise(2))
  assert caught.value.errno == errno.EFBIG
  # The error says it all; Orbax would log pages.
  assert not caplog.records and not capfd.readouterr().err
  np.testing.assert_array_equal(
    jd.restore(tmp_path, noise(0))['w'], noise(1)['w']
  )
  jd.save(tmp_path, 2, noise(2))
  assert sorted(os.listdir(tmp_path)) == ['1', '2', 'saving-1']


def test_a_saver_raises_at_the_next_call(tmp_path):
  saver = jd.Saver(tmp_path)
  saver.save(1, noise(1))
  saver.wait()
  with small_files():
    saver.save(2, noise(2))
    with pytest.raises(OSError, match=NOT_SAVED):
      saver.save(3, noise(3))
  saver.wait()  # Once is enough.
  saver.save(3, noise(3))
  saver.wait()
  assert sorted(os.listdir(tmp_path)) == ['1', '3', 'saving-1']
  with small_files(), pytest.raises(OSError, match='step 4 was not saved'):  # noqa: SIM117
    with jd.Saver(tmp_path) as saver:
      saver.save(4, noise(4))
  with pytest.raises(ValueError, match='keep must be at least 1, got 0'):
    jd.Saver(tmp_path, keep=0)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  message = r'step 1 was not saved in .*file/run: Not a directory'
  with pytest.raises(OSError, match=message):
    jd.save(tmp_path / 'file' / 'run', 1, noise(1))


def start(script, *args):
  """Starts Python as this one runs, with stdin and stdout as pipes."""
  root = pathlib.Path(jd.__file__).parent.parent
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', script, *map(str, args)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'},
  )


SAVES_FOR_EVER = """
import itertools, sys
import jax
import jax.numpy as jnp
import jaxdist as jd
state = lambda step: {
  'w': [jnp.full(50_000, step) for _ in range(4)],
  'e': jd.PerWorker(jnp.full((4, 1000), step)),
}
jax.block_until_ready(state(0))
directory, keep, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if kind == 'saver':
  saver = jd.Saver(directory, keep=keep)
  save = lambda *args: (saver.save(*args), saver.wait())
else:
  save = lambda *args: jd.save(directory, *args, keep=keep)
print('ready', flush=True)
sys.stdin.readline()
for step in itertools.count(1):
  print('saving', step, flush=True)
  save(step, state(step))
  print('saved', step, flush=True)
"""


def kill_while_saving(saver, after, fraction):
  """Kills a process in its next save, and says how many it had finished."""
  with saver:
    assert saver.stdout.readline() == 'ready\n'
    saver.stdin.write('go\n')
    saver.stdin.flush()
    began = time.monotonic()
    for saved in range(1, after + 1):
      assert saver.stdout.readline() == f'saving {saved}\n'
      assert saver.stdout.readline() == f'saved {saved}\n'
    seconds_a_save = (time.monotonic() - began) / after
    assert saver.stdout.readline() == f'saving {after + 1}\n'
    time.sleep(fraction * seconds_a_save)
    saver.kill()
    return after + sum(line.startswith('saved') for line in saver.stdout)


def check_killed_saves(directory, trials, seed):
  """Of so many savers, killed at random moments, each leaves a whole state."""
  # Seeded, but the moment also depends on how busy the machine is.
  rng = random.Random(seed)
  like = {
    'w': [jax.ShapeDtypeStruct((50_000,), jnp.int32) for _ in range(4)],
    'e': jd.PerWorker(jax.ShapeDtypeStruct((4, 1000), jnp.int32)),
  }
  kinds = ['save', 'saver', 'save']
  paths = {
    directory / str(trial): (1 + trial % 2, kinds[trial % 3])
    for trial in range(trials)
  }
  savers = [start(SAVES_FOR_EVER, path, *how) for path, how in paths.items()]
  try:
    for saver, (path, (keep, _)) in zip(savers, paths.items(), strict=True):
      saved = kill_while_saving(saver, rng.randint(1, 3), rng.uniform(0, 1))
      # The save that was killed may have been committed just before.
      newest = jd.latest_step(path)
      assert newest in (saved, saved + 1)
      restored = jd.restore(path, like)
      assert jd.latest_step(path) == newest
      assert all((x == newest).all() for x in jax.tree.leaves(restored))
      jd.save(path, newest + 1, restored, keep=keep)
      kept = range(newest + 2 - keep, newest + 2)
      names = [*map(str, kept), 'saving-2']
      assert sorted(os.listdir(path)) == sorted(names)
  finally:
    for saver in savers:
      saver.kill()


def test_a_killed_save_leaves_the_newest_committed_one_whole(tmp_path):
  check_killed_saves(tmp_path, trials=4, seed=0)


@pytest.mark.slow
def test_50_killed_saves_leave_the_newest_committed_one_whole(tmp_path):
  for seed in range(10):
    check_killed_saves(tmp_path / str(seed), trials=5, seed=seed)


ONE_OF_TWO = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 2)
address, rank, directory = sys.argv[1:]
jax.distributed.initialize(
  address, num_processes=2, process_id=int(rank),
  coordinator_bind_address=address, cluster_detection_method='deactivate')
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxdist as jd

mesh = jax.make_mesh((4,), ('data',))
def make(value, *spec):
  return jax.make_array_from_callback(
    value.shape, NamedSharding(mesh, P(*spec)), value.__getitem__)
value = np.arange(8, dtype=np.float32).reshape(4, 2)
state = {'w': make(value), 'e': jd.PerWorker(make(value, 'data')), 'n': 3}
jd.assert_in_sync(state)
jd.save(directory, 1, state)
with jd.Saver(directory) as saver:
  saver.save(2, state)
from jaxdist.checkpoint import layout
lists = layout.checkpoints
if rank == '1':
  layout.checkpoints = lambda _: {}  # As a network file system may list it.
restored = jd.restore(directory, state)
layout.checkpoints = lists
jax.tree.map(lambda x, y: np.testing.assert_array_equal(
  *(jax.experimental.multihost_utils.process_allgather(z, tiled=True)
    for z in (x, y))), state, restored)
assert restored['e'].value.sharding == state['e'].value.sharding

half = jax.make_mesh((2,), ('data',), devices=mesh.devices[::2])
small = jax.ShapeDtypeStruct(
  (2, 2), jnp.float32, sharding=NamedSharding(half, P('data')))
small = jd.restore(directory, state | {'e': jd.PerWorker(small)})['e'].value
turned = jax.ShapeDtypeStruct(
  (4, 2), jnp.float32, sharding=NamedSharding(half, P(None, 'data')))
turned = jd.restore(directory, state | {'e': jd.PerWorker(turned)})['e'].value
np.testing.assert_array_equal(
  turned.addressable_shards[0].data, value[:, int(rank):int(rank) + 1])
np.testing.assert_array_equal(
  small.addressable_shards[0].data, [[[1, 2]], [[5, 6]]][int(rank)])

wrong = jax.make_array_from_single_device_arrays(
  value.shape, state['w'].sharding,
  [jax.device_put(value + int(rank) * (value == 5), device)
   for device in mesh.local_devices])
try:
  jd.assert_in_sync(state | {'w': wrong})
except jd.OutOfSyncError as error:
  print('found:', error)
try:
  jd.assert_in_sync(state | {'n': 3.0 if rank == '1' else 3})
except jd.OutOfSyncError as error:
  print('found:', error)

# One process finds it, all go back a step.
import warnings
from jaxdist.checkpoint import integrity
check, answers = integrity.check, ["['e'][2:3, 0:2]"]
if rank == '1':
  integrity.check = lambda *args: answers.pop() if answers else check(*args)
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  back = jd.restore(directory, state)
print('back at', jd.latest_step(directory))
print(*[x.message for x in caught
        if x.category is jd.CorruptCheckpointWarning])
assert back['e'].value.sharding == state['e'].value.sharding

# What the first process cannot do, all hear of at once, and can go on.
import os, pathlib, time
rename = os.rename
def refused(source, target):
  if '-tmp' in str(source):
    raise OSError(5, 'Input/output error')
  rename(source, target)
if rank == '0':
  os.rename = refused
began = time.monotonic()
try:
  jd.save(directory, 3, state)
except OSError as error:
  print('refused:', error, time.monotonic() - began < 20)
os.rename = rename
jd.save(directory, 4, state, keep=1)
print('saved', sorted(os.listdir(directory)), flush=True)
# A thread of Orbax still waits for the first one, for minutes.
ended = pathlib.Path(directory + '.ended')
while rank == '0' and not ended.exists():
  time.sleep(0.01)
ended.touch()
os._exit(0)
"""


def test_two_processes(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  ranks = [start(ONE_OF_TWO, address, rank, tmp_path) for rank in range(2)]
  try:
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
  finally:
    for rank in ranks:
      rank.kill()
  assert [rank.returncode for rank in ranks] == [0, 0]
  for output in outputs:
    assert 'back at 1' in output
    assert re.search('refused: .*step 3 was not .*: Input.* True', output)
    assert re.search(r"/2 is damaged: \['e'\]\[2:3.* Restored step 1", output)
    found = [line for line in output.splitlines() if line.startswith('found:')]
    differs, other_tree = found
    assert differs.startswith("found: ['w'] is out of sync")
    assert differs.endswith('the two are on other processes.')
    assert other_tree.startswith('found: processes [1] hold a tree of other')
  assert "saved ['2.damaged', '4', 'saving-2']" in outputs[0]
  # One process reads what two have written, for another number of workers.
  like = {'w': jnp.zeros((4, 2)), 'e': jd.PerWorker(jnp.zeros((2, 2))), 'n': 0}
  restored = jd.restore(tmp_path, like)
  assert restored['e'].value.tolist() == [[1, 2], [5, 6]]
  assert restored['n'] == 3
