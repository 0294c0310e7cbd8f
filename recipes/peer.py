"""The language model in PyTorch, trained by DistributedDataParallel over gloo.

For links.py: the same parameters at the start, data, optimizer and schedule as
the JAX form, so that losses are the same up to rounding.
"""

import datetime
import functools
import math
from pathlib import Path
from typing import Any

import crew
import lm
import methods
import numpy as np
import text
import torch
import torch.distributed as dist
from links_found import COMPRESSED_PEER, LIMITS
from links_host import VALIDATION_ROWS, Stretches
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

# Newton and Schulz's coefficients, as in Optax.
_NEWTON = (3.4445, -4.7750, 2.0315)
_WAIT = datetime.timedelta(minutes=10)


class Transformer(torch.nn.Module):
  """model.py's, of parameters named and shaped as there."""

  def __init__(self, start: dict[str, np.ndarray], layers: int, heads: int):
    super().__init__()
    self.layers, self.heads = layers, heads
    self.names = list(start)
    self.values = torch.nn.ParameterList(
      torch.nn.Parameter(torch.from_numpy(x.copy())) for x in start.values()
    )

  def forward(self, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a byte."""
    p = dict(zip(self.names, self.values, strict=True))
    rows = rows.long()
    x = functional.embedding(rows[:, :-1], p['embedding.embedding'])
    for i in range(self.layers):
      own = lambda name, i=i: p[f'blocks.{i}.{name}']
      x = x + self._attend(_norm(x, own('attention_norm.scale')), own)
      y = _norm(x, own('mlp_norm.scale')) @ own('mlp.up.kernel')
      x = x + torch.relu(y).square() @ own('mlp.down.kernel')
    logits = _norm(x, p['norm.scale']) @ p['head.kernel']
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

  def _attend(self, x, own):
    b, t, w = x.shape
    qkv = (x @ own('attention.qkv.kernel')).view(b, t, 3 * self.heads, -1)
    q, k, v = qkv.chunk(3, dim=2)
    q = _rotate(_norm(q, own('attention.query_norm.scale')))
    k = _rotate(_norm(k, own('attention.key_norm.scale')))
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(b, t, w) @ own('attention.out.kernel')


def _norm(x, scale):
  return functional.rms_norm(x, scale.shape, scale, eps=1e-6)


def _rotate(x):
  cos, sin = _angles(x.shape[1], x.shape[3])
  a, b = x.chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@functools.lru_cache
def _angles(t, d):
  angles = np.arange(t)[:, None, None] * 1e4 ** (-np.arange(0, d, 2) / d)
  as_tensor = lambda x: torch.from_numpy(np.float32(x))
  return as_tensor(np.cos(angles)), as_tensor(np.sin(angles))


class Muon:
  """What methods.muon trains with: Muon on matrices, Nadam on vectors."""

  def __init__(self, params):
    self.params = list(params)
    self.first = [torch.zeros_like(p) for p in self.params]
    self.second = [torch.zeros_like(p) for p in self.params]
    self.count = 0

  @torch.no_grad()
  def step(self, rate: float) -> None:
    """Moves the parameters along their gradients."""
    torch.nn.utils.clip_grad_norm_(self.params, 1.0)
    self.count += 1
    for p, m, v in zip(self.params, self.first, self.second, strict=True):
      if p.ndim == 2:
        scale = math.sqrt(max(1, p.shape[1] / p.shape[0]))
        update = scale * _orthogonal(self._ahead(m, p.grad, 0.95)) + 0.1 * p
        p.sub_(update, alpha=2 * rate)
      else:
        v.lerp_(p.grad.square(), 1 - 0.999)
        root = (v / (1 - 0.999**self.count)).sqrt_() + 1e-8
        p.sub_(self._ahead(m, p.grad, 0.9) / root, alpha=rate)

  def _ahead(self, momentum, grad, decay):
    """Nesterov's momentum, without the bias of its start."""
    momentum.lerp_(grad, 1 - decay)
    return momentum * (decay / (1 - decay ** (self.count + 1))) + grad * (
      (1 - decay) / (1 - decay**self.count)
    )


def _orthogonal(x):
  is_tall = x.shape[0] > x.shape[1]
  x = x.T if is_tall else x
  x = x / (x.norm() + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = _NEWTON[0] * x + (_NEWTON[1] * a + _NEWTON[2] * a @ a) @ x
  return x.T if is_tall else x


def rate_at(step: int, steps: int, peak: float) -> float:
  """lm.schedule's learning rate."""
  warmup = steps // 10
  if step < warmup:
    return peak * step / warmup
  done = min((step - warmup) / (steps - warmup), 1)
  return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


class Host:
  """One host's worker."""

  def __init__(self, config: lm.Config, data: text.Text, host: int):
    self.config, self.data, self.host = config, data, host
    rows = text.validation_rows(
      data, config.length, config.workers, VALIDATION_ROWS
    )
    self.rows = self._own(rows)

  def _own(self, rows):
    """This host's part, as a JAX device has it."""
    return torch.from_numpy(np.split(rows, self.config.workers)[self.host])

  def train(self, method: str, seed: int, start: str) -> dict[str, Any]:
    """Trains from the start; ``start`` is a file of parameters."""
    config = self.config
    batches = text.training_batches(
      self.data, config.length, config.batch * config.workers, seed
    )
    batches = [self._own(batches[i]) for i in range(config.steps)]
    with np.load(start) as parameters:
      model = Transformer(dict(parameters), config.layers, config.heads)
    loss_of = model if method in LIMITS else DistributedDataParallel(model)
    if method == COMPRESSED_PEER:
      state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=2,
        start_powerSGD_iter=2,  # As early as it can begin.
        orthogonalization_epsilon=1e-8,  # The first gradients are zeros.
      )
      loss_of.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = Muon(model.parameters())
    peak = methods.find(methods.DENSE).learning_rate
    losses, stretches = [], Stretches(dist.barrier)
    for index, batch in enumerate(batches):
      if index % config.every_eval == 0:
        stretches.begin()
      model.zero_grad()
      loss_of(batch).backward()
      optimizer.step(rate_at(index, config.steps, peak))
      if (index + 1) % config.every_eval == 0 or index + 1 == config.steps:
        stretches.end()
        with torch.no_grad():
          loss = model(self.rows)
        dist.all_reduce(loss)
        losses.append(float(loss) / config.workers)
    return {'losses': losses, **stretches.found()}


def start(host: int, hosts: int, data: str | None, address: str, **fields: Any):
  """Joins the others; returns what carries out a task."""
  torch.set_num_threads(1)
  dist.init_process_group('gloo', f'tcp://{address}', _WAIT, hosts, host)
  config = lm.Config(**fields, workers=hosts)
  own = Host(config, text.load(Path(data) if data else None), host)

  def carry_out(do, **arguments):
    return getattr(own, do)(**arguments)

  return carry_out


if __name__ == '__main__':
  crew.serve(start)
