"""Processes that differ where they must not, found before they exchange.

Collectives believe whatever arrives: two of the same size in another order, or
floats where integers are due, give wrong numbers and no error. What decides
them is known before: the program, what it is called with, and the mesh.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from jaxdist.hosts import agreement
from jaxdist.hosts.errors import DesyncError

# How much of a field is shown to others when it differs.
_MOST_BYTES = 2**20
_MOST_SPEAKERS = 4
# Of functions and objects, other in each process.
_ADDRESS = re.compile(r' at 0x[0-9a-f]+')
_COLLECTIVE = re.compile(
  r'"?stablehlo\.(all_reduce|all_gather|all_to_all|reduce_scatter|'
  r'collective_permute|collective_broadcast)"?'
)


def assert_same(
  what: str,
  facts: Mapping[str, Any],
  *,
  among: Sequence[int] | None = None,
) -> None:
  """Raises on all processes if one of them knows something else.

  Goes through JAX's coordination service, so that it works where a collective
  would hang or lie. **On the wire:** 16 bytes a fact from each process to the
  first; where one differs, up to 1 MiB of it from two to four of them.

  Args:
    what: what these facts belong to, for the error.
    facts: by name, anything that prints the same where it is the same: a
      value, a list of items, or a dict, of which the first that differs is
      named. Those first in order are reported first.
    among: the processes that take part; ``None``: all. Each of them must call
      this, in the same order as all others.

  Raises:
    DesyncError: naming the fact, the values and the processes.
    MissingProcessError: if some processes did not come in time.

  Examples:
    >>> import jaxdist as jd
    >>> jd.assert_same('the settings', {'batch size': 32, 'seed': 0})
  """
  among = tuple(range(jax.process_count()) if among is None else among)
  if len(among) == 1:
    return
  facts = {'what is compared': what, **facts}
  lines = {name: _lines(value) for name, value in facts.items()}
  digests = {name: _digest(value) for name, value in lines.items()}
  difference = agreement.decide(what, digests, _first_difference, among)
  if difference is None:
    return
  name, groups = difference
  # One of each group says what it has.
  speakers = [group[0] for group in groups[:_MOST_SPEAKERS]]
  speaks = jax.process_index() in speakers
  mine = _shown(lines.get(name, [])) if speaks else None

  def rule(said):
    return _describe(what, name, groups, [said[rank] for rank in speakers])

  raise DesyncError(agreement.decide(what, mine, rule, among))


def assert_same_program(program: Any, *args: Any) -> None:
  """Raises on all processes if they are about to run different programs.

  Compares, in this order: versions, the mesh and the order of its devices,
  structure, shapes, dtypes and places of the arguments, the number of steps
  done, the collectives in their order, and the rest of the program, in which
  all that was constant in Python stands as a number. Runs nothing but the
  tracing. :func:`jaxdist.train_step` does this by itself at its first call in a
  world of several processes; call it where you compile a step yourself.

  Args:
    program: a jitted function, or what its ``lower`` returned.
    *args: what it will be called with.

  Raises:
    DesyncError: naming what differs, how, and between which processes.
    MissingProcessError: if some processes did not come in time.

  Examples:
    >>> import jax
    >>> import jaxdist as jd
    >>> jd.assert_same_program(jax.jit(lambda x: 2 * x), 1.0)
  """
  meshes = _meshes(args)
  among = processes_of(*meshes) or [jax.process_index()]
  if len(among) == 1:
    return
  lowered = program if _is_lowered(program) else program.lower(*args)
  text = lowered.as_text()
  steps = [getattr(arg, 'step', None) for arg in args]
  assert_same(
    'a step',
    {
      'versions': versions(),
      'mesh': [line for mesh in meshes for line in describe_mesh(mesh)],
      'arguments': describe_tree(args),
      'number of steps': [
        str(np.asarray(step)) for step in steps if step is not None
      ],
      'collectives': collectives(text),
      'instructions': text,
    },
    among=among,
  )


def check_init(mesh: Any, params: Any, places: Any, state: Any) -> None:
  """Compares what :func:`jaxdist.init` is given between the mesh's processes.

  Args:
    mesh: the devices; nothing is compared if one process has all of them.
    params: the parameters.
    places: their shardings.
    state: shapes of the state that follows.

  Raises:
    DesyncError: if they differ.
    MissingProcessError: if some processes did not come in time.
  """
  among = processes_of(mesh)
  if len(among) > 1:
    assert_same(
      'jaxdist.init',
      {
        'versions': versions(),
        'mesh': describe_mesh(mesh),
        'params': describe_tree(params),
        'specs': [str(place.spec) for place in jax.tree.leaves(places)],
        'state': describe_tree(state),
      },
      among=among,
    )


class CheckedStep:
  """A jitted step that is compared between processes before it first runs.

  And again with each batch of other shapes, which is another program.
  """

  def __init__(self, jitted: Any):
    self._jitted = jitted
    self._checked = set()
    self.lower, self.trace = jitted.lower, jitted.trace

  def __call__(self, state: Any, batch: Any) -> Any:
    """The step; raises as :func:`assert_same_program`."""
    leaves, treedef = jax.tree.flatten(batch)
    kind = treedef, tuple((x.shape, x.dtype) for x in leaves)
    if kind not in self._checked:
      assert_same_program(self._jitted, state, batch)
      self._checked.add(kind)
    return self._jitted(state, batch)


def processes_of(*meshes: Any) -> list[int]:
  """The processes whose devices lie in meshes; none for abstract ones."""
  return sorted(
    {
      device.process_index
      for mesh in meshes
      if isinstance(mesh, Mesh)
      for device in mesh.devices.flat
    }
  )


def versions() -> dict[str, str]:
  """What decides the numbers beside the program."""
  try:
    own = metadata.version('jaxdist')
  except metadata.PackageNotFoundError:  # It can also run from a checkout.
    own = 'unknown'
  return {
    'jaxdist': own,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'backend': jax.local_devices()[0].client.platform_version,
  }


def describe_mesh(mesh: Mesh) -> list[str]:
  """Axes, and where each device is, in order."""
  return [
    f'axes {dict(mesh.shape)}',
    *(
      f'device {device.id} of process {device.process_index}'
      for device in mesh.devices.flat
    ),
  ]


def describe_tree(tree: Any) -> list[str]:
  """A line for each leaf, then the structure, in which settings may stand."""
  leaves = [
    f'{jax.tree_util.keystr(path)}: {jax.typeof(leaf).str_short()} '
    f'{getattr(getattr(leaf, "sharding", None), "spec", "")}'.rstrip()
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
  return [*leaves, _ADDRESS.sub('', str(jax.tree.structure(tree)))]


def collectives(text: str) -> list[str]:
  """The collectives of a lowered program, in order.

  Args:
    text: StableHLO.

  Returns:
    For each, the operation, the reduction, the groups and the types.
  """
  found = []
  lines = iter(text.splitlines())
  for line in lines:
    if not (match := _COLLECTIVE.search(line)):
      continue
    words = [match[1]]
    groups = re.findall(r'(?:_groups|_pairs) = dense<(.*?)>', line)
    # From JAX 0.12 on, axes instead of groups of devices.
    groups = groups or re.findall(r'axis_ref<name = "(.*?)"', line)
    if groups:
      words.append(f'over {", ".join(groups)}')
    # A reduction's body stands between the operation and its types.
    while ' -> ' not in line:
      line = next(lines)
      body = re.search(r'stablehlo\.(\w+)', line)
      if body and body[1] != 'return':
        words.insert(1, body[1])
    words.append(line.rpartition(' : ')[2])
    found.append(' '.join(words))
  return found


def _meshes(tree):
  """The meshes that the leaves lie on, each once."""
  shardings = [getattr(x, 'sharding', None) for x in jax.tree.leaves(tree)]
  return list(dict.fromkeys(x.mesh for x in shardings if hasattr(x, 'mesh')))


def _is_lowered(program):
  return isinstance(program, jax.stages.Lowered)


def _lines(value):
  if isinstance(value, str):
    return value.splitlines()
  if isinstance(value, Mapping):
    return [f'{key}: {item}' for key, item in value.items()]
  if isinstance(value, Sequence):
    return [str(item) for item in value]
  return [str(value)]


def _digest(lines):
  return hashlib.blake2b('\n'.join(lines).encode(), digest_size=16).hexdigest()


def _first_difference(said):
  """The first fact that differs, and who says the same; None if none does."""
  names = dict.fromkeys(itertools.chain.from_iterable(said.values()))
  for name in names:
    groups = {}
    for rank, digests in said.items():
      groups.setdefault(digests.get(name), []).append(rank)
    if len(groups) > 1:
      return name, list(groups.values())
  return None


def _shown(lines):
  """As many of the lines as may be sent."""
  shown, size = [], 0
  for line in lines:
    size += len(line.encode())
    if size > _MOST_BYTES:
      break
    shown.append(line)
  return shown


def _describe(what, name, groups, said):
  """The error, the same on all processes."""
  message = f'processes must have the same {name} in {what}'
  if name == 'what is compared':
    message = 'processes must compare the same things in the same order'
  names = [_ranks(group) for group in groups]
  for number, items in enumerate(itertools.zip_longest(*said)):
    if len(set(items)) > 1:
      values = ' and '.join(
        f'{"nothing" if item is None else repr(item.strip())} on {ranks}'
        for item, ranks in zip(items, names, strict=False)
      )
      return f'{message}, but item {number} is {values}.'
  return f'{message}, but {" and ".join(names)} have others.'


def _ranks(group):
  noun = 'process' if len(group) == 1 else 'processes'
  return f'{noun} {", ".join(map(str, group))}'
