"""Virtual tokens: learnt keys and values that open every document (P-tuning v2).

Liu et al., "P-Tuning v2", ACL 2022, section 3; ChatGLM-6B's and ChatGLM2-6B's
modeling_chatglm.py (PrefixEncoder). A virtual token is a token like any other but for its
negative position, -P .. -1, by which layers know it, and for its keys and values, which the
collection `prefix` holds: so intervals, packing and the cache need not know of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.batch import Batch


def prefix(config: Any, encoder: dict[str, Any]) -> dict[str, Any]:
  """The collection `prefix` of what is learnt.

  Args:
    config: of a model.
    encoder: {'embedding': [P, 2 L K H]}; with a projection {'embedding': [P, E], 'hidden':
      {'weight': [E, F], 'bias': [F]}, 'out': {'weight': [F, 2 L K H], 'bias': [2 L K H]}},
      which is `out(tanh(hidden(embedding)))`.

  Returns:
    {'layers': {'attention': {'k', 'v'}}}, [L, P, K, H] each.

  Example:
    >>> from glm_jax.models import ChatGLM2Config
    >>> config = ChatGLM2Config(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=2,
    ...                         head_size=4, mlp_size=8, vocab_size=8, max_positions=8)
    >>> prefix(config, {'embedding': jnp.zeros((5, 48))})['layers']['attention']['k'].shape
    (3, 5, 2, 4)
  """
  x = encoder['embedding']
  if 'out' in encoder:
    hidden, out = encoder['hidden'], encoder['out']
    x = jnp.tanh(x @ hidden['weight'] + hidden['bias'])
    x = x @ out['weight'] + out['bias']
  shape = (len(x), config.num_layers, 2, config.num_kv_heads, config.head_size)
  # [P, L, 2, K, H] -> [2, L, P, K, H]: of each layer its keys, then its values.
  k, v = jnp.transpose(x.reshape(shape), (2, 1, 0, 3, 4))
  return {'layers': {'attention': {'k': k, 'v': v}}}


def count(variables: dict[str, Any]) -> int:
  """P, virtual tokens of a model's variables; 0 without any."""
  learnt = variables.get('prefix')
  # [L, P, K, H], or without L where layers are apart.
  return jax.tree.leaves(learnt)[0].shape[-3] if learnt else 0


def opened(x_BT: jax.Array, value: int, P: int) -> jax.Array:
  """Rows with P more tokens before them, of that value.

  Example:
    >>> opened(jnp.array([[7, 8]]), 0, 3).tolist()
    [[0, 0, 0, 7, 8]]
  """
  return jnp.pad(x_BT, ((0, 0), (P, 0)), constant_values=value)


def opened_batch(batch: Batch, P: int) -> Batch:
  """Rows [B, T] of one document each as rows [B, P + T] that virtual tokens open.

  Each token sees them besides; they carry no loss.

  Example:
    >>> x = jnp.array([[7, 8, 0]])
    >>> batch = Batch(x, x, x > 0, x, x, key_start=0 * x, key_end=jnp.array([[1, 2, 0]]),
    ...               objective=x)
    >>> opened_batch(batch, 2).key_end.tolist()
    [[1, 2, 3, 4, 0]]
  """
  fields = {
    name: opened(value, 0, P)
    for name, value in batch._asdict().items()
    if name != 'index' and value is not None
  }
  before = jnp.arange(-P, 0)
  # Padding, which sees nothing, still does not.
  end = jnp.where(batch.key_end > 0, batch.key_end + P, 0)
  fields['key_end'] = opened(end, 0, P).at[:, :P].set(before + P + 1)
  fields['positions'] = fields['positions'].at[:, :P].set(before)
  return batch._replace(**fields)
