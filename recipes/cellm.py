"""Fine-tunes a language model on eight clients that exchange adapters (CELLM).

  python recipes/cellm.py

The model of lm.py learns Python from the source of the standard library, once.
Then its weights rest, and each client trains low-rank adapters (LoRA) beside
them on topics of Python's manual that the others do not have. Every five steps
they meet, as in federated averaging: the changes of the adapters go to the
server sparse, and the server's mean comes back sparse: the largest numbers, in
four bits. What either side leaves out it remembers and sends later. Beside it
adapters sent whole, of rank 1 too, sparse ones that forget, numbers drawn at
random, and all numbers in two bits.

CELLM and FLASC send the largest weights down and forget what they leave out;
here it is the largest changes both ways, of which the exchange of two rounds
(``two_shot``) encodes one for each. Bytes are those of the compiled step.

Five seeds; on two CPU cores it takes about 10 minutes and ends with 10.2 times
fewer bytes at a loss 0.2% above that of whole adapters (1.702 and 1.700 nats a
byte). BUILD_NOTES.md has the table. Leaves the base model and JSON in
out/cellm.

Vavekanand and Sam, `CELLM <https://arxiv.org/abs/2407.20557>`_, 2024
(withdrawn; its algorithm is that of FLASC); Kuo et al, `Federated LoRA with
Sparse Communication <https://arxiv.org/abs/2406.05233>`_, 2024.
"""

import dataclasses
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import text
import tyro
from flax import nnx
from methods import muon
from model import Transformer, next_byte_loss
from place import AXIS, find_place, prepare_devices
from rich.console import Console
from rich.table import Table

import jaxdist as jd

CLIENTS, ROWS, LENGTH, EVERY = 8, 4, 64, 5
ADAPTED = (('attention', 'qkv'), ('attention', 'out'), ('mlp', 'up'))
ADAPTED += (('mlp', 'down'),)
BLOCK = 256  # Numbers of adapters, of which the largest are sent.


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  seeds: int = 5
  """How many."""
  steps: int = 200
  """Of each client."""
  rank: int = 8
  """Of the adapters."""
  lr: float = 4e-3
  """Peak learning rate of the clients' Adam."""
  base_steps: int = 600
  """Of training the base model."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""
  out: Path = Path('out/cellm')
  """Folder for the base model and the numbers."""


class Way(NamedTuple):
  """How clients exchange.

  Attributes:
    rank: of the adapters, as a part of the configured one.
    communicator: what exchanges their changes.
    feedback: whether what is left out is remembered.
  """

  rank: float
  communicator: jd.Communicator
  feedback: bool = True


def ways() -> dict[str, Way]:
  """What is compared; the first sends all."""

  def sparse(density):
    values = jd.quantize(bits=4, block_size=BLOCK)
    code = jd.chained(jd.top_k(density, block_size=BLOCK), values)
    return jd.mean(AXIS, code, 'two_shot')

  # As many bytes as a quarter in four bits: numbers of four bytes, no places.
  drawn = jd.random_k(25 / BLOCK, block_size=BLOCK)
  two_bits = jd.quantize(bits=2, block_size=BLOCK)
  return {
    'whole': Way(1, jd.mean(AXIS), False),
    'a quarter, both ways': Way(1, sparse(1 / 4)),
    'an eighth, both ways': Way(1, sparse(1 / 8)),
    'a quarter, forgetting': Way(1, sparse(1 / 4), False),
    'a tenth, at random': Way(1, jd.mean(AXIS, drawn)),
    'whole, of rank 1': Way(1 / 8, jd.mean(AXIS), False),
    'all in 2 bits': Way(1, jd.mean(AXIS, two_bits, 'two_shot')),
  }


def library() -> text.Text:
  """The standard library without its manual."""
  files = [p for p in text.standard_library() if 'pydoc_data' not in p.parts]
  train, validation = text.split([p.read_bytes() for p in files])
  whole = (np.frombuffer(x, np.uint8) for x in (train, validation))
  return text.Text(*whole, 'Python standard library')


class Manual:
  """Topics of Python's manual, dealt out to the clients in alphabetical order.

  The last tenth of each client's text is for validation.
  """

  def __init__(self, clients: int = CLIENTS):
    topics = sorted(pydoc_data.topics.topics.items())
    joined = '\n'.join(words for _, words in topics).encode()
    parts = np.array_split(np.frombuffer(joined, np.uint8), clients)
    cut = len(parts[0]) * 9 // 10
    self.train = [windows(part[:cut], LENGTH) for part in parts]
    self.held_out = np.concatenate(
      [windows(part[cut:], LENGTH)[:32] for part in parts]
    )

  def batch(self, rng: np.random.Generator) -> np.ndarray:
    """Rows of each client, those of one together."""
    return np.concatenate([rng.choice(rows, ROWS) for rows in self.train])


def windows(content: np.ndarray, length: int) -> np.ndarray:
  """All rows of ``length + 1`` bytes; the next begins where one ends."""
  source = text.Windows(content, length)
  return np.stack([source[i] for i in range(len(source))])


def base_model(config: Config, console: Console) -> Transformer:
  """The model that is adapted, trained if it is not there yet."""
  model = Transformer(config.layers, config.width, 4, nnx.Rngs(0))
  graphdef, params = nnx.split(model, nnx.Param)
  name = f'base-{config.layers}-{config.width}-{config.base_steps}'
  folder = config.out / name
  if jd.latest_step(folder):
    return nnx.merge(graphdef, jd.restore(folder, params))
  schedule = optax.cosine_decay_schedule(1.6e-2, config.base_steps)
  tx = muon(schedule)

  def step(params, state, rows):
    loss = lambda params: next_byte_loss(nnx.merge(graphdef, params), rows)
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  step, state = jax.jit(step), tx.init(params)
  batches = text.training_batches(library(), LENGTH, CLIENTS * ROWS, seed=0)
  with console.status('base model'):
    for index in range(config.base_steps):
      params, state = step(params, state, batches[index])
  jd.save(folder, config.base_steps, params)
  return nnx.merge(graphdef, params)


def adapted(model: Transformer, rank: int, seed: int) -> Transformer:
  """The model with adapters beside the matrices of its blocks.

  They start at zero: it computes what it did before.
  """
  model, rngs = nnx.clone(model), nnx.Rngs(seed)
  for block in model.blocks:
    for part, name in ADAPTED:
      linear = getattr(getattr(block, part), name)
      n_in, n_out = linear.kernel.shape
      adapter = nnx.LoRA(n_in, rank, n_out, base_module=linear, rngs=rngs)
      setattr(getattr(block, part), name, adapter)
  return model


def loss_of(model: Transformer) -> tuple[Callable[..., jax.Array], Any]:
  """A loss of the adapters alone, and the adapters."""
  graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)

  def loss(adapters, rows):
    return next_byte_loss(nnx.merge(graphdef, adapters, base), rows)

  return loss, adapters


def optimizer(way: Way, config: Config) -> optax.GradientTransformation:
  """Adam on each client; the server takes the mean of what arrives."""
  schedule = optax.cosine_decay_schedule(config.lr, config.steps)
  return jd.fedavg(
    optax.adam(schedule),
    optax.sgd(1.0),
    way.communicator,
    every=EVERY,
    feedback=way.feedback,
  )


def start(base: Transformer, way: Way, config: Config, seed: int):
  """A loss of the adapters alone, and the adapters."""
  rank = max(1, round(way.rank * config.rank))
  return loss_of(adapted(base, rank, seed))


def tune(
  base: Transformer, way: Way, config: Config, manual: Manual
) -> list[float]:
  """Fine-tunes with all seeds.

  Args:
    base: the model to adapt.
    way: how clients exchange.
    config: the command line.
    manual: what they learn.

  Returns:
    Validation losses after the last meeting.
  """
  tx, losses = optimizer(way, config), []
  loss, _ = start(base, way, config, 0)  # The base is the same for all seeds.
  where = {'axis': AXIS, 'workers': CLIENTS}
  step = jd.train_step(loss, tx, **where)
  evaluate = jax.jit(lambda s: loss(jd.mean_params(s), manual.held_out))
  for seed in range(config.seeds):
    state = jd.init(tx, start(base, way, config, seed)[1], **where)
    rng = np.random.default_rng(seed)
    for _ in range(config.steps):
      state, _ = step(state, manual.batch(rng))
    losses.append(float(evaluate(state)))
  return losses


def bytes_a_step(
  base: Transformer, way: Way, config: Config, manual: Manual
) -> float:
  """What a client sends, from the step compiled for a device each."""
  place, tx = find_place(CLIENTS), optimizer(way, config)
  loss, adapters = start(base, way, config, 0)
  batch = place.put(manual.batch(np.random.default_rng(0)))
  state = jd.init(tx, adapters, **place.arguments())
  step = jd.train_step(loss, tx, **place.arguments())
  return jd.traffic(step, state, batch).bytes_a_step


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  prepare_devices(CLIENTS)
  console, manual = Console(), Manual()
  base = base_model(config, console)
  table = Table('adapters', 'loss', 'least', 'most', 'sent a step', 'fewer')
  before = float(jax.jit(next_byte_loss)(base, jnp.asarray(manual.held_out)))
  console.print(f'Before: {before:.4f}', highlight=False)
  found, whole = {'before': before}, None
  for name, way in ways().items():
    with console.status(name):
      losses = tune(base, way, config, manual)
      sent = bytes_a_step(base, way, config, manual)
    whole = whole or sent
    found[name] = {'losses': losses, 'bytes_a_step': sent}
    table.add_row(
      name,
      *(f'{x:.4f}' for x in (np.mean(losses), min(losses), max(losses))),
      f'{sent:,.0f} bytes',
      f'{whole / sent:.1f}',
    )
  console.print(table)
  config.out.mkdir(parents=True, exist_ok=True)
  (config.out / 'runs.json').write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  main()
