"""Federated averaging with uploads of less than a bit and a half a number.

  python recipes/fedzip.py

FedZip on digits that are unevenly spread over 16 clients, of which 8 train in
each round: of each matrix of a client's change the largest part is kept, all of
it is replaced by three levels (``jd.codebook``), and ``jd.pack`` writes the
codes with fewer bits where they are rare. The server averages what it unpacks,
so the sizes are of bytes that were really decoded. Beside it: the kept numbers
with their places, two bits a number, and everything; each with and without the
rest being remembered for the client's next turn.

Then what the paper's codes would take (it counts, and writes nothing) beside
``jd.pack``, for changes of two distributions. Five seeds, BUILD_NOTES.md has
the tables; two minutes on two CPU cores.

Malekijoo et al, `FEDZIP: A Compression Framework for Communication-Efficient
Federated Learning <https://arxiv.org/abs/2102.01593>`_, 2021.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxdist as jd

CLIENTS, CHOSEN, BATCH, LOCAL_STEPS, RATE = 16, 8, 32, 6, 0.05
KEY = jax.random.key(0)  # No code here is random.


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  seeds: int = 5
  """How many."""
  rounds: int = 40
  """Of federated averaging."""


class Method(NamedTuple):
  """How changes are written.

  Attributes:
    matrix: the code for matrices, each as one block.
    vector: for vectors.
    feedback: whether clients remember what was dropped.
  """

  matrix: jd.Compressor
  vector: jd.Compressor
  feedback: bool = False


class Data(NamedTuple):
  """Digits and whose they are.

  Attributes:
    x: images to train with.
    y: their labels.
    rows: ``(clients, images)``, which images a client has, padded.
    counts: how many.
    test: other images, and labels.
  """

  x: jax.Array
  y: jax.Array
  rows: jax.Array
  counts: jax.Array
  test: tuple[jax.Array, jax.Array]


class Result(NamedTuple):
  """One run.

  Attributes:
    accuracy: after each round.
    num_bytes: that a client sends in each round, packed.
    payload_bytes: the same, as they travel in a mesh.
  """

  accuracy: np.ndarray
  num_bytes: np.ndarray
  payload_bytes: int


def methods() -> dict[str, Method]:
  """By name."""
  dense = jd.identity()
  plain = {'dense': Method(dense, dense)}
  two_bits = jd.quantize(bits=2)
  plain['2 bits'] = Method(two_bits, two_bits)
  for density in (0.2, 0.05):
    percent = f'{density:.0%}'
    top = jd.global_top_k(density)
    plain[f'top {percent}'] = Method(top, dense)
    plain[f'FedZip {percent}'] = Method(
      jd.codebook(3, density=density, block_size=None),
      jd.codebook(3, block_size=None),
    )
  fed_back = {
    f'{name}, feedback': method._replace(feedback=True)
    for name, method in plain.items()
    if name != 'dense'
  }
  return plain | fed_back


@functools.cache
def load(seed: int) -> Data:
  """Digits, and for each client another mixture of them (Dirichlet, 0.5)."""
  rng = np.random.default_rng(seed)
  bunch = load_digits()
  order = rng.permutation(len(bunch.data))
  x, y = bunch.data[order].astype(np.float32) / 16, bunch.target[order]
  split = len(x) * 4 // 5
  owners = [[] for _ in range(CLIENTS)]
  for digit in range(10):
    shares = rng.dirichlet([0.5] * CLIENTS)
    for row in np.flatnonzero(y[:split] == digit):
      owners[rng.choice(CLIENTS, p=shares)].append(row)
  counts = np.array([max(1, len(mine)) for mine in owners])
  rows = np.zeros((CLIENTS, split), np.int32)
  for client, mine in enumerate(owners):
    rows[client, : len(mine)] = mine
  return Data(
    jnp.asarray(x[:split]),
    jnp.asarray(y[:split]),
    jnp.asarray(rows),
    jnp.asarray(counts),
    (jnp.asarray(x[split:]), jnp.asarray(y[split:])),
  )


def init(key: jax.Array) -> dict[str, jax.Array]:
  """A network of 9,610 parameters."""
  one, two = jax.random.split(key)
  return {
    'w1': jax.random.normal(one, (64, 128)) / 64**0.5,
    'b1': jnp.zeros(128),
    'w2': jax.random.normal(two, (128, 10)) / 128**0.5,
    'b2': jnp.zeros(10),
  }


def logits(params, x):
  hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
  return hidden @ params['w2'] + params['b2']


def loss(params, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, x), y
  ).mean()


def code_of(method: Method, leaf) -> jd.Compressor:
  return method.matrix if leaf.ndim > 1 else method.vector


def encode(method: Method, tree):
  """A payload for each leaf."""
  as_one = lambda leaf: code_of(method, leaf).encode(leaf.reshape(1, -1), KEY)
  return {name: as_one(leaf) for name, leaf in tree.items()}


def decode(method: Method, payloads, like):
  """The leaves again."""
  return {
    name: code_of(method, leaf).decode(payloads[name]).reshape(leaf.shape)
    for name, leaf in like.items()
  }


@functools.cache
def program(method: Method):
  """The compiled work of the chosen clients, and of the server."""

  @jax.jit
  def train(data, params, residuals, chosen, key):
    def one(client, residual, key):
      def step(params, key):
        at = jax.random.randint(key, (BATCH,), 0, data.counts[client])
        rows = data.rows[client, at]
        grads = jax.grad(loss)(params, data.x[rows], data.y[rows])
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), None

      keys = jax.random.split(key, LOCAL_STEPS)
      trained, _ = jax.lax.scan(step, params, keys)
      change = optax.tree.add(optax.tree.sub(trained, params), residual)
      payload = encode(method, change)
      rest = optax.tree.sub(change, decode(method, payload, params))
      return payload, rest if method.feedback else residual

    mine = jax.tree.map(lambda e: e[chosen], residuals)
    payloads, rest = jax.vmap(one)(chosen, mine, jax.random.split(key, CHOSEN))
    put = lambda e, r: e.at[chosen].set(r)
    return payloads, jax.tree.map(put, residuals, rest)

  @jax.jit
  def serve(data, params, payloads, chosen):
    changes = jax.vmap(lambda p: decode(method, p, params))(payloads)
    weights = data.counts[chosen] / data.counts[chosen].sum()
    mean = lambda c: jnp.tensordot(weights, c, 1)
    params = jax.tree.map(lambda p, c: p + mean(c), params, changes)
    x, y = data.test
    return params, (logits(params, x).argmax(1) == y).mean()

  return train, serve


def run(method: Method, seed: int, rounds: int) -> Result:
  """Trains one model.

  Args:
    method: how changes are written.
    seed: of the data, the model and all draws.
    rounds: how many.

  Returns:
    What it reached and what it sent.
  """
  train, serve = program(method)
  data = load(seed)
  key, params_key = jax.random.split(jax.random.key(seed))
  params = init(params_key)
  residuals = jax.tree.map(lambda p: jnp.zeros((CLIENTS, *p.shape)), params)
  rng = np.random.default_rng(seed)
  accuracy, num_bytes = [], []
  for round_key in jax.random.split(key, rounds):
    chosen = rng.choice(CLIENTS, CHOSEN, replace=False)
    payloads, residuals = train(data, params, residuals, chosen, round_key)
    payloads = jax.tree.map(np.asarray, payloads)
    uploads = [
      jax.tree.map(lambda x, i=i: x[i], payloads) for i in range(CHOSEN)
    ]
    messages = [jd.pack(upload) for upload in uploads]
    received = [
      jd.unpack(message, like=upload)
      for message, upload in zip(messages, uploads, strict=True)
    ]
    payloads = jax.tree.map(lambda *x: np.stack(x), *received)
    params, reached = serve(data, params, payloads, chosen)
    accuracy.append(float(reached))
    num_bytes.append(np.mean([len(message) for message in messages]))
  payload_bytes = sum(x.nbytes for x in jax.tree.leaves(uploads[0]))
  return Result(np.array(accuracy), np.array(num_bytes), payload_bytes)


def end(result: Result) -> float:
  """The accuracy over the last tenth of the rounds."""
  return float(result.accuracy[-max(1, len(result.accuracy) // 10) :].mean())


def bytes_until(result: Result, accuracy: float) -> float:
  """What a client sends until then, if it takes part in each round."""
  (there,) = np.nonzero(result.accuracy >= accuracy)
  return result.num_bytes[: there[0] + 1].sum() if there.size else math.inf


def counted_bits(codes: np.ndarray) -> dict[str, float]:
  """What a layer's codes of three levels take, counted as the paper does.

  Args:
    codes: 0, 1 or 2, flat.

  Returns:
    Bits a number, without levels: Huffman codes of one bit for the most
    frequent level and two for the others; the places of these others; Elias
    gamma codes of the gaps between them; and the entropy.
  """
  shares = np.sort(np.bincount(codes, minlength=3) / codes.size)
  most = np.bincount(codes, minlength=3).argmax()
  gaps = [
    np.diff(np.flatnonzero(codes == level), prepend=-1)
    for level in {0, 1, 2} - {most}
  ]
  gamma = sum((2 * np.floor(np.log2(gap)) + 1).sum() for gap in gaps)
  return {
    'Huffman': 2 - shares[2],
    'places': (1 - shares[2]) * math.ceil(math.log2(codes.size)),
    'gaps': gamma / codes.size,
    'entropy': -sum(p * math.log2(p) for p in shares if p),
  }


def sizes(changes: np.ndarray, density: float) -> dict[str, float]:
  """:func:`counted_bits` of a layer, and bits of what is packed and decoded."""
  code = jd.codebook(3, density=density, block_size=None)
  payload = code.encode(jnp.asarray(changes).reshape(1, -1), KEY)
  message = jd.pack(payload)
  read = jd.unpack(message, like=payload)
  codes = np.asarray(read.codes.unpack())[0]
  assert np.array_equal(codes, np.asarray(payload.codes.unpack())[0])
  packed = 8 * len(message) / changes.size
  return counted_bits(codes) | {'jd.pack': packed}


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  console = Console()
  columns = ('accuracy', 'least', 'most', 'bytes a round', 'fewer', 'in a mesh')
  table = Table('uploads', *columns, 'kB until 70%')
  dense = 4 * sum(x.size for x in jax.tree.leaves(init(KEY)))
  for name, method in methods().items():
    results = [run(method, seed, config.rounds) for seed in range(config.seeds)]
    ends = [end(result) for result in results]
    sent = np.mean([result.num_bytes.mean() for result in results])
    until = np.mean([bytes_until(result, 0.7) for result in results]) / 1000
    numbers = (np.mean(ends), min(ends), max(ends))
    table.add_row(
      name,
      *(f'{x:.3f}' for x in numbers),
      f'{sent:,.0f}',
      f'{dense / sent:.1f}',
      f'{dense / results[0].payload_bytes:.1f}',
      f'{until:.1f}',
    )
  console.print(table)

  rng = np.random.default_rng(0)
  table = Table('100,000 changes', *counted_bits(np.arange(3)), 'jd.pack')
  for name, changes in {
    'normal': rng.normal(size=100_000),
    'Student, 3 degrees': rng.standard_t(3, 100_000),
  }.items():
    for density in (0.2, 0.05):
      bits = sizes(changes.astype(np.float32), density)
      table.add_row(
        f'{name}, {density:.0%} kept', *(f'{x:.4f}' for x in bits.values())
      )
  console.print('Bits a number:', table)


if __name__ == '__main__':
  main()
