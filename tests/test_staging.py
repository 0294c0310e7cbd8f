"""A run that was given up, stopped at each moment of a save, and woken up.

Here it is a thread; tests/hosts/test_zombies.py stops processes.
"""

import contextlib
import errno
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxdist as jd
from jaxdist.checkpoint import pending, saving, staging


def state(step):
  return {'w': jnp.full(1000, step)}


def check(directory, *steps):
  """These checkpoints are there, whole, and no others."""
  names = filter(str.isdigit, os.listdir(directory))
  assert sorted(names) == [str(step) for step in steps]
  for step in steps:
    restored = jd.restore(directory, state(0), step=step)
    assert (restored['w'] == step).all()


# What is renamed at each moment of saving step 2 while 1 is there.
MOMENTS = {
  'written': ('2.orbax-checkpoint-tmp', '2'),
  'whole': ('2', '2'),
  'committed': ('1', '1'),
}


class Stop:
  """Stops the first renaming of a kind until it is released.

  By handle, it names the directories as clients of a network file system may:
  by what they were when it was stopped.
  """

  def __init__(self, moment, by_handle):
    self._names, self._by_handle = MOMENTS[moment], by_handle
    self.reached, self.released = threading.Event(), threading.Event()

  def rename(self, source, target):
    parents = Path(source).parent, Path(target).parent
    names = Path(source).name, Path(target).name
    if names != self._names or self.reached.is_set():
      return rename(source, target)
    with contextlib.ExitStack() as stack:
      handles = [os.open(parent, os.O_RDONLY) for parent in parents]
      for handle in handles:
        stack.callback(os.close, handle)
      self.reached.set()
      assert self.released.wait(30)
      if not self._by_handle:
        return rename(source, target)
      return rename(*names, src_dir_fd=handles[0], dst_dir_fd=handles[1])


rename = os.rename


@contextlib.contextmanager
def stopped(directory, moment, by_handle, monkeypatch):
  """A saver that was stopped while it saved step 2, after step 1."""
  jd.save(directory, 1, state(1))
  stop = Stop(moment, by_handle)
  monkeypatch.setattr(os, 'rename', stop.rename)
  saver = jd.Saver(directory, keep=1)
  saver.save(2, state(2))
  assert stop.reached.wait(30)
  try:
    yield saver
  finally:
    stop.released.set()


def before_writing(action, monkeypatch):
  """Does something once, when the next save has a place and wrote nothing."""
  seal = saving.integrity.seal

  def seal_late(arrays):
    monkeypatch.undo()
    action()
    return seal(arrays)

  monkeypatch.setattr(saving.integrity, 'seal', seal_late)


TAKEN_OVER = 'another run took over .*: this one saves there no more'


@pytest.mark.parametrize('by_handle', [False, True])
@pytest.mark.parametrize('moment', MOMENTS)
def test_who_was_given_up_changes_nothing(
  moment, by_handle, tmp_path, monkeypatch
):
  with stopped(tmp_path, moment, by_handle, monkeypatch) as old:
    with monkeypatch.context() as patch:
      if (
        by_handle and moment != 'committed'
      ):  # What was written still is there.
        patch.setattr(shutil, 'rmtree', lambda *_, **__: None)
      new = jd.Saver(tmp_path)
    there = [1, 2] if moment == 'committed' else [1]
    check(tmp_path, *there)
  with pytest.raises(RuntimeError, match=TAKEN_OVER):
    old.wait()
  old.wait()  # Once is enough.
  check(tmp_path, *there)
  step = there[-1] + 1
  new.save(step, state(step))
  new.wait()
  check(tmp_path, there[-1], step)
  jd.Saver(tmp_path)
  assert len(os.listdir(tmp_path)) == 3  # What was written is gone.


def test_who_makes_its_place_anew_commits_nothing(tmp_path, monkeypatch):
  """Stopped before anything was written, it writes all of it."""
  before_writing(lambda: jd.Saver(tmp_path), monkeypatch)
  with pytest.raises(RuntimeError, match=TAKEN_OVER):
    jd.save(tmp_path, 2, state(2))
  assert jd.latest_step(tmp_path) is None


def test_who_was_given_up_takes_nothing_back(tmp_path, monkeypatch):
  """Not by its next save, nor where it was stopped while it began."""
  directory = str(tmp_path)
  listing = staging._taken
  with stopped(tmp_path, 'written', False, monkeypatch) as new:
    # All may have been removed meanwhile, and numbers begun anew.
    for number in (1, 2):
      with monkeypatch.context() as patch:
        patch.setitem(staging._runs, directory, staging.Run(number, 'old'))
        with pytest.raises(RuntimeError, match=TAKEN_OVER):
          jd.save(tmp_path, 2, state(0))
    assert staging.current(directory).number == 2
    for seen in ([], [1]):  # The next number was 1 then, or 2.
      looks = iter([seen])
      look = lambda path, looks=looks: next(looks, listing(path))
      with monkeypatch.context() as patch:
        patch.setattr(staging, '_taken', look)
        with pytest.raises(RuntimeError, match=TAKEN_OVER):
          jd.Saver(tmp_path)
  new.wait()
  check(tmp_path, 2)


def test_a_directory_may_be_removed(tmp_path):
  jd.save(tmp_path / 'run', 1, state(1))
  shutil.rmtree(tmp_path / 'run')
  jd.save(tmp_path / 'run', 1, state(1))
  check(tmp_path / 'run', 1)


def test_a_directory_may_be_removed_during_a_save(tmp_path, monkeypatch):
  """Orbax makes the place anew; that is nobody's."""
  directory = tmp_path / 'run'
  before_writing(lambda: shutil.rmtree(directory), monkeypatch)
  with pytest.raises(RuntimeError, match=TAKEN_OVER):
    jd.save(directory, 1, state(1))
  jd.save(directory, 1, state(1))
  check(directory, 1)


def test_older_steps_that_cannot_be_removed(tmp_path, monkeypatch):
  def refuse(source, target):
    if Path(source) == tmp_path / '1':
      raise OSError(errno.EPERM, 'Operation not permitted')
    rename(source, target)

  jd.save(tmp_path, 1, state(1))
  with monkeypatch.context() as patch:
    patch.setattr(os, 'rename', refuse)
    with pytest.raises(
      RuntimeError, match=r'step 2 is saved in .* remain: Operation not'
    ):
      jd.save(tmp_path, 2, state(2), keep=1)
  check(tmp_path, 1, 2)
  jd.save(tmp_path, 3, state(3), keep=1)
  check(tmp_path, 3)


def test_at_the_end_all_saves_are_finished(tmp_path, monkeypatch, capsys):
  def refuse(source, target):
    if Path(target) == tmp_path / '0' / '1':
      raise OSError(errno.ENOSPC, 'No space left on device')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', refuse)
  for name in '012':
    jd.Saver(tmp_path / name).save(1, state(1))
  pending._end_what_nobody_waited_for()
  assert 'step 1 was not saved in' in capsys.readouterr().err
  for name, steps in zip('012', ([], [1], [1]), strict=True):
    check(tmp_path / name, *steps)


def test_readers_end_nothing(tmp_path, monkeypatch):
  with stopped(tmp_path, 'written', False, monkeypatch) as saver:
    assert jd.latest_step(tmp_path) == 1
    jd.restore(tmp_path, state(0))
    jd.checkpoint_metadata(tmp_path)
  saver.wait()
  check(tmp_path, 2)


def test_what_cannot_be_committed_is_said_once(tmp_path, monkeypatch):
  def refuse(source, target):
    if Path(target) == tmp_path / '2':
      raise OSError(errno.ENOSPC, 'No space left on device')
    rename(source, target)

  jd.save(tmp_path, 1, state(1))
  saver = jd.Saver(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(os, 'rename', refuse)
    saver.save(2, state(2))
    with pytest.raises(OSError, match=r'step 2 was not saved .*: No space'):
      saver.wait()
  saver.wait()
  check(tmp_path, 1)
  saver.save(2, state(2))
  saver.wait()
  check(tmp_path, 1, 2)


def test_who_is_killed_while_it_deletes_leaves_no_half(tmp_path, monkeypatch):
  jd.save(tmp_path, 1, state(1))
  jd.save(tmp_path, 2, state(2))
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', lambda *_, **__: None)
    jd.save(tmp_path, 3, state(3), keep=1)
  assert jd.latest_step(tmp_path) == 3
  assert {'1', '2'}.isdisjoint(os.listdir(tmp_path))
  assert len(os.listdir(tmp_path)) == 2
  jd.Saver(tmp_path)
  check(tmp_path, 3)
