"""Every field of a configuration is kept where it can be, and changes what it says."""

import dataclasses
import functools
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from foreign import InMemory

from glm_jax import checkpoints, models, sharding
from glm_jax.batch import Batch, Visibility
from glm_jax.checkpoints import folder
from glm_jax.configs import UserError
from glm_jax.data.examples import infilling
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream import stateless
from glm_jax.interop import files, hub, recognise
from glm_jax.interop.formats import FORMATS, HEADS
from glm_jax.models import (
  ChatGLM2Config,
  ChatGLMConfig,
  ComputeConfig,
  GLMConfig,
  chatglm,
  chatglm2,
)
from glm_jax.models import config as model_config
from glm_jax.sharding import MeshConfig
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import losses, optimizer, start, state
from glm_jax.training.config import CheckpointModel
from glm_jax.training.losses import LossConfig
from glm_jax.training.optimizer import OptimizerConfig

_SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=64, max_positions=31)
BASE = {
  'glm': GLMConfig(**_SIZES),
  'chatglm': ChatGLMConfig(**_SIZES, mlp_size=48, deepnorm_layers=28),
  'glm_130b': ChatGLMConfig(
    **{**_SIZES, 'max_positions': 2048},
    mlp_size=48,
    deepnorm_layers=2,
    gated=True,
    two_positions=False,
    rope_frequency_dtype='float32',
  ),
  'chatglm2': ChatGLM2Config(
    **_SIZES, mlp_size=48, num_kv_heads=2, head_size=12, rotated_size=6, rope_ratio=2.0
  ),
}
BASE['glm4'] = dataclasses.replace(BASE['chatglm2'], sandwich_norms=True)
# Another value of each field.
_OTHER_SIZES = dict(num_layers=3, num_heads=2, vocab_size=72, max_positions=40, mlp_size=40)
_OTHER_SIZES |= dict(init_std=0.05, norm_epsilon=3e-4, rope_theta=5000.0, hidden_size=64)
_OTHER_SIZES |= dict(embedding_dropout=0.3, attention_dropout=0.4, output_dropout=0.2)
_OTHER_SIZES |= dict(rope_phase_dtype='float16')
OTHER = {
  'glm': {**_OTHER_SIZES, 'activation': 'gelu_erf'},
  'chatglm': {
    **_OTHER_SIZES,
    'gated': True,
    'two_positions': False,
    'deepnorm_layers': 5,
    'tied_head': False,
    'rope_frequency_dtype': 'float32',
    'embedding_gradient': 0.5,
  },
  'chatglm2': {
    **_OTHER_SIZES,
    'num_kv_heads': 4,
    'head_size': 16,
    'qkv_bias': False,
    'sandwich_norms': True,
    'tied_head': True,
    'rotated_size': 4,
    'rope_ratio': 6.5,
    'rope_scaling': 'positions',
  },
}
OTHER['glm4'] = {**OTHER['chatglm2'], 'sandwich_norms': False}
OTHER['glm_130b'] = {**OTHER['chatglm'], 'gated': False, 'two_positions': True}
OTHER['glm_130b'] |= {'rope_frequency_dtype': 'float16', 'max_positions': 4096}


def _changes(name):
  """(field, the configuration with another value of it), of every field."""
  base = BASE[name]
  for field in dataclasses.fields(base):
    value = OTHER[name][field.name]
    assert value != getattr(base, field.name), field.name
    changed = {field.name: value}
    if name == 'glm_130b' and field.name == 'num_layers':
      changed['deepnorm_layers'] = value  # the scale of GLM-130B has its depth
    yield field.name, dataclasses.replace(base, **changed)


@pytest.mark.parametrize('name', BASE)
def test_a_checkpoint_keeps_every_field(name):
  for field, config in _changes(name):
    written = json.loads(json.dumps(model_config.to_dict(config)))
    assert model_config.from_dict(written) == config != BASE[name], field
    for missing in ('family', 'num_layers'):
      with pytest.raises((ValueError, TypeError)):
        model_config.from_dict({k: v for k, v in written.items() if k != missing})


def test_a_field_of_a_later_version_is_written_where_it_says_something():
  """A run of before is the same run, and an older version reads its checkpoints."""
  assert 'sandwich_norms' not in model_config.to_dict(BASE['chatglm2'])
  assert model_config.to_dict(BASE['glm4'])['sandwich_norms'] is True


# Exports.


def _export(config, format):
  """config.json of a model and its tensors, of which only the shapes matter."""
  huggingface = FORMATS[format].container == 'huggingface'
  content = {}
  if huggingface:
    content = json.loads(json.dumps(hub.config_json(format, config, {})))
  tensors = {
    entry.name: np.full(entry.shape, number, np.float32)
    for number, entry in enumerate(FORMATS[format].entries(config, 1))
  }
  return content, tensors


def _import(content, tensors, container, **overrides):
  source = files.Source(pathlib.Path('memory'), container, (InMemory(tensors),), content)
  return recognise.recognise(source, overrides).config


def _same_function(config):
  """The configuration with one spelling of the rotary base and its ratio."""
  if isinstance(config, GLMConfig):
    return dataclasses.replace(config, mlp_size=config.inner_size)
  if not isinstance(config, ChatGLM2Config):
    return config
  if config.rope_scaling == 'theta':
    theta = config.rope_theta * config.rope_ratio
    return dataclasses.replace(config, rope_theta=theta, rope_ratio=1.0)
  return config


# What no format says: how a model is trained.
_NEVER = {'init_std', 'embedding_dropout', 'attention_dropout'}
_NEVER |= {'output_dropout', 'embedding_gradient', 'rope_phase_dtype'}
SAYS = {
  # The code that reads a format computes one thing whatever the files say, or asks.
  'glm-10b': ('glm', set()),
  'megatron': ('glm', {'activation', 'num_heads'}),
  'chatglm': ('chatglm', set()),
  'glm-130b': (
    'glm_130b',
    {
      'num_heads',
      'max_positions',
      'norm_epsilon',
      'deepnorm_layers',
      'rope_theta',
      'rope_frequency_dtype',
      # Told from each other: the gated one has one position.
      'gated',
      'two_positions',
    },
  ),
  'chatglm2': ('chatglm2', set()),
  'glm': ('chatglm2', set()),
  'glm4': ('glm4', set()),
}


@pytest.mark.parametrize('format', SAYS)
def test_every_field_that_a_format_can_say_comes_back(format):
  name, unsaid = SAYS[format]
  container = FORMATS[format].container
  assert {*FORMATS} == {*SAYS}
  asked = {} if container == 'huggingface' else {'num_heads': BASE[name].num_heads}
  base = _import(*_export(BASE[name], format), container, **asked)
  assert _same_function(base) == _same_function(BASE[name])
  lost = set()
  for field, config in _changes(name):
    try:
      content, tensors = _export(config, format)
    except ValueError:  # it cannot be said, and that is said
      continue
    if _same_function(_import(content, tensors, container, **asked)) != (
      _same_function(config)
    ):
      lost.add(field)
  assert lost - _NEVER == unsaid
  assert lost & _NEVER == _NEVER & {*OTHER[name]} & {
    f.name for f in dataclasses.fields(base)
  }


@pytest.mark.parametrize('name', ['chatglm', 'chatglm2'])
def test_a_rotary_base_that_a_format_cannot_say_is_refused(name):
  fields = dict(rope_theta=5000.0)
  if name == 'chatglm2':  # its ratio is the base's, unless it divides positions
    fields['rope_scaling'] = 'positions'
  with pytest.raises(ValueError, match='rope_theta=10000, which its code has, got 5000'):
    _export(dataclasses.replace(BASE[name], **fields), name)


# Said by the tensors; or a second time, for older versions of transformers.
_UNREAD = {
  'glm-10b': {'max_sequence_length'},
  'glm': {'architectures', 'partial_rotary_factor', 'rope_theta'},
  'glm4': {'architectures', 'partial_rotary_factor', 'rope_theta'},
}


@pytest.mark.parametrize('scaling', ['theta', 'positions'])
@pytest.mark.parametrize('format', ['glm-10b', 'chatglm', 'chatglm2', 'glm', 'glm4'])
def test_every_field_of_a_config_json_is_read_or_refused(format, scaling):
  """Changed there, it changes the model, or is called a model that is not supported."""
  config = BASE[SAYS[format][0]]
  if isinstance(config, ChatGLM2Config):
    config = dataclasses.replace(config, rope_scaling=scaling)
  content, tensors = _export(config, format)
  before, unread = _import(content, tensors, 'huggingface'), set()
  ours, _ = hub._WRITERS[format](config)
  places = [(name,) for name in ours if not isinstance(ours[name], dict)]
  places += [('rope_parameters', name) for name in ours.get('rope_parameters', ())]
  for place in places:
    changed = json.loads(json.dumps(content))
    node = functools.reduce(dict.__getitem__, place[:-1], changed)
    node[place[-1]] = _another(node[place[-1]])
    # A tied head is not stored.
    head = HEADS[format] if place == ('tie_word_embeddings',) else ''
    stored = {name: tensor for name, tensor in tensors.items() if name != head}
    try:
      if _import(changed, stored, 'huggingface') == before:
        unread.add('.'.join(place))
    except ValueError:
      pass
  assert len(places) > 4
  assert unread == _UNREAD.get(format, set())


def _another(value):
  """Of the same kind."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value * 2 or 1
  return 'another'


# Fields that are read and used.


def _program(config, compute=ComputeConfig()):
  """What initialisation and a training forward compute, as text, tables included."""
  ids = jnp.zeros((1, 8), jnp.int32)
  seen, model = Visibility(ids, ids + 8), models.build(config, compute)
  run = lambda key: model.init_with_output(
    {'params': key, 'dropout': key}, ids, ids, ids, seen, deterministic=False
  )
  made = jax.make_jaxpr(run)(jax.random.key(0))
  return str(made) + str([np.asarray(table).tolist() for table in made.consts])


# Without them there are other arrays.
_ARE_SIZES = {'num_layers', 'hidden_size', 'num_heads', 'num_kv_heads', 'head_size'}
_ARE_SIZES |= {'mlp_size', 'vocab_size'}


@pytest.mark.parametrize('name', ['glm', 'chatglm', 'chatglm2'])
def test_every_field_of_a_model_changes_its_program(name):
  base = BASE[name]
  program, same = _program(base), set()
  for field in dataclasses.fields(base):
    if field.name in _ARE_SIZES:
      continue
    changed = dataclasses.replace(base, **{field.name: OTHER[name][field.name]})
    if _program(changed) == program:
      same.add(field.name)
  # Rotary positions have no table; the longest row is checked when a run begins.
  assert same == (set() if name == 'glm' else {'max_positions'})


@pytest.mark.parametrize('name', BASE)
def test_every_field_of_compute_changes_the_program_and_no_parameter(name):
  base = BASE[name]
  program = _program(base)
  others = dict(dtype='bfloat16', remat='full', attention='chunked', unroll=2)
  assert {*others} == {field.name for field in dataclasses.fields(ComputeConfig)}
  for field, value in others.items():
    assert _program(base, ComputeConfig(**{field: value})) != program, field


@pytest.mark.parametrize('name', BASE)
def test_every_norm_and_every_dropout_has_the_models_number(name):
  """Once for each norm of a block, which is scanned, and for the last one."""
  config = BASE[name]
  known = {field.name for field in dataclasses.fields(config)}
  for field, value, operation, shown, times in (
    ('norm_epsilon', 0.0048828125, 'add', 0.0048828125, 5 if name == 'glm4' else 3),
    ('embedding_dropout', 0.34375, 'div', 0.65625, 1),
    ('attention_dropout', 0.28125, 'div', 0.71875, 1),
    ('output_dropout', 0.15625, 'div', 0.84375, 2),
  ):
    if field in known:
      program = _program(dataclasses.replace(config, **{field: value}))
      found = re.findall(rf'= {operation} \w+ {shown}:f32', program)
      assert len(found) == times, field


@pytest.mark.parametrize('dtype,rtol', [('float32', 1e-5), ('float16', 0.02)])
@pytest.mark.parametrize('scaling', ['theta', 'positions'])
def test_angles_are_of_the_base_the_ratio_and_the_share_that_is_rotated(
  scaling, dtype, rtol
):
  """Of the first pairs, before float16 rounds their frequencies to nothing."""
  positions, pairs = np.array([[0, 1, 5]]), np.arange(3)
  for size, theta, ratio in (
    (6, 400.0, 3.0),
    (12, 400.0, 3.0),
    (6, 900.0, 3.0),
    (6, 400.0, 1.5),
  ):
    config = dataclasses.replace(
      BASE['chatglm2'],
      rotated_size=size,
      rope_theta=theta,
      rope_ratio=ratio,
      rope_scaling=scaling,
      rope_phase_dtype=dtype,
    )
    cos, sin = chatglm2.rotary_phases(config, jnp.asarray(positions))
    assert cos.shape == (1, 3, size // 2)
    base = theta * ratio if scaling == 'theta' else theta
    angle = positions[..., None] / (1 if scaling == 'theta' else ratio)
    angle = angle * base ** (-2 * pairs / size)
    np.testing.assert_allclose(cos[..., :3], np.cos(angle), atol=rtol)
    np.testing.assert_allclose(sin[..., :3], np.sin(angle), atol=rtol)


@pytest.mark.parametrize('name', ['chatglm', 'glm_130b'])
def test_angles_of_two_positions_are_each_of_half_a_head(name):
  first, second = jnp.array([[0, 1, 5]]), jnp.array([[4, 2, 3]])
  config = dataclasses.replace(BASE[name], rope_theta=400.0)
  found = chatglm.rotary_phases(config, first, second)
  kinds = (first, second) if config.two_positions else (first,)
  size = config.head_size // len(kinds)
  for (cos, sin), positions in zip(found, kinds, strict=True):
    angle = np.asarray(positions)[..., None] * 400.0 ** (-np.arange(0, size, 2) / size)
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-3)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-3)


# Other configurations.


def test_every_field_of_an_optimizer_changes_a_run():
  """Its rates, its updates or its state; each schedule has fields of its own."""
  params = {'weight': jnp.full((3, 4), 2.0), 'bias': jnp.ones(4)}
  gradients = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), params)

  @functools.cache
  def outcome(config):
    """Parameters after each step, so that a change of a rate at the end is seen, too."""
    made = optimizer.make_optimizer(config, 5)
    current, now, history = made.init(params), params, []
    for number in range(5):
      scaled = jax.tree.map(lambda g: g * (1 + number), gradients)
      updates, current = made.update(scaled, current, now)
      now = optax.apply_updates(now, updates)
      history.append(jax.tree.map(lambda x: np.asarray(x).tolist(), now))
    return str(history) + str(jax.tree.map(lambda leaf: leaf.dtype, current))

  base = OptimizerConfig(
    learning_rate=0.1,
    schedule='wsd',
    wsd_decay_share=0.6,
    warmup_steps=1,
    epsilon=0.5,
    clip_norm=20.0,
  )
  others = dict(
    algorithm='adafactor',
    learning_rate=0.2,
    schedule='cosine',
    warmup_steps=2,
    decay_steps=4,
    final_ratio=0.5,
    wsd_decay_share=0.8,
    beta1=0.5,
    beta2=0.5,
    epsilon=0.1,
    first_moment_dtype='bfloat16',
    second_moment_dtype='bfloat16',
    weight_decay=0.5,
    clip_norm=1.0,
  )
  assert {*others} == {field.name for field in dataclasses.fields(OptimizerConfig)}
  for field, value in others.items():
    assert outcome(dataclasses.replace(base, **{field: value})) != outcome(base), field


def test_every_field_of_the_loss_changes_it():
  config = BASE['glm']
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  rows = Batch(*[ids] * 8)._replace(loss_weights=jax.ShapeDtypeStruct((1, 8), jnp.float32))
  params = state.abstract_params(config)

  def text(loss_config):
    made = losses.pretraining_loss(models.build(config), loss_config)
    key = jax.random.key(0)  # of a training step
    return str(jax.make_jaxpr(lambda p, b: made({'params': p}, b, key))(params, rows))

  others = dict(vocab_chunks=2, z_loss=0.1, label_smoothing=0.1)
  assert {*others} == {field.name for field in dataclasses.fields(LossConfig)}
  found = {text(LossConfig(**{field: value})) for field, value in others.items()}
  assert len({*found, text(LossConfig())}) == 4


VOCABULARY = ByteVocabulary()


def test_every_field_of_the_objectives_changes_the_examples():
  n, N = 24, 90
  s = VOCABULARY.specials
  tokens = np.random.default_rng(0).integers(97, 123, (n, N)).astype(np.int32)
  tokens[:, 9::10], tokens[:, 0], tokens[:, -1] = ord('.'), s.enc, s.eos
  source = infilling.TextRows(
    tf.constant(tokens),
    tf.fill([n], N),
    tf.ones([n, N], tf.bool),
    stateless.example_keys(0, tf.range(n, dtype=tf.int64)),
    tf.range(n, dtype=tf.int64),
  )

  @functools.cache
  def examples(config):
    made = infilling.make_examples(source, N + 60, config, VOCABULARY)
    return {name: value.numpy().tobytes() for name, value in made.items()}

  base = ObjectiveConfig(blank=1, document=1, sentence=1)
  others = dict(
    blank=3.0,
    document=3.0,
    sentence=3.0,
    schedule=((0, 12, 1.0, 0.0, 0.0), (12, -1, 1.0, 1.0, 1.0)),
    loss_weights=(1.0, 2.0, 1.0),
    loss_mean='example',
    span_mean=6.0,
    mask_ratio=0.3,
    shuffle_spans=False,
    single_span_probability=0.9,
    document_min_ratio=0.1,
    document_infill_probability=0.0,
    dblock_probability=0.5,
    short_probability=0.5,
    task_masks=False,
    original_positions=True,
    block_positions=False,
    one_dimensional=True,
  )
  assert {*others} == {field.name for field in dataclasses.fields(ObjectiveConfig)}
  for field, value in others.items():
    changed = dataclasses.replace(base, **{field: value})
    assert examples(changed) != examples(base), field
    # Another objective, or another run.
    fields = dict(batch_size=1, seed=0, recipe='Pretraining')
    one, other = (
      folder.identity({}, '', data=dataclasses.asdict(o), **fields) for o in (base, changed)
    )
    assert one != other, field
    # Validation weighs all tokens alike, and is otherwise the same.
    weighed = field in ('loss_weights', 'loss_mean')
    assert (changed.for_evaluation() == base.for_evaluation()) == weighed, field


def test_every_field_of_a_mesh_changes_where_arrays_are():
  others = dict(
    data=4, fsdp=2, sequence=2, tensor=2, rules='replicated', overrides={'vocab': None}
  )
  assert {*others} == {field.name for field in dataclasses.fields(MeshConfig)}
  base = sharding.make_mesh(MeshConfig())
  for field, value in others.items():
    changed = {field: value}
    if field == 'data':
      changed['fsdp'] = -1
    layout = sharding.make_mesh(MeshConfig(**changed))
    assert (layout.shape, layout.rules) != (base.shape, base.rules), field


def test_whatever_makes_a_run_another_is_in_its_identity():
  fields = dict(
    model={'num_layers': 2, 'dtype': 'float32'},
    vocabulary='a',
    batch_size=8,
    seed=0,
    recipe='Pretraining',
    data={'data': 'b'},
  )
  others = dict(
    model={'num_layers': 3},
    vocabulary='c',
    batch_size=16,
    seed=1,
    recipe='Another',
    data={'data': 'd'},
  )
  assert {*fields} == {*inspect.signature(folder.identity).parameters}
  base = folder.identity(**fields)
  for name, value in others.items():
    assert folder.identity(**{**fields, name: value}) != base, name
  of = lambda config: folder.identity(**{**fields, 'model': model_config.to_dict(config)})
  for name, base_config in BASE.items():
    for field, config in _changes(name):
      assert of(config) != of(base_config), field


@pytest.mark.parametrize('name', BASE)
def test_a_model_of_a_checkpoint_is_that_and_computed_as_the_run_says(name, monkeypatch):
  """Older checkpoints also say how they were computed, which nobody is asked for today."""
  stored = BASE[name]
  monkeypatch.setattr(checkpoints, 'find', lambda path: path)
  for once in ({}, dict(dtype='bfloat16', remat='full', attention='dense', unroll=0)):
    meta = {'model': {**model_config.to_dict(stored), **once}, 'source': {'a': 1}}
    monkeypatch.setattr(checkpoints, 'read_meta', lambda folder, meta=meta: meta)
    run = _Run(CheckpointModel(path='x'), _Recipe(), ComputeConfig(dtype='bfloat16'))
    resolved, vocabulary, source = start.resolve(run)
    assert resolved == dataclasses.replace(run, model=stored)
    assert vocabulary is None and source == {'a': 1}
  with pytest.raises(UserError, match='unheard'):
    model_config.from_dict({**model_config.to_dict(stored), 'unheard': 1})


@dataclasses.dataclass(frozen=True)
class _Recipe:
  has_vocabulary: bool = True


@dataclasses.dataclass(frozen=True)
class _Run:
  model: CheckpointModel
  recipe: _Recipe
  compute: ComputeConfig


# Fields that do not change what parameters mean.
_MAY_DIFFER = {*_NEVER, 'max_positions'} - {'rope_phase_dtype'}


@pytest.mark.parametrize('name', BASE)
def test_parameters_of_another_function_are_refused(name, monkeypatch):
  """`init_from` compares every field that says what the parameters compute."""
  base, stored = BASE[name], jnp.zeros(2)
  monkeypatch.setattr(checkpoints, 'find', lambda path: path)
  for field, config in _changes(name):
    meta = {'model': model_config.to_dict(config), 'vocabulary': None}
    monkeypatch.setattr(checkpoints, 'read_meta', lambda folder, meta=meta: meta)
    monkeypatch.setattr(checkpoints, 'read_params', lambda *_: {'w': stored})
    monkeypatch.setattr(state, 'abstract_params', lambda config: {'w': stored})
    if field in _MAY_DIFFER and field != 'max_positions':
      assert start.params_from('x', base, '', {'w': stored})['w'] is stored
    else:
      with pytest.raises(ValueError, match=f'{field}|more positions'):
        start.params_from('x', base, '', {'w': stored})
