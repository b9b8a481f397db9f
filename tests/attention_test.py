"""Attention over intervals: every backend equals a plain softmax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.attention import attend, chunked
from glm_jax.attention.dense import drop
from glm_jax.batch import Visibility

B, H = 3, 8


def _visibility(kind, T):
  """Intervals of each layout; T is no multiple of a chunk."""
  t = np.arange(T)
  rng = np.random.default_rng(0)
  start, end = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  if kind == 'causal':
    end[:] = t + 1
  elif kind == 'bidirectional':
    end[:] = T
  elif kind == 'prefix':
    end[:] = np.maximum(rng.integers(1, T, (B, 1)), t + 1)
  elif kind == 'padded':
    length = rng.integers(1, T, (B, 1))
    end[:] = np.where(t < length, np.maximum(length // 2, t + 1), 0)
  elif kind == 'packed':
    for b in range(B):
      cuts = [0, *np.sort(rng.choice(np.arange(1, T), 3, replace=False)), T]
      for a, z in itertools.pairwise(cuts):
        start[b, a:z] = a
        end[b, a:z] = np.maximum((a + z) // 2, t[a:z] + 1)
  return Visibility(jnp.asarray(start), jnp.asarray(end))


def _reference(q, k, v, visibility):
  """Loops and numpy in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    a, z = int(visibility.key_start[b, t]), int(visibility.key_end[b, t])
    if z > a:
      head = n // (q.shape[2] // k.shape[2])
      scores = k[b, a:z, head] @ q[b, t, n] / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      out[b, t, n] = weights @ v[b, a:z, head] / weights.sum()
  return out


@pytest.mark.parametrize('heads', [(4, 4), (4, 2), (4, 1)], ids=['mha', 'gqa', 'mqa'])
@pytest.mark.parametrize('kind', ['causal', 'bidirectional', 'prefix', 'padded', 'packed'])
def test_backends_equal_the_reference_forward_and_backward(kind, heads, monkeypatch):
  monkeypatch.setattr(chunked, 'QUERY_CHUNK', 16)
  monkeypatch.setattr(chunked, 'KEY_CHUNK', 8)
  T, (N, K) = 37, heads
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
  weight = jax.random.normal(keys[3], (B, T, N, H))
  visibility = _visibility(kind, T)
  gradients = {}
  for backend in ('dense', 'chunked'):

    def weighted(q, k, v, backend=backend):
      out = attend(q, k, v, visibility, backend=backend)
      return (out * weight).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients[backend] = run(q, k, v)
    np.testing.assert_allclose(out, _reference(q, k, v, visibility), atol=2e-6)
  for dense, other in zip(*gradients.values(), strict=True):
    np.testing.assert_allclose(other, dense, atol=1e-5)
    assert bool(jnp.isfinite(dense).all())


def test_queries_may_be_fewer_than_keys():
  """As in a cache: one query over the first slots of a longer one."""
  q = jax.random.normal(jax.random.key(0), (2, 1, 2, H))
  k = jax.random.normal(jax.random.key(1), (2, 9, 2, H))
  visibility = Visibility(jnp.array([[0], [2]]), jnp.array([[4], [9]]))
  out = attend(q, k, k, visibility)
  np.testing.assert_allclose(out, _reference(q, k, k, visibility), atol=2e-6)


def test_an_unknown_backend_is_refused():
  q = jnp.zeros((1, 2, 2, H))
  visibility = Visibility(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  with pytest.raises(ValueError, match="one of .*got 'flash'"):
    attend(q, q, q, visibility, backend='flash')


def test_dropout_drops_its_share_and_keeps_the_mean():
  x = jnp.ones((200, 200))
  dropped = drop(x, 0.25, jax.random.key(0))
  assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
  assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_chunks_do_not_share_random_numbers(monkeypatch):
  """A reused key would drop the same places of every block of probabilities."""
  monkeypatch.setattr(chunked, 'QUERY_CHUNK', 16)
  monkeypatch.setattr(chunked, 'KEY_CHUNK', 16)
  T = 32
  q, k = jnp.zeros((1, T, 1, T)), jnp.zeros((1, T, 1, T))
  v = jnp.eye(T)[None, :, None]  # the output shows which keys were kept
  out = attend(
    q,
    k,
    v,
    Visibility(jnp.zeros((1, T), jnp.int32), jnp.full((1, T), T, jnp.int32)),
    backend='chunked',
    dropout_rate=0.5,
    dropout_key=jax.random.key(0),
  )
  kept = np.asarray(out[0, :, 0] > 0)
  blocks = [kept[i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
  for i, block in enumerate(blocks):
    assert 0.3 < block.mean() < 0.7
    for other in blocks[i + 1 :]:
      assert (block != other).mean() > 0.3


def test_chunked_attention_holds_no_square_array():
  T = 4096
  x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
  ends = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def total(q, k, v, start, end, backend):
    return attend(q, k, v, Visibility(start, end), backend=backend).sum()

  def compiled(backend):
    gradient = jax.grad(lambda *args: total(*args, backend), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(x, x, x, ends, ends).compile().as_text()

  assert f'{T},{T}]' not in compiled('chunked')
  assert f'{T},{T}]' in compiled('dense')
