"""Checkpoints: which are kept and found, and what a failed save or another model says."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import checkpoints, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints
from glm_jax.configs import UserError
from glm_jax.sharding import MeshConfig
from glm_jax.training import state
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), 100)


@pytest.mark.parametrize(
  ('kind', 'words'),
  [
    (RuntimeError, "No space left on device [os_error_code='28']"),
    # A write larger than a limit is out of range for TensorStore, which tells its spec too.
    (ValueError, "Failed [tensorstore_spec='{}'] [os_error_code='28']"),
  ],
)
def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch, kind, words):
  written = Checkpoints(str(tmp_path), CheckpointConfig())

  def fails():
    raise kind(f'Error writing "step/.zarray": {words}')

  monkeypatch.setattr(written._manager, 'wait_until_finished', fails)
  with pytest.raises(OSError, match=r'failed \(No space left on device\); .* is intact'):
    written.close()


@pytest.mark.parametrize('mode,best', [('min', 2), ('max', 1)])
def test_checkpoints_keep_the_newest_and_the_best(config, tmp_path, mode, best):
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  current = state.init_state(config, OPTIMIZER, mesh, 0)
  kept = CheckpointConfig(keep=2, keep_best=1, best_mode=mode)
  written = Checkpoints(str(tmp_path), kept)
  for number, value in enumerate([3.5, 1.0, 2.0, 2.5, 3.0], 1):
    written.save({**current, 'step': jnp.int32(number)}, {}, {'loss': value})
  written.close()
  kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert kept == [best, 4, 5]
  (tmp_path / 'checkpoints' / '99').mkdir()  # a stray folder is no checkpoint
  assert checkpoints.latest_step(str(tmp_path)) == 5
  assert checkpoints.find(str(tmp_path)).name == '5'
  with pytest.raises(ValueError, match='must be a folder with params and meta'):
    checkpoints.find(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize(
  'name',
  ['config.json', 'model.safetensors.index.json', 'latest_checkpointed_iteration.txt'],
)
def test_a_released_model_is_to_be_converted(tmp_path, name):
  (tmp_path / name).write_text('{}')
  with pytest.raises(UserError, match=f'python -m glm_jax.convert {tmp_path} DST'):
    checkpoints.find(str(tmp_path))


def test_a_released_models_name_is_no_checkpoint_either(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'got THUDM/chatglm3-6b; .*glm_jax\.convert'):
    checkpoints.find('THUDM/chatglm3-6b')


def test_what_a_stream_keeps_is_restored_on_any_mesh(config, tmp_path):
  numbers = np.arange(16.0).reshape(8, 2)

  def stream(layout, values):
    placed = jax.device_put(values, sharding.batch_sharding(layout, 2))
    return types.SimpleNamespace(place=None, kept={'rollout': {'rewards': placed}})

  layouts = [
    sharding.make_mesh(mesh, jax.devices()[:count])
    for mesh, count in ((MeshConfig(data=2, fsdp=2), 4), (MeshConfig(data=8), 8))
  ]
  for layout in layouts:
    abstract = state.abstract_state(config, OPTIMIZER, layout)
    written = Checkpoints(str(tmp_path / 'run'), CheckpointConfig())
    if layout is layouts[0]:
      current = state.init_state(config, OPTIMIZER, layout, 0)
      written.save(current, {}, {}, stream(layout, numbers))
    else:
      again = stream(layout, 0 * numbers)
      written.restore(0, abstract, again)
      rewards = again.kept['rollout']['rewards']
      np.testing.assert_array_equal(rewards, numbers)
      assert rewards.sharding.mesh.size == 8
    written.close()


def test_parameters_of_another_model_are_refused(config, tmp_path):
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  written = Checkpoints(str(tmp_path), CheckpointConfig())
  written.save(state.init_state(config, OPTIMIZER, mesh, 0), {}, {})
  written.close()
  other = dataclasses.replace(config, hidden_size=32)
  with pytest.raises(ValueError, match='must have the shapes of the model'):
    checkpoints.read_params(
      checkpoints.find(str(tmp_path)), state.abstract_params(other, mesh)
    )
