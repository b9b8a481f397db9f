"""Checkpoints of small models on disk, plain and quantised, and what is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import small
from commands import in_process
from flax import traverse_util

from glm_jax import checkpoints, models, sharding
from glm_jax.batch import Visibility
from glm_jax.checkpoints import slices, variables
from glm_jax.models import ChatGLM2Config, GLMConfig
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import adapters, state

B, T = 4, 12
_SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, max_positions=80)
# They read and write bytes.
FAMILIES = {
  'glm': GLMConfig(**_SIZES, init_std=0.3),
  'chatglm2': ChatGLM2Config(
    **_SIZES, mlp_size=48, num_kv_heads=2, head_size=8, init_std=0.3
  ),
}


def checkpoint(folder, config, seed=0, holds=lambda path: True, **more):
  """A plain one, of fresh parameters, or of some of them."""
  params = slices.flat(small.params(config, seed))
  leaves = {k: np.asarray(v) for k, v in params.items() if holds(k)}
  specs = {k: slices.LeafSpec(v.shape, v.dtype) for k, v in leaves.items()}
  read = lambda path, layer: leaves[path] if layer is None else leaves[path][layer]
  meta = {
    'model': models.config.to_dict(config),
    'vocabulary': ByteVocabulary().to_dict(),
    **more,
  }
  slices.write(folder, specs, read, meta, lambda _: None)
  return folder


def adapted(folder, base, config, lora, seed=0):
  """A checkpoint of random factors, or of virtual tokens, as a run writes it."""
  rng = np.random.default_rng(seed)
  shapes = state.abstract_params(config, None, adapters.leaves(lora, config))
  leaves = {
    path: rng.normal(0, 0.1, leaf.shape).astype(np.float32)
    for path, leaf in slices.flat(shapes).items()
    if path[0] in adapters.NAMES
  }
  meta = {
    **checkpoints.read_meta(checkpoints.find(str(base))),
    'base': checkpoints.describe(checkpoints.find(str(base))),
    'adapters': adapters.to_dict(lora),
  }
  specs = {k: slices.LeafSpec(v.shape, v.dtype) for k, v in leaves.items()}
  slices.write(folder, specs, lambda path, _: leaves[path], meta, lambda _: None)
  return folder


def read(folder, config, layout=None):
  """Collections; on one device, unless a layout says otherwise."""
  layout = layout or sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  found = checkpoints.find(str(folder))
  return variables.read(found, state.abstract_params(config, layout))


def same(got, expected):
  """Names, dtypes and bytes of two trees."""
  got, expected = (traverse_util.flatten_dict(tree) for tree in (got, expected))
  assert {*got} == {*expected}
  for path, leaf in expected.items():
    assert got[path].dtype == leaf.dtype and got[path].shape == leaf.shape, path
    assert np.asarray(got[path]).tobytes() == np.asarray(leaf).tobytes(), path


def quantize(*arguments):
  """The command, and what it says."""
  done = in_process('quantize', *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


def inputs(vocabulary):
  """Rows of random tokens, and what stands beside them."""
  ids = np.random.default_rng(0).integers(0, vocabulary, (B, T)).astype(np.int32)
  t = jnp.broadcast_to(jnp.arange(T), (B, T))
  return ids, t, jnp.zeros_like(t), Visibility(jnp.zeros_like(t), t + 1)


def logits(config, collections, inputs):
  return np.asarray(jax.jit(models.build(config).apply)(collections, *inputs)[0])
