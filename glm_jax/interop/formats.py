"""How each released format names and shapes the weights: one table a format.

An entry is one foreign tensor and the parts of it that are our leaves. A part is given
as a *view*: a function that looks at the foreign array in the shape of ours by slicing,
reshaping and transposing alone. The one function therefore serves both directions:
reading takes the view, writing assigns to it, and the way there and back is exact.

PyTorch stores a linear weight as [out, in]. Checkpoints of several parts (tensor
parallelism, `mp_rank_00`, `mp_rank_01`, ...) hold the same tensors with `num_heads`,
`mlp_size` and `vocab_size` divided among them; `LeafView.axis` says along which axis of
ours the parts follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from glm_jax.configs import UserError
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig, quantized

Path = tuple[str, ...]
View = Callable[[np.ndarray], np.ndarray]


class LeafView(NamedTuple):
  """Our leaf inside a foreign tensor.

  Attributes:
    path: of the leaf in the parameter tree.
    layer: which layer of it, where layers are stacked; None elsewhere.
    view: the foreign array in the shape of (the layer of) the leaf.
    axis: of ours that checkpoints of several parts divide; None if each holds all.
  """

  path: Path
  layer: int | None
  view: View
  axis: int | None


class Entry(NamedTuple):
  """A foreign tensor.

  Attributes:
    name: as the checkpoint has it.
    shape: in one part of the checkpoint.
    sizes: for each dimension, the config fields that it comes from.
    parts: the leaves, or layers of leaves, that it holds.
  """

  name: str
  shape: tuple[int, ...]
  sizes: tuple[str, ...]
  parts: tuple[LeafView, ...]


class Format(NamedTuple):
  """A released format.

  Attributes:
    config: kind of model.
    entries: (config, parts) -> its tensors, in the order of the forward pass.
    container: 'huggingface' (config.json, shards and an index) or 'megatron'
      (`mp_rank_*` files).
    describes: what it is, for help and messages.
  """

  config: type
  entries: Callable[[Any, int], list[Entry]]
  container: str
  describes: str


def _same(array: np.ndarray) -> np.ndarray:
  return array


def _transposed(array: np.ndarray) -> np.ndarray:
  return array.T


class _Sizes(NamedTuple):
  """Sizes of one part: N, K, F and V are its own share."""

  # Width; query heads, key/value heads and their size; width of the MLP; vocabulary.
  D: int
  N: int
  K: int
  H: int
  F: int
  V: int

  @classmethod
  def of(cls, config: Any, parts: int) -> _Sizes:
    c = config
    # A head or a row of the vocabulary is never cut in two.
    for name in ('num_heads', 'num_kv_heads', 'inner_size', 'vocab_size'):
      if getattr(c, name) % parts:
        raise UserError(
          f'{name} must divide by the {parts} parts of the checkpoint, got '
          f'{getattr(c, name)}; use another number of parts.'
        )
    return cls(
      c.hidden_size,
      c.num_heads // parts,
      c.num_kv_heads // parts,
      c.head_size,
      c.inner_size // parts,
      c.vocab_size // parts,
    )


def _plain(name: str, path: Path, layer: int | None, shape, sizes, axis=None) -> Entry:
  """A tensor stored as we have it."""
  return Entry(name, shape, sizes, (LeafView(path, layer, _same, axis),))


def _norm(name: str, path: Path, layer: int | None, s: _Sizes, bias: bool) -> list[Entry]:
  kinds = (('weight', 'scale'), ('bias', 'bias')) if bias else (('weight', 'scale'),)
  return [
    _plain(f'{name}.{stored_as}', (*path, leaf), layer, (s.D,), ('hidden_size',))
    for stored_as, leaf in kinds
  ]


def _heads(rows: slice, heads: int, H: int) -> View:
  """Rows of a fused [out, D] weight (or [out] bias) as [D, heads, H] (or [heads, H])."""

  def view(array: np.ndarray) -> np.ndarray:
    # [rows, D] -> [heads, H, D] -> [D, heads, H]; without D for a bias. NumPy needs no copy
    # for a slice of leading rows, a split of an axis or a transposition.
    array = array[rows].reshape(heads, H, *array.shape[1:])
    return array.transpose(2, 0, 1) if array.ndim == 3 else array

  return view


def _interleaved_heads(which: int, heads: int, H: int) -> View:
  """As `_heads`, of weights whose rows are q, k, v of head 0, then of head 1, ..."""

  def view(array: np.ndarray) -> np.ndarray:
    # [3 * heads * H, D] -> [heads, 3, H, D] -> [heads, H, D] -> [D, heads, H]
    array = array.reshape(heads, 3, H, *array.shape[1:])[:, which]
    return array.transpose(2, 0, 1) if array.ndim == 3 else array

  return view


def _qkv(name: str, layer: int, s: _Sizes, bias: bool, interleaved: bool) -> list[Entry]:
  """Fused query, key and value."""
  # The rows are those of q, then k, then v; with grouped heads, the last two have fewer.
  rows = (s.N + 2 * s.K) * s.H
  ends = np.cumsum([0, s.N * s.H, s.K * s.H, s.K * s.H])
  entries = []
  for kind in ('weight', 'bias') if bias else ('weight',):
    parts = []
    for which, (leaf, heads) in enumerate((('q', s.N), ('k', s.K), ('v', s.K))):
      if interleaved:
        view = _interleaved_heads(which, heads, s.H)
      else:
        view = _heads(slice(ends[which], ends[which + 1]), heads, s.H)
      path = ('layers', 'attention', leaf, kind)
      # The heads are divided among parts: axis 1 of [D, heads, H], axis 0 of [heads, H].
      parts.append(LeafView(path, layer, view, 1 if kind == 'weight' else 0))
    shape = (rows, s.D) if kind == 'weight' else (rows,)
    sizes = ('num_heads, num_kv_heads, head_size', 'hidden_size')[: len(shape)]
    entries.append(Entry(f'{name}.{kind}', shape, sizes, tuple(parts)))
  return entries


def _out(name: str, layer: int, s: _Sizes, bias: bool) -> list[Entry]:
  """Attention's output."""

  def view(array: np.ndarray) -> np.ndarray:
    # [D, N * H] -> [D, N, H] -> [N, H, D]; scales of integers are [D].
    return array.reshape(s.D, s.N, s.H).transpose(1, 2, 0) if array.ndim == 2 else array

  path = ('layers', 'attention', 'out')
  shape, sizes = (s.D, s.N * s.H), ('hidden_size', 'num_heads, head_size')
  part = LeafView((*path, 'weight'), layer, view, 0)
  entries = [Entry(f'{name}.weight', shape, sizes, (part,))]
  # The bias is added to the sum over parts, so that each of them holds all of it.
  if bias:
    entries.append(_plain(f'{name}.bias', (*path, 'bias'), layer, (s.D,), ('hidden_size',)))
  return entries


def _up(
  name: str, layer: int, s: _Sizes, bias: bool, halves: tuple[str, ...]
) -> list[Entry]:
  """The first weight of the MLP: `halves` says what its rows are, in order."""
  entries = []
  for kind in ('weight', 'bias') if bias else ('weight',):
    # A function of its own, so that each half's rows are bound when it is made.
    def view(number: int) -> View:
      rows = slice(number * s.F, (number + 1) * s.F)
      # [halves * F, D] -> [F, D] -> [D, F]; of a bias, [F].
      return lambda array: array[rows].T

    parts = tuple(
      LeafView(('layers', 'mlp', half, kind), layer, view(i), 1 if kind == 'weight' else 0)
      for i, half in enumerate(halves)
    )
    shape = (len(halves) * s.F, s.D) if kind == 'weight' else (len(halves) * s.F,)
    sizes = ('mlp_size', 'hidden_size')[: len(shape)]
    entries.append(Entry(f'{name}.{kind}', shape, sizes, parts))
  return entries


def _down(name: str, layer: int, s: _Sizes, bias: bool) -> list[Entry]:
  # [D, F] -> [F, D]: the input's width is what parts divide, and the bias is whole.
  path = ('layers', 'mlp', 'down')
  part = LeafView((*path, 'weight'), layer, _transposed, 0)
  entries = [Entry(f'{name}.weight', (s.D, s.F), ('hidden_size', 'mlp_size'), (part,))]
  if bias:
    entries.append(_plain(f'{name}.bias', (*path, 'bias'), layer, (s.D,), ('hidden_size',)))
  return entries


def _vocabulary_rows(name: str, path: Path, s: _Sizes) -> Entry:
  return _plain(name, path, None, (s.V, s.D), ('vocab_size', 'hidden_size'), 0)


def _thudm_block(
  i: int, s: _Sizes, interleaved: bool, halves: tuple[str, ...]
) -> Iterator[Entry]:
  """A layer of THUDM/GLM, ChatGLM-6B and GLM-130B: the names are the same."""
  at = f'transformer.layers.{i}'
  yield from _norm(f'{at}.input_layernorm', ('layers', 'attention_norm'), i, s, True)
  yield from _qkv(f'{at}.attention.query_key_value', i, s, True, interleaved)
  yield from _out(f'{at}.attention.dense', i, s, True)
  yield from _norm(f'{at}.post_attention_layernorm', ('layers', 'mlp_norm'), i, s, True)
  yield from _up(f'{at}.mlp.dense_h_to_4h', i, s, True, halves)
  yield from _down(f'{at}.mlp.dense_4h_to_h', i, s, True)


def glm(c: GLMConfig, parts: int) -> list[Entry]:
  """THUDM/GLM mpu/transformer.py: all of Q, all of K, all of V."""
  s = _Sizes.of(c, parts)
  # No entry for a head: GLM's is always the embedding table.
  entries = [_vocabulary_rows('word_embeddings.weight', ('words', 'weight'), s)]
  # Learned tables of positions, and of positions inside a span; every part has both.
  for kind in ('positions', 'block_positions'):
    name = kind.removesuffix('positions') + 'position_embeddings'
    shape, sizes = (c.max_positions + 1, s.D), ('max_positions', 'hidden_size')
    path = (kind, 'weight')
    entries.append(_plain(f'transformer.{name}.weight', path, None, shape, sizes))
  for i in range(c.num_layers):
    entries += _thudm_block(i, s, False, ('up',))
  return entries + _norm('transformer.final_layernorm', ('final_norm',), None, s, True)


def chatglm(c: ChatGLMConfig, parts: int) -> list[Entry]:
  """ChatGLM-6B and GLM-130B: q, k, v head after head; GEGLU's gate is the second half."""
  s = _Sizes.of(c, parts)
  entries = [_vocabulary_rows('transformer.word_embeddings.weight', ('words', 'weight'), s)]
  for i in range(c.num_layers):
    # SwissArmyTransformer glm130B_model.py: x1, x2 = halves; x1 * gelu(x2).
    entries += _thudm_block(i, s, True, ('up', 'gate') if c.gated else ('up',))
  entries += _norm('transformer.final_layernorm', ('final_norm',), None, s, True)
  return entries + _head('lm_head.weight', c, s)


def chatglm2(c: ChatGLM2Config, parts: int) -> list[Entry]:
  """ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, as their own code names them."""
  s = _Sizes.of(c, parts)
  words = 'transformer.embedding.word_embeddings.weight'
  entries = [_vocabulary_rows(words, ('words', 'weight'), s)]
  for i in range(c.num_layers):
    at = f'transformer.encoder.layers.{i}'
    entries += _norm(f'{at}.input_layernorm', ('layers', 'attention_norm'), i, s, False)
    entries += _qkv(f'{at}.self_attention.query_key_value', i, s, c.qkv_bias, False)
    entries += _out(f'{at}.self_attention.dense', i, s, False)
    entries += _norm(f'{at}.post_attention_layernorm', ('layers', 'mlp_norm'), i, s, False)
    # SwiGLU of ChatGLM2's MLP.swiglu: silu(first half) * second half.
    entries += _up(f'{at}.mlp.dense_h_to_4h', i, s, False, ('gate', 'up'))
    entries += _down(f'{at}.mlp.dense_4h_to_h', i, s, False)
  path = ('final_norm',)
  entries += _norm('transformer.encoder.final_layernorm', path, None, s, False)
  return entries + _head('transformer.output_layer.weight', c, s)


def hf_glm(c: ChatGLM2Config, parts: int) -> list[Entry]:
  """The same model as transformers' `glm` and `glm4` name it: q, k and v apart."""
  s = _Sizes.of(c, parts)
  entries = [_vocabulary_rows('model.embed_tokens.weight', ('words', 'weight'), s)]
  for i in range(c.num_layers):
    at = f'model.layers.{i}'
    entries += _norm(f'{at}.input_layernorm', ('layers', 'attention_norm'), i, s, False)
    for leaf, heads, field in (
      ('q', s.N, 'num_heads'),
      ('k', s.K, 'num_kv_heads'),
      ('v', s.K, 'num_kv_heads'),
    ):
      for kind in ('weight', 'bias') if c.qkv_bias else ('weight',):
        shape = (heads * s.H, s.D) if kind == 'weight' else (heads * s.H,)
        path, axis = ('layers', 'attention', leaf, kind), 1 if kind == 'weight' else 0
        part = LeafView(path, i, _heads(slice(None), heads, s.H), axis)
        sizes = (f'{field}, head_size', 'hidden_size')[: len(shape)]
        name = f'{at}.self_attn.{leaf}_proj.{kind}'
        entries.append(Entry(name, shape, sizes, (part,)))
    entries += _out(f'{at}.self_attn.o_proj', i, s, False)
    if c.sandwich_norms:
      out = f'{at}.post_self_attn_layernorm', ('layers', 'attention_out_norm')
      entries += _norm(*out, i, s, False)
    # Of `glm4`, too, and in spite of its name there: it stands before the MLP.
    entries += _norm(f'{at}.post_attention_layernorm', ('layers', 'mlp_norm'), i, s, False)
    entries += _up(f'{at}.mlp.gate_up_proj', i, s, False, ('gate', 'up'))
    entries += _down(f'{at}.mlp.down_proj', i, s, False)
    if c.sandwich_norms:
      out = f'{at}.post_mlp_layernorm', ('layers', 'mlp_out_norm')
      entries += _norm(*out, i, s, False)
  entries += _norm('model.norm', ('final_norm',), None, s, False)
  return entries + _head('lm_head.weight', c, s)


def _head(name: str, c: Any, s: _Sizes) -> list[Entry]:
  """An untied head; whether a file repeats a tied one is the file's affair."""
  return [] if c.tied_head else [_vocabulary_rows(name, ('head', 'weight'), s)]


def with_scales(entries: list[Entry]) -> Iterator[Entry]:
  """Those of a model of integers: behind each weight that is quantised, its scales."""
  for entry in entries:
    yield entry
    if all(quantized.inputs_of(part.path) for part in entry.parts):
      # A view of [out, in] looks at [out] as it does at a bias.
      parts = tuple(
        part._replace(path=quantized.scale_of(part.path), axis=None) for part in entry.parts
      )
      yield Entry(f'{entry.name}_scale', entry.shape[:1], entry.sizes[:1], parts)


FORMATS = {
  'megatron': Format(GLMConfig, glm, 'megatron', 'THUDM/GLM, mp_rank_* files'),
  'glm-10b': Format(
    GLMConfig, glm, 'huggingface', 'glm-10b, glm-large, ... with their own code'
  ),
  'glm-130b': Format(ChatGLMConfig, chatglm, 'megatron', 'GLM-130B, mp_rank_* files'),
  'chatglm': Format(ChatGLMConfig, chatglm, 'huggingface', 'ChatGLM-6B with its own code'),
  'chatglm2': Format(
    ChatGLM2Config,
    chatglm2,
    'huggingface',
    'ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B with their own code',
  ),
  'glm': Format(
    ChatGLM2Config,
    hf_glm,
    'huggingface',
    'the glm model of transformers and vLLM (ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B)',
  ),
  'glm4': Format(
    ChatGLM2Config,
    hf_glm,
    'huggingface',
    'the glm4 model of transformers and vLLM (GLM-4-0414, GLM-Z1)',
  ),
}
"""The formats, by the name that `convert --to` takes."""

WITH_INTEGERS = ('chatglm', 'chatglm2')
"""Formats whose code computes with integers, of one scale for each output."""

HEADS = {
  'glm-130b': 'lm_head.weight',
  'chatglm': 'lm_head.weight',
  'chatglm2': 'transformer.output_layer.weight',
  'glm': 'lm_head.weight',
  'glm4': 'lm_head.weight',
}
"""Where a format keeps its head, which may repeat the embedding table."""
WORDS = {
  'glm-130b': 'transformer.word_embeddings.weight',
  'chatglm': 'transformer.word_embeddings.weight',
  'chatglm2': 'transformer.embedding.word_embeddings.weight',
  'glm': 'model.embed_tokens.weight',
  'glm4': 'model.embed_tokens.weight',
}
"""Where these keep their embedding table."""
