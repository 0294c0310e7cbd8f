"""What one host of links.py does: trains, exchanges and measures with jaxdist.

It counts what its network interface has sent, and stops its clock and its
counters while it evaluates.
"""

import functools
import json
import time
from pathlib import Path
from typing import Any

import crew
import jax
import lm
import methods
import netns
import numpy as np
import text
from flax import nnx
from jax.sharding import PartitionSpec
from model import Transformer, next_byte_loss
from place import AXIS, find_place, prepare_devices

import jaxdist as jd

NO_EXCHANGE = 'no exchange'
VALIDATION_ROWS = 64
# For the bare exchange: what is sent in place of float32.
CODES = {
  '8 bits': lambda: jd.quantize(bits=8),
  '2 bits': lambda: jd.quantize(bits=2),
  'random 16th': lambda: jd.random_k(1 / 16),
}
WAIT_SECONDS = 300.0
_NEVER = 2**30
_PROBES = 20
_REPEATS = 4
_EXCHANGES = 10  # Single ones differ by a tenth, as packets are lost.


def find(name: str) -> methods.Method:
  """A method of methods.py, or the one whose workers never meet."""
  if name != NO_EXCHANGE:
    return methods.find(name)
  like = methods.find(methods.DENSE)

  def build(axis, learning_rate):
    inner = methods.muon(learning_rate)
    return jd.local_sgd(inner, jd.mean(axis), every=_NEVER)

  return methods.Method(name, 'workers never meet', like.learning_rate, build)


class Stretches:
  """Adds up time and traffic over stretches with pauses between them.

  Args:
    meet: waits for all hosts; what they sent before has then arrived.
  """

  def __init__(self, meet):
    self.meet = meet
    self.seconds, self.bytes, self.packets = [], [], []

  def begin(self) -> None:
    self.meet()
    self._sent = netns.sent()
    self._began = time.perf_counter()

  def end(self) -> None:
    self.seconds.append(time.perf_counter() - self._began)
    self.meet()
    sent, packets = netns.sent()
    self.bytes.append(sent - self._sent[0])
    self.packets.append(packets - self._sent[1])

  def found(self) -> dict[str, Any]:
    """All of them, as JSON."""
    return {
      'seconds': self.seconds,
      'bytes': self.bytes,
      'packets': self.packets,
    }


class Host:
  """One host's worker, and the programs that it has compiled."""

  def __init__(self, config: lm.Config, data: text.Text):
    self.config, self.data = config, data
    self.place = find_place(config.workers)
    self.rows = self.place.put(
      text.validation_rows(
        data, config.length, self.place.workers, VALIDATION_ROWS
      )
    )
    one = self.place.put(np.ones(self.place.workers, np.float32))
    add = jax.jit(lambda x: x.sum()).lower(one).compile()
    # There is one such host in a process: compiled once, kept for all rates.
    self.program = functools.cache(self._program)
    self.meet = lambda: jax.block_until_ready(add(one))

  def save_start(self, seed: int, path: str) -> None:
    """Writes the parameters that all start from, for others to begin there."""
    if jax.process_index() == 0:
      leaves = nnx.to_flat_state(self._start(seed)[1])
      names = ('.'.join(map(str, path)) for path, _ in leaves)
      np.savez(path, **dict(zip(names, jax.tree.leaves(leaves), strict=True)))

  def _start(self, seed):
    config = self.config
    model = Transformer(
      config.layers, config.width, config.heads, nnx.Rngs(seed)
    )
    return nnx.split(model, nnx.Param)

  def train(self, method: str, seed: int) -> dict[str, Any]:
    """Trains from the start with one method."""
    step_fn, evaluate, new_state, traffic = self.program(method)
    config = self.config
    batches = text.training_batches(
      self.data, config.length, config.batch * self.place.workers, seed
    )
    batches = [self.place.put(batches[i]) for i in range(config.steps)]
    state = new_state(seed)
    losses, stretches = [], Stretches(self.meet)
    for index, batch in enumerate(batches):
      if index % config.every_eval == 0:
        stretches.begin()
      state, metrics = step_fn(state, batch)
      jax.block_until_ready(metrics)
      if (index + 1) % config.every_eval == 0 or index + 1 == config.steps:
        stretches.end()
        losses.append(float(evaluate(state, self.rows)))
    return {
      'losses': losses,
      'traffic': json.loads(traffic.to_json()),
      **stretches.found(),
    }

  def _program(self, name):
    config, method = self.config, find(name)

    def loss_fn(params, batch):
      return next_byte_loss(nnx.merge(graphdef, params), batch)

    def new_state(seed):
      _, params = self._start(seed)
      return jd.init(tx, params, **self.place.arguments())

    graphdef, _ = self._start(config.seed)
    tx = method.build(AXIS, lm.schedule(config, method.learning_rate))
    step_fn = jd.train_step(loss_fn, tx, **self.place.arguments())
    state = new_state(config.seed)
    batch = np.zeros(
      (config.batch * self.place.workers, config.length + 1), np.uint8
    )
    lowered = step_fn.lower(state, self.place.put(batch))
    jd.assert_same_program(lowered, state, batch)
    evaluate = jax.jit(lambda state, rows: loss_fn(jd.mean_params(state), rows))
    evaluate = evaluate.lower(state, self.rows).compile()
    step_fn = lowered.compile()
    return step_fn, evaluate, new_state, jd.traffic(step_fn)

  def exchange(self, code: str, megabytes: float) -> dict[str, Any]:
    """Averages so many megabytes of float32 once, some times over."""
    communicator = jd.mean(AXIS, CODES[code]())
    numbers = round(megabytes * 1e6 / 4)

    def exchange(x):
      tree = [x[0]]
      state = communicator.init(tree)
      return communicator.exchange(tree, state)[0]

    rng = np.random.default_rng(0)
    size = (self.place.workers, numbers)
    x = self.place.put(rng.standard_normal(size, np.float32))
    mapped = jax.shard_map(
      exchange,
      mesh=self.place.mesh,
      in_specs=PartitionSpec(AXIS),
      out_specs=PartitionSpec(),
    )
    mapped = jax.jit(mapped).lower(x).compile()
    jax.block_until_ready(mapped(x))
    stretches = Stretches(self.meet)
    for _ in range(_EXCHANGES):
      stretches.begin()
      jax.block_until_ready(mapped(x))
      stretches.end()
    traffic = jd.traffic(mapped)
    return {'payload': traffic.bytes_a_step, **stretches.found()}

  def probe(self, num_bytes: int) -> dict[str, float]:
    """What the link carries: of a sum of 4 bytes, and of many."""

    def seconds(numbers, repeats):
      x = self.place.put(np.ones((self.place.workers, numbers), np.float32))
      add = jax.jit(lambda x: x.sum(axis=0)).lower(x).compile()
      found = []
      for _ in range(repeats):
        self.meet()
        began = time.perf_counter()
        jax.block_until_ready(add(x))
        found.append(time.perf_counter() - began)
      return float(np.median(found))

    workers = self.place.workers
    small, large = seconds(1, _PROBES), seconds(num_bytes // 4, _REPEATS)
    sent = 2 * num_bytes * (workers - 1) / workers
    return {
      'latency': small / 2,  # A sum goes in two rounds.
      'bytes_per_second': sent / max(large - small, 1e-9),
    }


def start(host: int, hosts: int, data: str | None, address: str, **fields: Any):
  """Joins the others; returns what carries out a task."""
  world = jd.initialize(address, hosts, host, timeout=WAIT_SECONDS)
  prepare_devices(hosts, world.processes)
  config = lm.Config(**fields, workers=hosts)
  own = Host(config, text.load(Path(data) if data else None))

  def carry_out(do, **arguments):
    return getattr(own, do)(**arguments)

  return carry_out


if __name__ == '__main__':
  crew.serve(start)
