"""Packed trees come back bit for bit, and damaged bytes not at all."""

import collections
import functools
import random
import tracemalloc

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from tables import COMPRESSORS, SHARED_KEY

import jaxdist as jd
from jaxdist.digest import DIGEST_BYTES, digest
from jaxdist.keys import is_key

NAN = np.array([0x7FC00001, 0xFF800001, 0x80000000, 1], np.uint32)


def make_tree():
  """One of everything that a message may hold."""
  rng = np.random.default_rng(0)
  normal = rng.normal(size=(40, 50)).astype(np.float32)
  every_byte = np.arange(256, dtype=np.uint8)
  return {
    'normal': jnp.asarray(normal),
    'bfloat16': jnp.asarray(normal, jnp.bfloat16),
    'sparse': jnp.where(normal > 2, normal, 0),
    'bits': jnp.asarray(NAN.view(np.float32)),
    'float8': [every_byte.view(jnp.float8_e4m3fn), every_byte[:3]],
    'int4': jnp.array([-8, 7, 3], jnp.int4),
    'bool': np.array([True, False]),
    'words': jnp.asarray(rng.integers(0, 4, 3000), jnp.uint32),
    'wide': np.array([1, -1], np.int64),
    'complex': np.array([1 + 2j, np.nan]),
    'strided': normal[::2, ::3],
    'swapped': np.arange(3, dtype='>i4'),
    'empty': (np.zeros((0, 3)), jnp.zeros((2, 0), jnp.bfloat16), [], {}, None),
    'scalars': (1, True, 2.5, 1j, np.float32(3), jnp.zeros(())),
    'keys': [
      jax.random.key(3),
      jax.random.split(jax.random.key(1, impl='rbg')),
    ],
    'numbered': {3: np.ones(2), -1: None},
  }


def assert_same(one, other):
  """The same structure, kinds of leaves and bits."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert is_key(x) == is_key(y), name
    if is_key(x):
      assert x.dtype == y.dtype, name
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).dtype.name == np.asarray(y).dtype.name, name
    assert np.shape(x) == np.shape(y), name
    native = np.asarray(x).astype(np.asarray(x).dtype.newbyteorder('='))
    assert native.tobytes() == np.asarray(y).tobytes(), name


@pytest.mark.parametrize('compress', [True, False])
def test_round_trip(compress):
  tree = make_tree()
  data = jd.pack(tree, compress=compress)
  plain = jd.unpack(data)
  assert_same(tree, plain)
  plain['normal'][0] = 1  # One's own, to write to.
  assert [type(x) for x in plain['scalars'][:4]] == [int, bool, float, complex]
  like = jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x
    ),
    tree,
  )
  read = jd.unpack(memoryview(data), like)
  assert_same(tree, read)
  kinds = lambda tree: [isinstance(x, jax.Array) for x in jax.tree.leaves(tree)]
  assert kinds(read) == kinds(tree)


def test_placed_as_asked(make_mesh):
  mesh = make_mesh(4)
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('data')
  )
  x = jax.device_put(jnp.arange(8.0), sharding)
  assert jd.unpack(jd.pack(x), x).sharding == sharding


@pytest.mark.parametrize('name', COMPRESSORS)
def test_payloads(name):
  """Of every compressor, two blocks with any bits: only its classes hold it."""
  code = COMPRESSORS[name].at(SHARED_KEY)
  block = jax.ShapeDtypeStruct((2, 128), jnp.float32)
  like = jax.eval_shape(code.encode, block, SHARED_KEY)
  rng = np.random.default_rng(0)
  payload = jax.tree.map(
    lambda leaf: rng.integers(0, 2**32, leaf.shape, dtype=np.uint32).view(
      leaf.dtype
    ),
    like,
  )
  data = jd.pack(payload)
  assert_same(payload, jd.unpack(data, like))
  # Names of classes and fixed parts, shapes: the leaves' bytes and some more.
  num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
  assert len(data) <= num_bytes + 130


def test_never_much_larger_and_smaller_where_it_can_be():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, 100_000, dtype=np.uint8)
  assert len(jd.pack(noise)) <= noise.nbytes + 40
  assert len(jd.pack(noise, compress=False)) <= noise.nbytes + 40
  # Exponents of normal numbers have an entropy of 2.5 of 8 bits and the sign
  # bit sits beside seven of them.
  normal = rng.normal(size=100_000).astype(np.float32)
  assert 0.80 < len(jd.pack(normal)) / normal.nbytes < 0.90
  # Of 2-bit codes with shares 0.8, 0.1 and 0.1: 0.92 bits each, by fours.
  codes = rng.choice(3, 400_000, p=[0.8, 0.1, 0.1]).astype(np.uint32)
  words = (codes.reshape(-1, 16) << 2 * np.arange(16, dtype=np.uint32)).sum(
    axis=1, dtype=np.uint32
  )
  bits = 8 * len(jd.pack(words)) / codes.size
  assert 0.922 < bits < 0.922 * 1.03
  assert len(jd.pack(np.zeros(1_000_000, np.float32))) < 4_200


REFUSED = {
  'object': ({'a': object()}, r"\['a'\] must be an array .*got object"),
  'text': (['x'], r'\[0\] must be an array or a number, got str'),
  'large': ([2**70], r'\[0\] must be an array of numbers, got one of object'),
  'strings': (
    np.array(['x']),
    r'the tree must be an array of numbers, got one of <U1',
  ),
  'abstract': (jax.ShapeDtypeStruct((1,), jnp.int8), 'the tree has no numbers'),
  'key of a dict': ({1.5: 1}, "a dict's key must be a str or an int, got 1.5"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_packed_is_refused_by_name(case):
  tree, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    jd.pack(tree)


def test_deleted_traced_and_deep_trees_are_refused():
  x = jnp.ones(3)
  x.delete()
  with pytest.raises(ValueError, match=r"\['x'\] was deleted"):
    jd.pack({'x': x})
  with pytest.raises(ValueError, match='outside jit'):
    jax.jit(jd.pack)(jnp.ones(3))
  deep = None
  for _ in range(65):
    deep = [deep]
  with pytest.raises(ValueError, match='at most 64 nodes deep'):
    jd.pack(deep)
  assert jd.unpack(jd.pack(deep[0])) == deep[0]


OTHERS = {
  'dict': (lambda t: {'w': t['w']}, "the tree is a dict of 'n', 'w' in data"),
  'node': (lambda t: t | {'w': (1, 2)}, r"\['w'\] is a list of 2 in data and"),
  'shape': (
    lambda t: t | {'w': [jnp.ones(4), t['w'][1]]},
    r"\['w'\]\[0\] is array of float32 \(3,\) in data and .* \(4,\) in",
  ),
  'dtype': (
    lambda t: t | {'w': [jnp.ones(3, jnp.int32), t['w'][1]]},
    'array of float32 .* and array of int32',
  ),
  'kind': (lambda t: t | {'n': np.int64(1)}, r"\['n'\] is number of int64"),
  'key': (
    lambda t: t | {'w': [t['w'][0], jax.random.key(0, impl='rbg')]},
    r'is threefry2x32 key .* rbg key',
  ),
}


@pytest.mark.parametrize('case', OTHERS)
def test_another_tree_is_refused_by_name(case):
  change, message = OTHERS[case]
  tree = {'w': [jnp.ones(3), jax.random.key(0)], 'n': 3}
  with pytest.raises(ValueError, match=message):
    jd.unpack(jd.pack(tree), change(tree))


def test_nodes_of_classes_need_like():
  x = jnp.ones((1, 1024))
  encode = lambda density: jd.top_k(density).encode(x, jax.random.key(0))
  data = jd.pack([encode(0.1)])
  with pytest.raises(ValueError, match=r'holds a Sparse.*: give `like`'):
    jd.unpack(data)
  # Of a length that takes as many words of 10 bits.
  other = jd.top_k(0.1).encode(x[:, :1023], jax.random.key(0))
  with pytest.raises(ValueError, match=r'<?\[0\] is Sparse.* and Sparse'):
    jd.unpack(data, [other])
  ordered = lambda name: collections.OrderedDict({name: x})
  with pytest.raises(
    ValueError, match=r"OrderedDict\('a'\) in data and Ordered"
  ):
    jd.unpack(jd.pack(ordered('a')), ordered('b'))
  state = optax.adam(0.1).init(x)
  assert_same(state, jd.unpack(jd.pack(state), state))


def test_bytes_of_others_are_refused():
  for data in (b'', b'x' * 100, jd.pack(1)[:20]):
    with pytest.raises(jd.UnpackError, match=r'not written by jaxdist\.pack'):
      jd.unpack(data)
  data = bytearray(jd.pack(1))
  data[4] = 2
  with pytest.raises(
    jd.UnpackError, match=r'version 2; this .* reads version 1'
  ):
    jd.unpack(data)


def seal(data):
  """With the digest that belongs to it."""
  return data + digest(data)


def test_bombs_are_refused_before_memory_is_allocated():
  data = jd.pack(np.zeros(2**20, np.uint8))[:-DIGEST_BYTES]
  size = b'\x80\x80\x40'  # 2**20 in seven bits a byte.
  assert data.count(size) == 1
  with pytest.raises(jd.UnpackError, match='do not inflate to the declared'):
    jd.unpack(seal(data.replace(size, b'\x80\x80\x41')))
  for larger in (b'\xff\xff\x7f', b'\x80\x80\x80\x08', b'\xff' * 8 + b'\x7f'):
    header = int.from_bytes(data[5:9], 'little') + len(larger) - len(size)
    forged = data.replace(size, larger)
    forged = forged[:5] + header.to_bytes(4, 'little') + forged[9:]
    with pytest.raises(
      jd.UnpackError, match=r'cannot hold the declared|no arr'
    ):
      jd.unpack(seal(forged))


@pytest.mark.parametrize(
  ('tree', 'limit'),
  [
    # One key of 100 kB, which the names of a thousand leaves would repeat.
    ({'k' * 100_000: [np.zeros(0)] * 1000}, 2**21),
    # As float32, four times the four MB that they are.
    (np.zeros(2**22, jnp.int4), 3 * 2**22),
  ],
)
def test_small_messages_take_little_memory(tree, limit):
  data = jd.pack(tree)
  jd.unpack(data)  # What is made once is not counted.
  tracemalloc.start()
  try:
    jd.unpack(data)
    assert tracemalloc.get_traced_memory()[1] < limit
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('count', [0, 2])
def test_planes_that_leave_bytes_unwritten_are_refused(count):
  data = jd.pack(np.ones(3, np.float32), compress=False)[:-DIGEST_BYTES]
  plane = data[-14:-12]  # How, and 12 bytes; before it, how many planes.
  assert (data[-15], plane[1]) == (1, 12)
  end = (plane[:1] + b'\3') * count
  header = int.from_bytes(data[5:9], 'little') + len(end) - len(plane)
  forged = data[:5] + header.to_bytes(4, 'little') + data[9:-15]
  forged += bytes([count]) + end + data[-12:][: 3 * count]
  with pytest.raises(jd.UnpackError, match=f'float32 has no {count} planes'):
    jd.unpack(seal(forged))


# A place (as a part of the length), a length, what to do, and new bytes.
KINDS = ['flip', 'set', 'cut', 'insert', 'copy', 'end']
EDGES = [b'\0', b'\1', b'\x7f', b'\x80', b'\xff']
CHANGES = st.lists(
  st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
    st.sampled_from(KINDS),
    st.one_of(
      st.sampled_from(EDGES),
      st.binary(min_size=1, max_size=8),
    ),
  ),
  min_size=1,
  max_size=3,
)


def damaged_by(data, changes):
  data = bytearray(data)
  for place, length, change, new in changes:
    at = int(place * len(data))
    if change == 'flip' and data:
      data[at] ^= 1 << length % 8
    elif change == 'set':
      data[at : at + len(new)] = new
    elif change == 'cut':
      del data[at : at + length]
    elif change == 'insert':
      data[at:at] = new
    elif change == 'copy':
      data[at:at] = data[-length:]
    elif change == 'end':
      del data[at:]
  return bytes(data)


@functools.cache
def small_message():
  rng = np.random.default_rng(0)
  return jd.pack(
    {
      'w': rng.normal(size=(5, 7)).astype(np.float32),
      'codes': [np.repeat(rng.integers(0, 2, 40), 5).astype(np.uint32)],
      'rest': (3, None, np.zeros((0, 2)), np.array([True, False])),
      'key': jax.random.key(0),
    }
  )


def check_damage(changes, sealed):
  """Damaged bytes raise; with a right digest they may be another tree."""
  data = small_message()
  if not sealed:
    damaged = damaged_by(data, changes)
    if damaged != data:
      with pytest.raises(jd.UnpackError):
        jd.unpack(damaged)
    return
  damaged = seal(damaged_by(data[:-DIGEST_BYTES], changes))
  try:
    tree = jd.unpack(damaged)
  except ValueError:
    return
  for leaf in jax.tree.leaves(tree):
    leaf = jax.random.key_data(leaf) if is_key(leaf) else np.asarray(leaf)
    assert leaf.nbytes <= 1032 * len(damaged)
  jd.pack(tree)


@hypothesis.given(CHANGES, st.booleans())
@hypothesis.settings(max_examples=400)
def test_damage_is_found(changes, sealed):
  check_damage(changes, sealed)


@pytest.mark.slow
def test_damage_is_found_100_000_times():
  """Drawn by Python, a tenth of a millisecond each."""
  rng = random.Random(0)
  for _ in range(100_000):
    changes = [
      (
        rng.random(),
        rng.randint(1, 40),
        rng.choice(KINDS),
        rng.choice(EDGES + [rng.randbytes(rng.randint(1, 8))]),
      )
      for _ in range(rng.randint(1, 3))
    ]
    check_damage(changes, rng.random() < 0.5)
