"""Processes that differ raise before a number is delivered."""

import jax
import jax.numpy as jnp
import pytest
import worlds
from jax import lax
from jax.sharding import PartitionSpec

import jaxdist as jd
from jaxdist.hosts import desync

FIELDS = {
  'order': r'the same instructions in a step, .*\[0:8\].*\[8:16\]',
  'dtype': r'the same arguments in a step, but item 0 is .*float32.*int32',
  'op': r'the same collectives in .* item 1 is .*add.* and .*maximum',
  'length': r'the same collectives in .* item 0 is .*8xf32.*7xf32',
  'kind': r'the same collectives in .* item 1 is .*reduce.*all_gather',
  'extra': r"the same collectives in .* item 2 is nothing on .*'all_reduce add",
  'step': r"number of steps in a step, but item 0 is '0' on .* and '1' on",
  'mesh': r"the same mesh in jaxdist.init, but item 1 is 'device 0 of process",
  'config': r'the same instructions in a step, but item .*1.*e-01.*2.*e-01',
  'code': r'the same collectives in a step',
  'treedef': r"the same params in jaxdist.init, but item 1 .*'b'.*'c'",
}


def check(processes, out):
  with worlds.World('desync.py', processes, out, 60) as world:
    world.go()
    world.end()
    results = world.results()
  last = processes - 1
  others = ', '.join(map(str, range(last)))
  noun = 'process' if last == 1 else 'processes'
  seconds = {}
  for name, field in FIELDS.items():
    messages = set()
    for result in results.values():
      kind, message, took = result['errors'][name]
      assert kind == 'DesyncError', (name, message)
      messages.add(message)
      seconds[name] = max(took, seconds.get(name, 0))
    (message,) = messages  # The same on all.
    with pytest.raises(AssertionError, match=field):
      raise AssertionError(message)
    assert f'on {noun} {others} and ' in message, message
    assert message.endswith(f'on process {last}.'), message
  for result in results.values():
    refused = {
      'restore': f'process 0 cannot list {out}: Permission denied.',
      'save': f'step 1 was not saved in {out}: Permission denied.',
    }
    for name, words in refused.items():
      kind, message, took = result['errors'][name]
      assert kind == 'PermissionError' and took < 5
      assert words in message
    kind, message, took = result['errors']['missing']
    assert kind == 'MissingProcessError'
    assert f'processes [{last}] did not come to a late fact' in message
    assert result['heard'] == {'127.0.0.1': True, '127.0.0.2': False}
    # One step with gradients of 1/32, in blocks that are half padding.
    assert result['right'] == pytest.approx([1 - 0.1 / 32 / 2] * 2)
  print(processes, 'processes, seconds:', seconds)
  print('a round:', max(result['seconds'] for result in results.values()))
  return max(seconds.values())


def test_all_processes_name_what_differs(tmp_path):
  check(2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [4, 5])
def test_more_processes_name_what_differs_soon(processes, tmp_path):
  assert check(processes, tmp_path) < 5


def test_collectives_are_listed_in_order(make_mesh):
  def worker(x):
    total = lax.pmax(lax.psum(x, 'data').astype(jnp.int32), 'data')
    return lax.ppermute(lax.all_gather(x, 'data'), 'data', [(0, 1)]), total

  run = jax.shard_map(
    worker,
    mesh=make_mesh(2),
    in_specs=PartitionSpec('data'),
    out_specs=PartitionSpec('data'),
    check_vma=False,
  )
  text = jax.jit(run).lower(jnp.zeros(8)).as_text()
  found = sorted(desync.collectives(text))
  # JAX 0.12 names axes, but for permutations.
  assert [line.replace('over data', 'over [[0, 1]]') for line in found] == [
    'all_gather over [[0, 1]] (tensor<1x4xf32>) -> tensor<2x4xf32>',
    'all_reduce add over [[0, 1]] (tensor<4xf32>) -> tensor<4xf32>',
    'all_reduce maximum over [[0, 1]] (tensor<4xi32>) -> tensor<4xi32>',
    'collective_permute over [[0, 1]] (tensor<2x4xf32>) -> tensor<2x4xf32>',
  ]


def test_functions_in_a_structure_are_the_same_in_each_process():
  node = jax.tree_util.Partial(lambda x: x, jnp.zeros(3))
  leaf, structure = desync.describe_tree({'f': node})
  assert leaf.startswith("['f']") and 'float32[3]' in leaf
  assert '<lambda>' in structure and '0x' not in structure


def test_processes_that_were_not_joined_are_told_to():
  with pytest.raises(RuntimeError, match=r'jaxdist\.initialize'):
    jd.assert_same('a fact', {'number': 1}, among=(0, 1))
