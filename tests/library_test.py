"""The library: what it says is what training and generation compute."""

import re
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
import stored
from commands import ROOT, environment, in_process, snapshot

import glm_jax
from glm_jax import attention, models, sharding
from glm_jax.batch import Batch
from glm_jax.configs import UserError
from glm_jax.training import losses, step

TEXTS = ['one two three four five', 'a longer text, with commas and so on', 'short one']
PROMPTS = {'glm': ['one [MASK] two', '[MASK] and so', 'x [MASK]'], 'chatglm2': TEXTS}


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
  """A checkpoint of each family."""
  folder = tmp_path_factory.mktemp('library')
  return {k: stored.checkpoint(folder / k, c) for k, c in stored.FAMILIES.items()}


@pytest.fixture(scope='session')
def loaded(folders):
  return {name: glm_jax.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize('mesh', [False, True])
@pytest.mark.parametrize('family', stored.FAMILIES)
def test_logits_of_rows_are_those_of_the_training_forward_to_the_bit(folders, family, mesh):
  config = stored.FAMILIES[family]
  mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2) if mesh else None
  model = glm_jax.load(folders[family], mesh=mesh)
  rows = model.rows(TEXTS + PROMPTS[family] + TEXTS[:2])
  batch = sharding.place(rows._replace(index=None), model.layout)
  backend, _ = attention.choose(
    config, models.ComputeConfig(), jax.devices()[0], rows.tokens.shape[1]
  )
  apply = models.build(config, models.ComputeConfig(attention=backend)).apply
  with sharding.active(model.layout):
    inputs = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
    expected, _ = jax.jit(apply)({'params': model.params}, *inputs)
  found = model.logits(rows)
  assert found.dtype == np.float32 and found.shape == (8, rows.tokens.shape[1], 384)
  assert found.tobytes() == np.asarray(expected).tobytes()
  # Padded, and a few at a time.
  texts = model.logits(TEXTS + PROMPTS[family] + TEXTS[:2])
  seen = rows.key_end > 0
  np.testing.assert_allclose(texts[seen], found[seen], atol=1e-5)


def test_rows_hold_what_a_model_reads(loaded):
  v = loaded['glm'].vocabulary
  s = v.specials
  # Both the answers and their space, which the mask has swallowed.
  rows = loaded['glm'].rows(['ab [MASK]c'], [['xy']])
  assert rows.tokens[0].tolist() == [s.enc, 97, 98, s.mask, 99, s.eos, s.sop, 32, 120, 121]
  assert rows.targets[0, 6:].tolist() == [32, 120, 121, s.eop]
  assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 3, 3, 3]
  assert rows.block_positions[0].tolist() == [0] * 6 + [1, 2, 3, 4]
  assert rows.key_end[0].tolist() == [6] * 6 + [7, 8, 9, 10]
  # Without answers the first blank is opened; without a blank there is the text alone.
  rows = loaded['glm'].rows(['a[MASK]b[MASK]', 'a'])
  assert rows.tokens[0, -1] == s.sop and rows.tokens.shape == (2, 7)
  assert rows.tokens[1].tolist() == [s.enc, 97, s.eos] + [s.pad] * 4
  rows = loaded['chatglm2'].rows(['ab'], [[' c']])
  assert rows.tokens[0].tolist() == [s.enc, 97, 98, 32, 99]
  assert rows.key_end[0].tolist() == [1, 2, 3, 4, 5]
  assert not rows.block_positions.any()


@pytest.mark.parametrize('family', stored.FAMILIES)
def test_a_candidate_scores_as_it_is_generated(loaded, family):
  model = loaded[family]
  prompt = PROMPTS[family][0]
  for answer in model.generate([prompt], samples=4, temperature=1.0, max_new_tokens=6):
    [span] = answer.spans
    if model.vocabulary.encode(span) != answer.tokens[0].tolist():
      continue  # bytes that are no text
    scores = model.score(prompt, [span, 'another'])
    # Space in front of a filling is its own.
    given = scores.tokens[0][-len(answer.tokens[0]) :]
    if family == 'chatglm2' or span[:1].isspace():
      expected = answer.log_probs[0][: len(given)]
      np.testing.assert_allclose(given, expected, atol=1e-5)
    np.testing.assert_allclose(scores.sums, [t.sum() for t in scores.tokens], rtol=1e-6)


def test_scores_are_probabilities(loaded):
  """Over all single bytes, and the end at once, they sum to one."""
  model = loaded['chatglm2']
  allowed = np.asarray(model.logits(['ab']))[0, -1, : model.vocabulary.size]
  log_probs = jax.nn.log_softmax(allowed)
  scores = model.score('ab', [chr(i) for i in range(128)])
  np.testing.assert_allclose(scores.sums, log_probs[:128], atol=1e-5)
  assert scores.ends.shape == (128,) and (scores.ends < 0).all()


def test_a_causal_loss_is_that_of_training(loaded):
  import tensorflow as tf

  from glm_jax.data.examples import causal

  model, v = loaded['chatglm2'], loaded['chatglm2'].vocabulary
  ids = [[*v.prefix, *v.encode(text), v.specials.eos] for text in TEXTS]
  L = 64
  tokens = np.array([x + [0] * (L + 1 - len(x)) for x in ids], np.int32)
  place = np.arange(L + 1)
  scored = (place >= len(v.prefix)) & (place < [[len(x)] for x in ids])
  starts = np.broadcast_to(place == 0, tokens.shape)
  lengths = tf.constant([len(x) for x in ids])
  made = causal.causal_examples(
    tf.constant(tokens), lengths, tf.constant(scored), tf.constant(starts), v.specials.pad
  )
  batch = Batch(**{name: np.asarray(value) for name, value in made.items()})
  assert model.loss(TEXTS).counts.tolist() == batch.loss_weights.sum(1).tolist()
  _same_loss(model, batch, model.loss(TEXTS))


def _same_loss(model, batch, loss):
  loss_fn = losses.pretraining_loss(models.build(model.config))
  metrics = jax.jit(step.make_eval_step(loss_fn))(model.variables, batch)
  total, count = metrics['loss']
  np.testing.assert_allclose(loss.mean, total / count, rtol=1e-6)


@pytest.mark.parametrize('objective', ['blank', 'document', 'sentence'])
def test_losses_of_objectives_are_those_of_training(loaded, objective):
  from glm_jax.data.examples import texts

  model = loaded['glm']
  long = ['Some words. And others; so it goes. ' + t for t in [*TEXTS, 'a [MASK]']]
  loss = model.loss(long, objective, seed=3)
  ids = [[*model.vocabulary.prefix, *model.vocabulary.encode(t)] for t in long]
  ids = [[*x, model.vocabulary.specials.eos] for x in ids]
  rows = texts.batch(ids, model.vocabulary, objective, 3, block_positions=True)
  _same_loss(model, rows._replace(index=None), loss)
  # A text's masks are its own, whatever stands beside it.
  alone = model.loss(long[0], objective, seed=3)
  np.testing.assert_allclose(alone.sums[0], loss.sums[0], rtol=1e-5)
  assert (loss.counts > 0).all()
  other = model.loss(long, objective, seed=4)
  assert other.sums.tolist() != loss.sums.tolist()


def test_fillings_are_the_most_probable_found(loaded):
  model, prompt = loaded['glm'], 'one [MASK] two [MASK]'
  [greedy] = model.generate(prompt, max_new_tokens=3)
  found = model.fill(prompt, top=4, max_new_tokens=3)
  assert len(found) == 4 and len({tuple(f.spans) for f in found}) == 4
  values = [f.log_prob for f in found]
  assert values == sorted(values, reverse=True) and values[0] >= greedy.log_prob
  assert all(len(f.spans) == 2 and f.text.startswith('one') for f in found)
  assert len(model.fill(prompt, top=4, drawn=1, max_new_tokens=3)) <= 3
  # What a search finds is more probable than what is most probable at each token.
  [searched] = model.generate(prompt, num_beams=4, length_penalty=0.0, max_new_tokens=3)
  assert values[0] >= searched.log_prob
  assert model.fill('x [MASK]', top=4, max_new_tokens=3)[0].text.startswith('x')


@pytest.mark.parametrize('family', stored.FAMILIES)
def test_answers_do_not_depend_on_the_batch_nor_on_the_mesh(folders, loaded, family):
  how = dict(samples=3, temperature=1.0, max_new_tokens=5, seed=2)
  answers = loaded[family].generate(PROMPTS[family], **how)
  assert [(a.number, a.sample) for a in answers] == [
    (n, s) for n in range(3) for s in range(3)
  ]
  assert len({str(a.tokens) for a in answers}) > 6
  mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
  for other in (
    glm_jax.load(folders[family], batch_size=1),
    glm_jax.load(folders[family], mesh=mesh, batch_size=4),
  ):
    again = other.generate(PROMPTS[family], **how)
    assert [a.text for a in again] == [a.text for a in answers]
  rest = loaded[family].answers(PROMPTS[family], skip={(0, 0), (1, 2)}, **how)
  assert sorted(a.text for a in rest) == sorted(
    a.text for a in answers if (a.number, a.sample) not in {(0, 0), (1, 2)}
  )


def test_whoever_takes_answers_is_not_on_their_mesh(folders):
  mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
  model = glm_jax.load(folders['glm'], mesh=mesh, batch_size=4)
  answers = model.answers(PROMPTS['glm'], max_new_tokens=3)
  next(answers)
  assert jax.sharding.get_abstract_mesh().empty
  assert len([*answers]) == 2


@pytest.mark.parametrize('penalty', [1.0, 1.5])
def test_a_stop_string_ends_a_span_there(loaded, penalty):
  """Later blanks see its tokens up to the last of the stop string, and no more."""
  model, prompt = loaded['glm'], 'one [MASK] two [MASK] three'
  how = dict(max_new_tokens=24, min_new_tokens=24, repetition_penalty=penalty)
  [plain] = model.generate(prompt, **how)
  tokens = plain.tokens[0].tolist()
  # Two bytes that it says, not at the end of what is looked at together.
  at = next(i for i in range(3, 12) if max(tokens[i : i + 2]) < 128)
  stop = model.vocabulary.decode(tokens[at : at + 2])
  [answer] = model.generate(prompt, stop_strings=['never said', stop], **how)
  # One text is one stop string, and not its letters.
  [alone] = model.generate(prompt, stop_strings=stop, **how)
  assert alone.text == answer.text
  decoded = model.vocabulary.decode(tokens)
  assert answer.spans[0] == decoded[: decoded.index(stop)]
  count = len(answer.tokens[0])
  assert answer.tokens[0].tolist() == tokens[:count] and count <= at + 2
  np.testing.assert_allclose(answer.log_probs[0], plain.log_probs[0][:count], atol=1e-5)
  if penalty != 1:
    return
  # The second blank, given what remains of the first.
  from glm_jax.inference import forward, prompts, scoring

  c, v = model.config, model.vocabulary
  request = prompts.request(c, v, 0, prompts.encode(c, v, prompt))
  row = scoring.lay_out(c, v, request, [x.tolist() for x in answer.tokens])
  rows = scoring.batch([row], 'blank', v.specials.pad)
  one = forward.Forward(c, model.variables, models.ComputeConfig(), model.layout, 1)
  free = np.isin(np.arange(384), [*range(256), *v.stops])
  # No span may end before its least length.
  free[list(v.stops)] = False
  targets, _ = one.targets(rows, free, v.stops)
  second = len(answer.tokens[1])
  np.testing.assert_allclose(
    answer.log_probs[1][:second], targets[0, -second - 1 : -1], atol=1e-4
  )


def _convert(*arguments):
  done = in_process('convert', *arguments)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('bits', [0, 4])
def test_a_released_folder_is_read_as_it_is(folders, tmp_path, bits):
  source, released = folders['chatglm2'], tmp_path / 'released'
  if bits:
    stored.quantize(source, tmp_path / 'integers', f'--bits={bits}')
    source = tmp_path / 'integers'
  _convert(source, released, '--to=chatglm2')
  _convert(released, tmp_path / 'converted')
  before = snapshot(tmp_path)
  with warnings.catch_warnings():  # of what the files do not say
    warnings.simplefilter('ignore')
    model = glm_jax.load(released)
  assert snapshot(tmp_path) == before
  converted = glm_jax.load(tmp_path / 'converted')
  stored.same(model.variables, converted.variables)
  assert ('scales' in model.variables) == bool(bits)
  assert model.vocabulary.fingerprint == converted.vocabulary.fingerprint
  logits = model.logits(TEXTS)
  assert logits.tobytes() == converted.logits(TEXTS).tobytes()
  # Scales are of half precision there.
  expected = glm_jax.load(source).logits(TEXTS)
  np.testing.assert_allclose(logits, expected, atol=0.1 * bool(bits))


@pytest.mark.parametrize(
  'call,message',
  [
    (lambda m: m.score('a [MASK]', []), 'candidates must be a list'),
    (lambda m: m.score('a [MASK]', 'word'), 'candidates must be a list'),
    (lambda m: m.score('a [MASK]', ['x', '']), 'must hold some text'),
    (lambda m: m.score('a [MASK] [MASK]', ['x']), 'as many answers, got 1'),
    (lambda m: m.score('a', ['x']), 'must hold a blank'),
    (lambda m: m.logits(['a', 'b'], [['x']]), 'as many as texts, got 1 for 2'),
    (lambda m: m.loss(['a', '']), 'must hold some text'),
    (lambda m: m.generate([]), 'texts must be one or more'),
    (lambda m: m.generate('no blank'), 'must hold a blank'),
    (lambda m: m.generate('[MASK]' + 'x' * 90), 'at most 81 tokens'),
    (lambda m: m.generate('[MASK]', samples=0), 'samples must be 1 or more'),
    (lambda m: m.generate('[MASK]', samples=2), 'temperature above 0'),
    (lambda m: m.generate('[MASK]', stop_strings=['']), 'must hold some text'),
    (lambda m: m.generate('[MASK]', stop_strings=''), 'must hold some text'),
    (lambda m: m.generate('[MASK]', num_beams=2, samples=2), 'one answer a prompt'),
    (lambda m: m.generate('[MASK]', max_new_tokens=81), 'must be in 1 .. 80'),
    (lambda m: m.generate('[MASK]', seed=-1), 'must be a number of 32 bits'),
    (lambda m: m.loss('x' * 90), 'at most 81 tokens'),
    (lambda m: m.loss('a text', 'causal'), "must be one of \\('blank'"),
    (lambda m: m.generate('[MASK]', num_beams=2, top_k=3), 'must be without temperature'),
    (lambda m: m.fill('[MASK]', top=0), 'top must be 1 or more'),
  ],
)
def test_what_cannot_be_asked_is_refused(loaded, call, message):
  with pytest.raises(UserError, match=message):
    call(loaded['glm'])


@pytest.mark.parametrize(
  'how', [{'batch_size': 0}, {'dtype': 'int4'}, {'cache_dtype': 'x'}]
)
def test_what_cannot_be_loaded_is_refused(folders, how, tmp_path):
  with pytest.raises(UserError, match=f'{next(iter(how))} must be'):
    glm_jax.load(folders['glm'], **how)
  for path in (tmp_path, tmp_path / 'nowhere', 's3://bucket/run'):
    with pytest.raises(UserError, match='must be (a folder with params|here or in gs)'):
      glm_jax.load(path)


def test_the_package_is_a_table_of_contents():
  assert {'load', 'LanguageModel', 'MeshConfig', 'UserError'} <= {*dir(glm_jax)}
  with pytest.raises(AttributeError, match='nothing'):
    _ = glm_jax.nothing
  for name in ('generate', 'answers', 'fill', 'score', 'loss', 'rows', 'logits'):
    assert re.search(rf'^  .*\b{name}\b', glm_jax.__doc__, re.MULTILINE)
    assert getattr(glm_jax.LanguageModel, name).__doc__


def test_the_example_of_the_readme_needs_no_tensorflow(folders):
  example = """
import glm_jax

model = glm_jax.load(RUN)
for filling in model.fill('Return the [MASK] of a list.', top=3):
  print(f'{filling.log_prob:.2f}', filling.text)
answers = model.generate(['Open a [MASK].', 'Close [MASK].'], temperature=0.8, samples=4)
scores = model.score('Return the [MASK] of a list.', ['length', 'colour'])
print(scores.sums, model.logits(['Return the [MASK] of a list.']).shape)
"""
  code = f"""
import sys, time
import jax, flax, orbax.checkpoint
RUN, began = {str(folders['glm'])!r}, time.perf_counter()
import glm_jax
glm_jax.load(RUN)
# Generous for a busy machine: it takes a second.
assert time.perf_counter() - began < 5
{example}
assert len(answers) == 8
assert not {{'tensorflow', 'seqio'}} & {{*sys.modules}}
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert 'Return the' in done.stdout and done.stdout.endswith('(1, 25, 384)\n')
