"""The language-model recipe: what it leaves, how it stops and what it refuses.

Models are tiny and untrained; whether a method trains well is not tested here.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupt
import jax
import lm
import methods
import numpy as np
import place
import pytest
import record
from rich.console import Console

import jaxdist as jd

pytestmark = pytest.mark.usefixtures('compile_fast')

ROOT = Path(__file__).parents[2]
# Seconds for what takes ten on a quiet machine.
LIMIT = 240
TINY = lm.Config(
  steps=7,
  workers=2,
  batch=2,
  length=16,
  every_eval=3,
  layers=1,
  width=32,
)


@pytest.fixture(scope='module')
def unbroken(data):
  """Runs that nothing stopped, by method."""
  return functools.cache(lambda method: lm.train(TINY, method, data))


@pytest.fixture
def run_main(monkeypatch, capsys):
  """Runs the command line in this process, whose devices are there already."""

  def run(*arguments):
    monkeypatch.setattr(lm, 'prepare_devices', lambda *_: None)
    monkeypatch.setattr(sys, 'argv', ['lm.py', *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
      lm.main()
    captured = capsys.readouterr()
    code = stopped.value.code
    message = code if isinstance(code, str) else captured.out + captured.err
    if message == captured.err:
      assert code == 2  # The launcher does not try refused settings again.
    return re.sub(r'[\s│╭╮╰╯─]+', ' ', message)

  return run


def without_times(lines):
  return [
    {name: x for name, x in line.items() if not name.endswith('seconds')}
    for line in lines
  ]


# Training.


# Parameters that all share and that drift, with and without a residual;
# tests/test_resume.py has the states of all transforms.
@pytest.mark.parametrize(
  'method',
  [
    *('dense', 'local-sgd'),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('gossip', 'dgc')),
  ],
)
def test_run_that_was_stopped_goes_on_with_the_same_losses(
  method, data, unbroken, tmp_path
):
  folder = record.Folder(tmp_path)
  stopped = lm.train(
    TINY, method, data, folder, watch=lambda line: line['step'] == 4
  )
  assert len(stopped.lines) == 4
  # As if the process had been killed a step after its checkpoint.
  folder.append({'run': method, 'step': 5, 'loss': 0.0}, sync=False)
  with folder.metrics.open('a') as file:
    file.write('{"run": "den')
  resumed = lm.train(TINY, method, data, folder)
  assert without_times(resumed.lines) == without_times(unbroken(method).lines)
  assert folder.load(method).lines == resumed.lines
  assert folder.load(method).traffic == resumed.traffic
  times = [line['seconds'] for line in resumed.lines]
  assert times == sorted(times)


@pytest.mark.parametrize('method', methods.METHODS)
def test_lines_count_the_bytes_of_the_compiled_step(method, unbroken):
  run = unbroken(method)
  assert 0 < run.val_loss < 6
  each, dense = run.traffic.bytes_a_step, unbroken('dense').traffic.bytes_a_step
  flag = 4  # Tells that sums are finite; 0/1 Adam looks at its parameters.
  assert each > 0
  if methods.find(method).stage(0) is not None:
    # All of them are in the warm-up and send whole numbers.
    assert each < dense / 20
    each = dense - flag * (method == 'zero-one-adam')
  assert [(line['step'], line['bytes_sent']) for line in run.lines] == [
    (step, round(step * each)) for step in range(1, 8)
  ]


def test_bytes_of_a_warm_up_are_in_the_sum(unbroken):
  def sent(name, steps):
    traffic = unbroken(name).traffic
    stages = methods.find(name).stages(steps)
    return methods.total(methods.bytes_a_step, traffic, stages)

  each = unbroken('one-bit-adam').traffic.bytes_a_step
  whole = sent('dense', 1)
  assert sent('one-bit-adam', 150) == 100 * whole + 50 * each
  # All but the flag is sent by 0/1 Adam: at once, then in one of four steps.
  coded, whole = each - 4, whole - 4
  assert sent('zero-one-adam', 150) == (
    45 * whole + 55 * coded + 50 * coded / 4
  )
  # As many refreshes as 0/1 Adam makes.
  tx = methods.find('zero-one-adam').build('w', lambda step: 1e-3)
  state = jd.init(tx, {'w': np.ones(8, np.float32)}, workers=1, axis='w')
  step = jd.train_step(
    lambda params, batch: (params['w'] ** 2).sum(), tx, workers=1, axis='w'
  )
  for _ in range(methods.WARMUP):
    state, _ = step(state, np.zeros((1, 1)))
  assert 45 in [
    int(x)
    for path, x in jax.tree.leaves_with_path(state)
    if jax.tree_util.keystr(path).endswith('.refreshes')
  ]


def test_simulated_workers_train_and_send_as_devices_do(
  data, unbroken, monkeypatch
):
  on_mesh = unbroken(methods.DENSE)
  mesh = place.find_place(2).mesh
  monkeypatch.setattr(
    lm, 'find_place', lambda workers: place.Place(workers, None, mesh, '')
  )
  simulated = lm.train(TINY, methods.DENSE, data)
  assert simulated.traffic == on_mesh.traffic
  # Sums are taken in another order.
  np.testing.assert_allclose(
    [line['loss'] for line in simulated.lines],
    [line['loss'] for line in on_mesh.lines],
    rtol=1e-4,
  )


def test_place_takes_a_device_a_worker_and_simulates_without():
  found = place.find_place(2)
  assert found.mesh.shape == {place.AXIS: 2}
  assert found.words == '2 workers on 2 cpu devices'
  assert place.find_place(None).workers == len(jax.devices())


# The whole command.


@pytest.fixture
def start(tmp_path):
  """Starts the recipe, and ends what a failed test leaves running."""
  processes = []

  def start(out, *arguments):
    command = [sys.executable, ROOT / 'recipes/lm.py', '--out', out]
    command += ['--steps', '40', '--workers', '2', '--batch', '2']
    command += ['--length', '16', '--layers', '1', '--width', '32']
    command += ['--every-eval', '10', '--data', tmp_path / 'text', *arguments]
    process = subprocess.Popen(
      [str(word) for word in command],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=tmp_path,
      env={
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'COLUMNS': '100',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      },
    )
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.wait()
    process.stdout.close()


def wait_for_step(process, out, run, step):
  end = time.monotonic() + LIMIT
  while time.monotonic() < end and process.poll() is None:
    lines = record.Folder(out).load_lines(run)
    if lines and lines[-1]['step'] >= step:
      return
    time.sleep(0.005)
  process.kill()
  pytest.fail(process.communicate()[0])


def test_ctrl_c_leaves_what_resume_goes_on_from(start, tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(25):
    (folder / f'{i}.txt').write_text(f'Some words, file {i}. ' * 40)
  broken = start(tmp_path / 'broken')
  wait_for_step(broken, tmp_path / 'broken', lm.Config.method, 3)
  broken.send_signal(signal.SIGINT)
  said = broken.communicate(timeout=LIMIT)[0]
  assert broken.returncode == 130, said
  assert 'lm.py' in said and said.rstrip().endswith('--resume'), said

  resumed = start(tmp_path / 'broken', '--resume')
  whole = start(tmp_path / 'whole')
  said = resumed.communicate(timeout=LIMIT)[0]
  assert resumed.returncode == 0, said
  assert 'dense step' not in said, 'dense was trained again'
  expected = whole.communicate(timeout=LIMIT)[0]
  assert whole.returncode == 0, expected
  lines = [
    without_times(record.Folder(tmp_path / name).load_lines())
    for name in ('whole', 'broken')
  ]
  assert lines[0] == lines[1]
  assert len(lines[0]) == 80

  method = lm.Config.method
  for printed in (said, expected):
    assert re.search(r'│ dense +│ +\d\.\d{4} │ .* 1x │', printed), printed
    assert re.search(rf'│ {method} +│ +\d\.\d{{4}} │ .*\dx │', printed), printed
    assert '2 workers on 2 cpu devices' in printed
  page = (tmp_path / 'broken/report.html').read_text()
  assert page.count('<svg') == 3
  assert method in page
  assert str(methods.find(method).learning_rate) in page
  # Nothing is fetched: all addresses are inside the page.
  assert not re.search(r'https?:|<script|<link|@import', page)
  assert all(
    address.startswith('#') for address in re.findall(r'href="([^"]*)"', page)
  )


def test_second_ctrl_c_is_not_caught():
  before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    asked = interrupt.Interrupt(Console(), jd.World())
    assert not asked.stops_after(1)
    signal.raise_signal(signal.SIGINT)
    assert asked.stops_after(1)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@pytest.mark.parametrize(
  'moment, expected',
  [
    # Before the first step, in the first run, before and after the second.
    *((0, ('b', 3)), (1, ('b', 4)), (2, ('b', 5)), (3, ('c', 1)), (5, None)),
  ],
)
def test_sigterm_is_heard_at_any_moment(moment, expected, monkeypatch):
  # As JAX has it: the step after the last that was asked about.
  jax_has = {'last': 0, 'stop': None}

  def reached(step):
    jax_has['last'] = step
    return step == jax_has['stop']

  monkeypatch.setattr(
    interrupt.multihost_utils, 'reached_preemption_sync_point', reached
  )
  before = signal.getsignal(signal.SIGINT)
  asked = interrupt.Interrupt(Console(), jd.World(0, 2))
  signal.signal(signal.SIGINT, before)
  stopped = None
  # Resumed after step 2 of 5; the second run is new.
  for number, at in enumerate(
    [('b', 3), ('b', 4), ('b', 5), ('c', 1), ('c', 2)]
  ):
    if number == moment:
      jax_has['stop'] = jax_has['last'] + 1
    if asked.stops_after(at[1]):
      stopped = at
      break
  assert stopped == expected


# The command line.


def test_help_explains_each_method(run_main):
  said = run_main('--help')
  for method in methods.METHODS.values():
    assert f'{method.name}: {method.help}' in said


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--stpes', 3], 'Perhaps you meant: --steps'),
    (['--method', 'local-topk'], 'Did you mean local-top-k?'),
    (['--method', 'xyz'], 'must be one of dense, '),
    (['--steps', 0], '--steps must be at least 1, got 0.'),
    (['--workers', 0], '--workers must be at least 1, got 0.'),
    (['--every-eval', 0], '--every-eval must be at least 1, got 0.'),
    (['--check-sync', -1], '--check-sync must be at least 0, got -1.'),
    (['--heads', 3], '--width must be an even multiple of --heads'),
    (['--lr', -1], '--lr must be positive, got -1.0.'),
    (['--seed', 2**32], '--seed must be in [0, 2**32), got 4294967296.'),
    (['--data', '/no/such'], '--data must be a file or a folder, got /no/such'),
    (['--resume'], '--resume must find a comparison in --out'),
    (['--resume', '--overwrite'], 'exclude each other'),
  ],
)
def test_bad_input_is_refused(arguments, message, run_main, tmp_path):
  assert message in run_main('--out', tmp_path / 'out', *arguments)


def test_too_little_text_is_refused(run_main, tmp_path):
  (tmp_path / 'short').write_text('too short')
  said = run_main('--data', tmp_path / 'short', '--out', tmp_path / 'out')
  assert 'bytes for training, got 8 from' in said
  assert not (tmp_path / 'out').exists()


def test_unreadable_text_is_refused(run_main, tmp_path, monkeypatch):
  (tmp_path / 'secret').write_text('nobody may read this')

  def refuse(path):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(Path, 'read_bytes', refuse)
  said = run_main('--data', tmp_path / 'secret', '--out', tmp_path / 'out')
  assert '--data must be readable' in said and 'Permission denied' in said


def test_results_are_neither_lost_nor_mixed(run_main, tmp_path, monkeypatch):
  monkeypatch.setattr(lm, 'compare', lambda *args: sys.exit('compared'))
  arguments = ('--out', tmp_path, '--workers', 2)
  assert run_main(*arguments) == 'compared'
  assert 'add --resume to go on' in run_main(*arguments)
  assert run_main(*arguments, '--resume') == 'compared'
  said = run_main(*arguments, '--resume', '--steps', 3)
  assert f'got another steps: {lm.Config.steps} before, 3 now.' in said
  said = run_main(*arguments, '--resume', '--method', 'quantized')
  assert f'another method: {lm.Config.method} before, quantized now.' in said
  (tmp_path / 'mine.txt').write_text('not a result')
  assert run_main(*arguments, '--overwrite', '--steps', 3) == 'compared'
  assert json.loads((tmp_path / 'settings.json').read_text())['steps'] == 3
  assert (tmp_path / 'mine.txt').exists()


def test_lost_metrics_are_noticed(data, tmp_path):
  folder = record.Folder(tmp_path)
  folder.begin({'steps': 7}, 'here')
  lm.train(TINY, methods.DENSE, data, folder)
  folder.check({'steps': 7}, resume=True, overwrite=False)
  first, *others = folder.metrics.read_text().splitlines(keepends=True)
  del first
  folder.metrics.write_text(''.join(others))
  with pytest.raises(ValueError, match='some of the 7 of dense are missing'):
    folder.check({'steps': 7}, resume=True, overwrite=False)


def test_a_full_disk_stops_training_or_not_as_asked(tmp_path):
  resource = pytest.importorskip('resource')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  lines = [{'run': 'dense', 'step': step + 1} for step in range(40)]
  folder = record.Folder(tmp_path, keep_going=True)
  state = {'w': np.random.default_rng(0).normal(size=1000)}
  saver = jd.Saver(folder.checkpoints('dense'))
  for line in lines[:20]:
    folder.append(line, sync=False)
  resource.setrlimit(resource.RLIMIT_FSIZE, (590, before[1]))
  try:
    for line in lines[20:30]:
      with pytest.warns(UserWarning, match=r'File too large.* goes on\.'):
        folder.append(line, sync=True)
    with pytest.warns(UserWarning, match=r'step 30 was not saved .* goes on\.'):
      folder.save(saver, 30, state)
    assert folder.load_lines() == lines[:20]
    with pytest.raises(OSError, match='step 30 was not saved'):
      record.Folder(tmp_path).save(saver, 30, state)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  for line in lines[30:]:
    folder.append(line, sync=True)
  folder.save(saver, 40, state)
  assert folder.load_lines() == lines
  assert jd.latest_step(folder.checkpoints('dense')) == 40


def test_folder_in_use_is_refused(run_main, tmp_path):
  with record.locked(tmp_path):
    said = run_main('--out', tmp_path, '--workers', 2)
  assert f'--out must not be in use, got {tmp_path}' in said


def test_out_that_is_a_file_is_refused(run_main, tmp_path):
  (tmp_path / 'file').write_text('')
  said = run_main('--out', tmp_path / 'file', '--workers', 2)
  assert '--out must be a folder to write to' in said
