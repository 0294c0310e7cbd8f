"""A decoder-only transformer of any size, to plan with: never run here.

Layers are stacked and scanned, so that a model of 8 billion parameters compiles
as fast as a small one; weights are float32, cut over a slice's chips (FSDP),
and gathered in bfloat16 layer by layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Size:
  """Shape of a model: query heads of 128 features, a gated perceptron."""

  width: int
  layers: int
  heads: int
  key_heads: int
  hidden: int
  vocabulary: int


SIZES = {
  '10m': Size(256, 8, 2, 2, 768, 8192),
  '100m': Size(768, 12, 6, 6, 2048, 32768),
  '1b': Size(2048, 20, 16, 8, 5632, 32768),
  '3b': Size(3072, 28, 24, 8, 8192, 32768),
  '8b': Size(4096, 32, 32, 8, 14336, 128256),
}
AXIS = 'fsdp'  # a worker's devices
_HEAD = 128
_HALF = jnp.bfloat16
CHUNK = 512  # positions whose logits exist at a time


def param_shapes(size: Size) -> Any:
  """Shapes of the parameters; those of the layers are stacked.

  Args:
    size: of the model.

  Returns:
    A tree of ``jax.ShapeDtypeStruct``.
  """
  w, n = size.width, size.layers
  shapes = {
    'embedding': (size.vocabulary, w),
    'head': (w, size.vocabulary),
    'norm': (w,),
    'layers': {
      'attention_norm': (n, w),
      'query': (n, w, size.heads * _HEAD),
      'key_value': (n, w, 2 * size.key_heads * _HEAD),
      'out': (n, size.heads * _HEAD, w),
      'mlp_norm': (n, w),
      'gate_up': (n, w, 2 * size.hidden),
      'down': (n, size.hidden, w),
    },
  }
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def fsdp_specs(params: Any) -> Any:
  """Cuts each matrix along its rows; vectors stay whole.

  Args:
    params: what :func:`param_shapes` returned.

  Returns:
    A tree of PartitionSpecs.
  """
  rows = lambda x: [None] * (x.ndim - 2) + [AXIS]
  stacked = lambda path: path[0].key == 'layers'
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      PartitionSpec(*rows(x))
      if x.ndim - stacked(path) == 2
      else PartitionSpec()
    ),
    params,
  )


def next_token_loss(params: Any, tokens: Int[Array, 'b t1']) -> jax.Array:
  """Mean cross-entropy; a row ends with one more token to predict.

  Written from one device's point of view: it holds rows of each matrix and of
  the batch, and gathers a layer's weights when it comes to it.

  Args:
    params: as :func:`param_shapes` says, cut as :func:`fsdp_specs` says.
    tokens: one worker's batch, whose rows lie over ``'fsdp'``.

  Returns:
    The loss in nats a token.
  """
  return _loss_and_grads(params, tokens)[0]


def _loss_and_grads(params, tokens):
  specs = fsdp_specs(params)
  return jax.shard_map(
    jax.value_and_grad(_device_loss),
    in_specs=(specs, PartitionSpec(AXIS)),
    out_specs=(PartitionSpec(), specs),
    axis_names={AXIS},
  )(params, tokens)


# Gradients are taken on the devices: JAX cannot yet differentiate a shard_map
# within another one.
next_token_loss = jax.custom_vjp(next_token_loss)
next_token_loss.defvjp(
  _loss_and_grads,
  lambda grads, scale: (jax.tree.map(lambda g: scale * g, grads), None),
)


def _device_loss(params, tokens):
  x = _gathered(params['embedding'])[tokens[:, :-1]]

  @jax.checkpoint
  def layer(x, p):
    p = {
      k: _gathered(v) if v.ndim > 1 else v.astype(_HALF) for k, v in p.items()
    }
    x += _attention(_normalised(x, p['attention_norm']), p)
    hidden = _normalised(x, p['mlp_norm']) @ p['gate_up']
    gate, up = jnp.split(hidden, 2, -1)
    return x + (jax.nn.silu(gate) * up) @ p['down'], None

  x, _ = jax.lax.scan(layer, x, params['layers'])
  x = _normalised(x, params['norm'].astype(_HALF))
  head = _gathered(params['head'])

  @jax.checkpoint
  def chunk_loss(part):
    x, target = part
    logits = (x @ head).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, -1) - picked)

  target = tokens[:, 1:]
  chunks = lambda a: jnp.moveaxis(
    a.reshape(a.shape[0], -1, min(CHUNK, a.shape[1]), *a.shape[2:]), 1, 0
  )
  losses = jax.lax.map(chunk_loss, (chunks(x), chunks(target)))
  return jax.lax.pmean(jnp.sum(losses) / target.size, AXIS)


def _gathered(rows: Float[Array, 'r c']) -> Float[Array, 'n c']:
  """A whole matrix in bfloat16; its gradient is summed into each one's rows."""
  return jax.lax.all_gather(rows.astype(_HALF), AXIS, tiled=True)


def _attention(x, p):
  b, t, _ = x.shape
  heads = lambda a: a.reshape(b, t, -1, _HEAD)
  key, value = jnp.split(heads(x @ p['key_value']), 2, axis=2)
  query = _rotated(heads(x @ p['query']))
  attended = jax.nn.dot_product_attention(
    query, _rotated(key), value, is_causal=True
  )
  return attended.reshape(b, t, -1) @ p['out']


def _rotated(x):
  """Rotary positions (https://arxiv.org/abs/2104.09864)."""
  _, t, _, d = x.shape
  rates = 1e4 ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
  angles = jnp.arange(t, dtype=jnp.float32)[:, None, None] * rates
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x.dtype)


def _normalised(x, scale):
  wide = x.astype(jnp.float32)
  root = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
  return (wide * root).astype(x.dtype) * scale
