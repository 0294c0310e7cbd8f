"""A small decoder-only transformer over bytes, in Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

VOCABULARY = 256


def rotate(x: Float[Array, 'b t h d']) -> Float[Array, 'b t h d']:
  """Rotary positions (https://arxiv.org/abs/2104.09864)."""
  _, t, _, d = x.shape
  angles = np.arange(t)[:, None, None] * 1e4 ** (-np.arange(0, d, 2) / d)
  # Constants made with NumPy: XLA would compute them for each element anew.
  cos, sin = np.float32(np.cos(angles)), np.float32(np.sin(angles))
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def zeros_linear(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
  """A layer that starts at zero: the model starts as the identity."""
  init = nnx.initializers.zeros_init()
  return nnx.Linear(n_in, n_out, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
  """Causal self-attention with normalised queries and keys."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.heads = heads
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.query_norm = nnx.RMSNorm(width // heads, rngs=rngs)
    self.key_norm = nnx.RMSNorm(width // heads, rngs=rngs)
    self.out = zeros_linear(width, width, rngs)

  def __call__(self, x: Float[Array, 'b t w']) -> Float[Array, 'b t w']:
    b, t, w = x.shape
    qkv = self.qkv(x).reshape(b, t, 3 * self.heads, w // self.heads)
    q, k, v = jnp.split(qkv, 3, axis=2)
    q, k = rotate(self.query_norm(q)), rotate(self.key_norm(k))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return self.out(attended.reshape(b, t, w))


class Mlp(nnx.Module):
  """Squared ReLU: as good as GELU (arXiv:2109.08668), and cheap on a CPU."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
    self.down = zeros_linear(4 * width, width, rngs)

  def __call__(self, x: Float[Array, 'b t w']) -> Float[Array, 'b t w']:
    return self.down(jnp.square(jax.nn.relu(self.up(x))))


class Block(nnx.Module):
  """Attention, then a perceptron, each on a normalised copy."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = Attention(width, heads, rngs)
    self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
    self.mlp = Mlp(width, rngs)

  def __call__(self, x: Float[Array, 'b t w']) -> Float[Array, 'b t w']:
    x = x + self.attention(self.attention_norm(x))
    return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
  """Bytes in, logits of the next byte out."""

  def __init__(self, layers: int, width: int, heads: int, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(VOCABULARY, width, rngs=rngs)
    self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.head = zeros_linear(width, VOCABULARY, rngs)

  def __call__(self, x: Int[Array, 'b t']) -> Float[Array, 'b t v']:
    x = self.embedding(x)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


def next_byte_loss(
  model: Transformer, text: Int[Array, 'b t1']
) -> Float[Array, '']:
  """Mean cross-entropy in nats a byte; a row ends with one more to predict."""
  text = text.astype(jnp.int32)
  logits = model(text[:, :-1])
  target = jnp.take_along_axis(logits, text[:, 1:, None], axis=-1)[..., 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target)
