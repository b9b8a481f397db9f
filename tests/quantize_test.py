"""Checkpoints whose weights are integers, and the command that makes them."""

import collections
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import stored
from commands import in_process, refused, snapshot
from flax import traverse_util

from glm_jax import checkpoints, sharding
from glm_jax.checkpoints import slices, variables
from glm_jax.models import GLMConfig, quantized
from glm_jax.training import state

CONFIG = GLMConfig(
  num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, max_positions=64
)


@pytest.fixture(scope='session')
def plain(tmp_path_factory):
  return stored.checkpoint(tmp_path_factory.mktemp('plain') / 'checkpoint', CONFIG)


@pytest.mark.parametrize(('bits', 'group'), [(8, 0), (4, 0), (4, 16)])
def test_a_quantised_checkpoint_is_the_model_quantised_in_memory(
  plain, tmp_path, bits, group
):
  out = stored.quantize(plain, tmp_path / 'out', f'--bits={bits}', f'--group={group}')
  assert f'{bits} bits: {state.count(small.params(CONFIG)):,} parameters' in out
  expected = quantized.of_tree(small.params(CONFIG), bits, group)
  stored.same(stored.read(tmp_path / 'out', CONFIG), expected)
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'out')))
  assert meta['quantized'] == {'bits': bits, 'group': group}
  assert meta['vocabulary']['kind'] == 'bytes' and meta['step'] == 0
  # Orbax's own reader, which is told nothing, gives the same bits.
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore((tmp_path / 'out' / 'params').absolute())
  weight = expected['params']['layers']['mlp']['up']['weight']
  assert tree['layers']['mlp']['up']['weight'].dtype == quantized.DTYPES[bits]
  np.testing.assert_array_equal(tree['layers']['mlp']['up']['weight'], weight)
  scales = expected['scales']['layers']['mlp']['up']['weight']
  np.testing.assert_array_equal(tree['layers']['mlp']['up']['weight_scale'], scales)


def test_a_plain_checkpoint_has_parameters_alone(plain):
  stored.same(stored.read(plain, CONFIG), {'params': small.params(CONFIG)})


def test_collections_are_born_on_the_shardings_of_their_weights(plain, tmp_path):
  stored.quantize(plain, tmp_path / 'out', '--bits=4', '--group=8')
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  found = stored.read(tmp_path / 'out', CONFIG, layout)
  stored.same(found, quantized.of_tree(small.params(CONFIG), 4, 8))
  params = state.abstract_params(CONFIG, layout)
  wanted = variables.abstract(params, {'bits': 4, 'group': 8})
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), wanted, found)
  specs = {
    path[1:3]: leaf.sharding.spec
    for path, leaf in traverse_util.flatten_dict(found['scales']).items()
  }
  P = jax.sharding.PartitionSpec
  # Groups of queries' inputs, the width, are whole; those of `out` and `down` are cut.
  assert specs['attention', 'q'] == P(None, None, 'tensor', None)
  assert specs['attention', 'out'] == P(None, 'tensor', 'fsdp')
  assert specs['mlp', 'up'] == P(None, None, 'tensor')
  assert specs['mlp', 'down'] == P(None, 'tensor', 'fsdp')
  inputs = stored.inputs(CONFIG.vocab_size)
  with sharding.active(layout):
    got = stored.logits(CONFIG, found, inputs)
  one = stored.logits(CONFIG, stored.read(tmp_path / 'out', CONFIG), inputs)
  np.testing.assert_allclose(got, one, atol=2e-6 * np.abs(one).max())


def test_groups_must_divide_over_the_devices_that_their_inputs_are_on():
  layout = sharding.make_mesh(sharding.MeshConfig(tensor=4, data=2))
  params = state.abstract_params(CONFIG, layout)
  with pytest.raises(ValueError, match=r'layers/attention/out .* tensor.* 2 groups over 4'):
    variables.abstract(params, {'bits': 4, 'group': 16})
  variables.abstract(params, {'bits': 4, 'group': 8})


def test_integers_are_small_on_disk_and_computed_once(tmp_path, monkeypatch):
  config = GLMConfig(
    num_layers=2, hidden_size=256, num_heads=4, vocab_size=384, max_positions=8
  )
  source = stored.checkpoint(tmp_path / 'source', config)
  calls, compute = collections.Counter(), quantized.quantize

  def spy(weight, *arguments):
    calls[weight.tobytes()] += 1
    return compute(weight, *arguments)

  monkeypatch.setattr(quantized, 'quantize', spy)
  stored.quantize(source, tmp_path / 'out', '--bits=4')
  assert len(calls) == 2 * 6 and {*calls.values()} == {1}
  for path, leaf in slices.flat(small.params(config)).items():
    if quantized.inputs_of(path):
      folder = tmp_path / 'out' / 'params' / '.'.join(path)
      size = sum(f.stat().st_size for f in folder.iterdir() if f.name[0] != '.')
      assert size <= 0.55 * leaf.size, path


def test_weights_of_chatglm2_6b_take_under_four_gigabytes():
  config = small.CHATGLM2_6B
  found = variables.abstract(state.abstract_params(config), {'bits': 4, 'group': 0})

  def size(leaf):  # what is not quantised is bfloat16, as it is released
    if leaf.dtype == quantized.DTYPES[4]:
      return leaf.size / 2
    return leaf.size * 2

  total = sum(map(size, jax.tree.leaves(found['params'])))
  total += sum(4 * leaf.size for leaf in jax.tree.leaves(found['scales']))
  assert 3.5e9 < total <= 3.95e9


def test_what_a_run_did_not_train_is_quantised_with_what_it_did(plain, tmp_path):
  is_trained = lambda path: 'attention' in path
  base = checkpoints.describe(checkpoints.find(str(plain)))
  run = tmp_path / 'run' / 'checkpoints' / '2'
  stored.checkpoint(run, CONFIG, seed=1, holds=is_trained, base=base, step=2)
  stored.quantize(tmp_path / 'run', tmp_path / 'out', '--bits=8')
  flat, trained = (traverse_util.flatten_dict(small.params(CONFIG, i)) for i in (0, 1))
  flat |= {path: leaf for path, leaf in trained.items() if is_trained(path)}
  expected = quantized.of_tree(traverse_util.unflatten_dict(flat), 8)
  stored.same(stored.read(tmp_path / 'out', CONFIG), expected)
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'out')))
  assert meta['step'] == 2 and 'base' not in meta


def test_an_interrupted_call_goes_on(plain, tmp_path, monkeypatch):
  compute, calls = quantized.quantize, []

  def stops(weight, *arguments):
    calls.append(None)
    if len(calls) == 8:  # in the second layer
      raise KeyboardInterrupt
    return compute(weight, *arguments)

  monkeypatch.setattr(quantized, 'quantize', stops)
  arguments = ('quantize', plain, tmp_path / 'out', '--bits=4')
  assert in_process(*arguments).returncode == 130
  assert not (tmp_path / 'out').exists()
  done = in_process(*arguments)
  assert done.returncode == 0 and 'going on with' in done.stdout
  assert len(calls) == 8 + 6
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  stored.same(
    stored.read(tmp_path / 'out', CONFIG), quantized.of_tree(small.params(CONFIG), 4)
  )


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(plain, tmp_path):
  stored.quantize(plain, tmp_path / 'int4', '--bits=4')
  (tmp_path / 'empty').mkdir()
  for arguments, words in (
    ((tmp_path / 'int4', tmp_path / 'out', '--bits=8'), ('plain weights', 'to 4 bits')),
    ((plain, tmp_path / 'out', '--bits=4', '--group=5'), ('--group=5', '32 inputs')),
    ((plain, tmp_path / 'out', '--bits=4', '--group=64'), ('--group=64', '32 inputs')),
    ((plain, tmp_path / 'out', '--bits=4', '--group=-8'), ('--group=-8',)),
    ((tmp_path / 'empty', tmp_path / 'out', '--bits=8'), ('params and meta',)),
    ((plain, tmp_path / 'empty', '--bits=8'), ('DST must not exist', 'empty')),
    ((plain, 'gs://bucket/out', '--bits=8'), ('DST', 'on this machine')),
  ):
    before = snapshot(tmp_path), {*tmp_path.rglob('*')}
    refused(in_process('quantize', *arguments, cwd=tmp_path), *words)
    assert (snapshot(tmp_path), {*tmp_path.rglob('*')}) == before


def test_a_full_disk_is_noticed_before_anything_is_written(plain, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  done = in_process('quantize', plain, tmp_path / 'out', '--bits=4')
  refused(done, 'GB free', 'nothing was written', code=74)
  assert not [*tmp_path.iterdir()]


def test_training_does_not_begin_with_integers(plain, tmp_path):
  stored.quantize(plain, tmp_path / 'out', '--bits=4')
  folder = checkpoints.find(str(tmp_path / 'out'))
  with pytest.raises(
    ValueError, match=r'plain weights, got .*--to=checkpoint --dequantize'
  ):
    checkpoints.read_params(folder, state.abstract_params(CONFIG))
