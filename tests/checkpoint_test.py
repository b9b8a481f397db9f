"""Checkpoints: which are kept and found, and what a failed save or another model says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from glm_jax import checkpoints, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints
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


def test_checkpoints_keep_the_newest_and_the_best(config, tmp_path):
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  current = state.init_state(config, OPTIMIZER, mesh, 0)
  written = Checkpoints(str(tmp_path), CheckpointConfig(keep=2, keep_best=1))
  for number, value in enumerate([3.0, 1.0, 2.0, 2.5, 4.0], 1):
    written.save({**current, 'step': jnp.int32(number)}, {}, {'loss': value})
  written.close()
  kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert kept == [2, 4, 5]
  (tmp_path / 'checkpoints' / '99').mkdir()  # a stray folder is no checkpoint
  assert checkpoints.latest_step(str(tmp_path)) == 5
  assert checkpoints.find(str(tmp_path)).name == '5'
  with pytest.raises(ValueError, match='must be a folder with params and meta'):
    checkpoints.find(str(tmp_path / 'nowhere'))


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
