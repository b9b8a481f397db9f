"""Generation on chips that are not here: integers stay integers in memory."""

import json
import re

import pytest
import small
import stored
from commands import gin, in_process, refused

from glm_jax import sharding
from glm_jax.planning import decoding, prediction, topologies
from glm_jax.sharding import MeshConfig


@pytest.fixture
def v5e(monkeypatch):
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  return sharding.make_mesh(MeshConfig(), topologies.devices('v5e:1x1'))


@pytest.mark.slow
@pytest.mark.parametrize(('bits', 'weights', 'peak'), [(4, 3.9, 4.5), (8, 6.6, 7.4)])
def test_integers_are_read_as_integers(v5e, bits, weights, peak):
  """ChatGLM2-6B, 8 rows and 1,024 slots on a v5e: no weight is copied as bfloat16."""
  quantized = {'bits': bits, 'group': 0}
  result = decoding.predict(small.CHATGLM2_6B, v5e, rows=8, slots=1024, quantized=quantized)
  gib = {k: v / 2**30 for k, v in result.memory.items()}
  # A loop over tokens.
  assert gib['weights'] < weights and gib['peak'] < peak
  # To unpack four bits costs more than to read them.
  assert result.roofline_seconds < result.predicted_seconds < 10 * result.roofline_seconds
  token, _, _ = decoding.lower(small.CHATGLM2_6B, v5e, 8, 1024, quantized, 'bfloat16')
  compiled = token.compile()
  peak_of_token = compiled.memory_analysis().peak_memory_in_bytes / 2**30
  assert peak_of_token < {4: 4.2, 8: 6.9}[bits]
  # A weight of a layer's MLP has both widths; nothing else has.
  whole = set(re.findall(r'\b(\w+)\[([\d,]*)\]', compiled.as_text()))
  kinds = {dtype for dtype, shape in whole if {'4096', '13696'} <= {*shape.split(',')}}
  assert kinds == {f's{bits}'}


@pytest.mark.slow
def test_what_does_not_fit_is_a_plan_too(v5e):
  """64 rows of 8,192 slots: the compiler refuses, and says how much it would need."""
  result = decoding.predict(small.CHATGLM2_6B, v5e, rows=64, slots=8192)
  gib = {k: v / 2**30 for k, v in result.memory.items()}
  assert gib['peak'] > gib['weights'] + gib['cache'] > gib['limit'] == 15.75
  assert result.predicted_seconds is None and 'predicted' not in result.in_words('v5e')


def test_what_does_not_fit_is_printed_and_refused(tmp_path, monkeypatch):
  refusal = ((20 * 2**30, 16 * 2**30), None)
  monkeypatch.setattr(prediction, 'compile_or_measure', lambda lowered: refusal)
  tiny = ['--gin_file=gin_configs/chatglm2_tiny.gin', '--platform=cpu', '--decode']
  done = in_process('plan', *tiny, f'--json={tmp_path}/plan.json')
  refused(done, 'must fit into 16.00 GiB a device, got 20.00 GiB', '--rows')
  assert 'peak 20.00 of 16.00 GiB' in done.stdout
  plan = json.loads((tmp_path / 'plan.json').read_text())
  assert plan['memory']['peak'] == 20 * 2**30 and plan['predicted_seconds'] is None


def test_a_plan_of_generation_is_printed_and_written(tmp_path):
  tiny = ['--gin_file=gin_configs/chatglm2_tiny.gin', '--platform=cpu', '--decode']
  path = tmp_path / 'plan.json'
  done = in_process('plan', *tiny, '--bits=4', '--group=16', f'--json={path}', '--rows=2')
  assert done.returncode == 0, done.stderr
  assert '2 rows, a cache of 1,024 tokens each' in done.stdout
  memory = json.loads(path.read_text())['memory']
  assert 0 < memory['weights'] < memory['peak'] and memory['cache'] > 0


def test_a_checkpoint_of_integers_is_planned_as_such(tmp_path, monkeypatch):
  # Weights are counted from shapes: nothing needs to be compiled.
  fits = ((2**30, 2**31), None)
  monkeypatch.setattr(prediction, 'compile_or_measure', lambda lowered: fits)
  plain = stored.checkpoint(tmp_path / 'plain', stored.FAMILIES['chatglm2'])
  stored.quantize(plain, tmp_path / 'int4', '--bits=4', '--group=16')

  def planned(checkpoint, *flags):
    places = gin(f"INIT_FROM='{checkpoint}'", "MODEL_DIR='unused'", "CORPUS='unused'")
    of_run = ['--gin_file=gin_configs/runs/continue.gin', '--platform=cpu', '--decode']
    return in_process('plan', *of_run, *places, f'--json={tmp_path}/plan.json', *flags)

  weights = []
  for checkpoint, *flags in (
    (tmp_path / 'int4',),
    (tmp_path / 'int4', '--bits=4', '--group=16'),
    (plain, '--bits=4', '--group=16'),
    (plain,),
  ):
    done = planned(checkpoint, *flags)
    assert done.returncode == 0, done.stderr
    weights.append(json.loads((tmp_path / 'plan.json').read_text())['memory']['weights'])
  assert weights[0] == weights[1] == weights[2] < weights[3]
  done = planned(tmp_path / 'int4', '--bits=8')
  refused(done, 'must be those of a checkpoint that is quantised', "'bits': 4", "'bits': 8")


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--rows=0',), '--rows'),
    (('--cache=-1',), '--cache'),
    (('--bits=4', '--group=7'), 'a group must divide'),
    (('--no-compile',), '--decode must compile'),
    (('--suggest',), '--decode must compile'),
  ],
)
def test_what_cannot_be_planned_is_refused(flags, message, tmp_path):
  tiny = ['--gin_file=gin_configs/chatglm2_tiny.gin', '--platform=cpu', '--decode']
  refused(in_process('plan', *tiny, f'--json={tmp_path}/plan.json', *flags), message)
