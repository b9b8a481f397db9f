"""The same models and the same training step in plain PyTorch, as good as it gets there.

Queries, keys and values are one product, and so are gate and up, as in the released code;
AdamW is fused; with bfloat16, weights stay float32 and products are autocast. Attention is
`scaled_dot_product_attention`: causal rows by its flag, other rows by a mask. Under
`torch.compile` on a GPU, those have FlexAttention, which skips blocks as our kernels do.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from glm_jax.batch import Batch
from glm_jax.training.optimizer import OptimizerConfig


class Block(nn.Module):
  """Pre-norm attention and MLP of GLM (LayerNorm, GELU) or ChatGLM2 (RMSNorm, SwiGLU)."""

  def __init__(self, c: Any):
    super().__init__()
    self.c = c
    D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size
    norm = (
      (lambda: nn.RMSNorm(D, c.norm_epsilon)) if c.causal else (lambda: nn.LayerNorm(D))
    )
    self.attention_norm, self.mlp_norm = norm(), norm()
    self.qkv = nn.Linear(D, (N + 2 * K) * H)
    self.out = nn.Linear(N * H, D, bias=not c.causal)
    self.up = nn.Linear(D, (2 if c.gated else 1) * c.inner_size, bias=not c.causal)
    self.down = nn.Linear(c.inner_size, D, bias=not c.causal)

  def forward(self, x: torch.Tensor, seen: Any, phases: Any) -> torch.Tensor:
    c = self.c
    N, K, H = c.num_heads, c.num_kv_heads, c.head_size
    # [B, T, heads, H] -> [B, heads, T, H]
    qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (N + 2 * K, H)).transpose(1, 2)
    q, k, v = qkv.split((N, K, K), dim=1)
    if phases is not None:
      q, k = _rotate(q, phases), _rotate(k, phases)
    x = x + self.out(_attend(q, k, v, seen).transpose(1, 2).flatten(2))
    h = self.up(self.mlp_norm(x))
    if c.gated:
      gate, up = h.chunk(2, -1)
      h = F.silu(gate) * up
    else:
      h = F.gelu(h, approximate='tanh')
    return x + self.down(h)


class Model(nn.Module):
  """Tokens to the summed loss of a batch."""

  def __init__(self, c: Any):
    super().__init__()
    self.c = c
    D, V = c.hidden_size, c.vocab_size
    self.words = nn.Embedding(V, D)
    if c.two_positions:
      self.positions = nn.Embedding(c.max_positions + 1, D)
      self.block_positions = nn.Embedding(c.max_positions + 1, D)
    self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
    self.final_norm = nn.RMSNorm(D, c.norm_epsilon) if c.causal else nn.LayerNorm(D)
    if c.causal:
      self.head = nn.Linear(D, V, bias=False)

  def forward(self, batch: dict[str, torch.Tensor], seen: Any) -> torch.Tensor:
    c, phases = self.c, None
    x = self.words(batch['tokens'])
    if c.two_positions:
      x = x + self.positions(batch['positions'])
      x = x + self.block_positions(batch['block_positions'])
    else:
      powers = torch.arange(0, c.rotated_size, 2, device=x.device) / c.rotated_size
      angles = batch['positions'][:, None, :, None] / (c.rope_theta**powers)
      phases = angles.cos(), angles.sin()
    for layer in self.layers:
      x = layer(x, seen, phases)
    weight = self.head.weight if c.causal else self.words.weight
    logits = F.linear(self.final_norm(x), weight).float()
    losses = F.cross_entropy(
      logits.flatten(0, 1), batch['targets'].flatten().long(), reduction='none'
    )
    return (losses * batch['loss_weights'].flatten()).sum()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Any) -> torch.Tensor:
  """Causal attention if `seen` is None; else by FlexAttention's blocks, or by a mask."""
  gqa = q.shape[1] != k.shape[1]
  if isinstance(seen, flex.BlockMask):
    return flex.flex_attention(q, k, v, block_mask=seen, enable_gqa=gqa)
  return F.scaled_dot_product_attention(
    q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=gqa
  )


def _rotate(x: torch.Tensor, phases: Any) -> torch.Tensor:
  cos, sin = phases
  size = 2 * cos.shape[-1]
  even, odd = x[..., :size].float().unflatten(-1, (-1, 2)).unbind(-1)
  turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
  return torch.cat([turned.to(x.dtype), x[..., size:]], -1)


def _load(model: Model, params: Any) -> None:
  """Our weights: the two must have the same loss."""

  def array(*path: str) -> torch.Tensor:
    leaf = params
    for name in path:
      leaf = leaf[name]
    return torch.from_dlpack(leaf).clone()

  def flat(*path: str) -> torch.Tensor:
    """[L, D, heads, H] -> [L, heads x H, D]: rows are outputs."""
    return array(*path).flatten(2).transpose(1, 2)

  def copy(module: nn.Module, source: Any) -> None:
    module.weight.data.copy_(source['scale'] if 'scale' in source else source['weight'])
    if module.bias is not None:
      module.bias.data.copy_(source['bias'])

  c = model.c
  tables = (
    ('words', 'positions', 'block_positions') if c.two_positions else ('words', 'head')
  )
  for name in tables:
    getattr(model, name).weight.data.copy_(array(name, 'weight'))
  norms = ('scale',) if c.causal else ('scale', 'bias')
  up = ('gate', 'up') if c.gated else ('up',)
  qkv = {
    'weight': torch.cat([flat('layers', 'attention', n, 'weight') for n in 'qkv'], 1),
    'bias': torch.cat(
      [array('layers', 'attention', n, 'bias').flatten(1) for n in 'qkv'], 1
    ),
  }
  rest = () if c.causal else ('bias',)
  mlp = {'weight': torch.cat([flat('layers', 'mlp', n, 'weight') for n in up], 1)}
  mlp |= {n: torch.cat([array('layers', 'mlp', u, n) for u in up], 1) for n in rest}
  out = {'weight': array('layers', 'attention', 'out', 'weight').flatten(1, 2).mT}
  out |= {n: array('layers', 'attention', 'out', n) for n in rest}
  down = {'weight': array('layers', 'mlp', 'down', 'weight').mT}
  down |= {n: array('layers', 'mlp', 'down', n) for n in rest}
  for i, layer in enumerate(model.layers):
    for module, source in (
      (layer.qkv, qkv),
      (layer.up, mlp),
      (layer.out, out),
      (layer.down, down),
      *(
        (getattr(layer, name), {n: array('layers', name, n) for n in norms})
        for name in ('attention_norm', 'mlp_norm')
      ),
    ):
      weights = {name: value[i] for name, value in source.items()}
      if isinstance(module, nn.RMSNorm):
        module.weight.data.copy_(weights['scale'])
      else:
        copy(module, weights)
  final = {n: array('final_norm', n) for n in norms}
  if c.causal:
    model.final_norm.weight.data.copy_(final['scale'])
  else:
    copy(model.final_norm, final)


class Step:
  """A training step that can be timed: forward, backward, clipping, AdamW."""

  def __init__(
    self,
    config: Any,
    dtype: str,
    optimizer: OptimizerConfig,
    params: Any,
    batch: Batch,
    *,
    compiled: bool,
  ):
    """
    Args:
      config: of a GLM or a ChatGLM2, without dropout.
      dtype: of `ComputeConfig`.
      optimizer: its constants.
      params: our parameters, of which the step has a copy.
      batch: numpy.
      compiled: by `torch.compile`.
    """
    self._cuda = torch.cuda.is_available() and jax.default_backend() == 'gpu'
    device = torch.device('cuda' if self._cuda else 'cpu')
    torch.set_float32_matmul_precision('highest' if dtype == 'float32' else 'high')
    self._model = Model(config).to(device)
    _load(self._model, params)
    fields = batch._asdict()
    fields.pop('index')
    self._batch = {k: torch.from_numpy(np.array(v)).to(device) for k, v in fields.items()}
    self._weights = float(batch.loss_weights.sum())
    # No decay on biases and norms, as ours.
    matrices = [p for p in self._model.parameters() if p.ndim > 1]
    vectors = [p for p in self._model.parameters() if p.ndim == 1]
    self._optimizer = torch.optim.AdamW(
      [
        {'params': matrices, 'weight_decay': optimizer.weight_decay},
        {'params': vectors, 'weight_decay': 0.0},
      ],
      lr=optimizer.learning_rate,
      betas=(optimizer.beta1, optimizer.beta2),
      eps=optimizer.epsilon,
      fused=True,
    )
    self._clip = optimizer.clip_norm
    t = np.arange(batch.tokens.shape[1])
    self._causal = bool((batch.key_start == 0).all() and (batch.key_end == t + 1).all())
    self._flex = compiled and self._cuda and not self._causal
    self._blocks = torch.compile(flex.create_block_mask) if self._flex else None
    self._loss = torch.compile(self._model) if compiled else self._model
    self._cast = torch.autocast(device.type, torch.bfloat16, dtype == 'bfloat16')

  def _seen(self) -> Any:
    """What attention is given for this batch, made once a step, as ours is."""
    if self._causal:
      return None
    start, end = self._batch['key_start'], self._batch['key_end']
    rows, length = start.shape
    if self._flex:
      visible = lambda b, h, q, k: (start[b, q] <= k) & (k < end[b, q])
      return self._blocks(visible, rows, None, length, length, device=start.device.type)
    s = torch.arange(length, device=start.device)
    return ((start[..., None] <= s) & (s < end[..., None]))[:, None]

  def run(self, steps: int) -> tuple[float, float]:
    """Seconds a step, and the loss of the last."""
    began = time.perf_counter()
    for _ in range(steps):
      with self._cast:
        loss = self._loss(self._batch, self._seen()) / self._weights
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
      self._optimizer.step()
      self._optimizer.zero_grad()
    value = float(loss)  # waits for the device
    if self._cuda:
      torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps, value

  def peak_bytes(self) -> int | None:
    """Of device memory, since the process began."""
    return torch.cuda.max_memory_allocated() if self._cuda else None
