"""What is asked of held-out blanks, and what counts as right."""

import itertools

import jax
import numpy as np
import pytest

from glm_jax import models, sharding
from glm_jax.batch import Batch
from glm_jax.data.baselines import NGrams, ranks_of
from glm_jax.data.examples import texts
from glm_jax.inference import prompts
from glm_jax.inference.forward import Forward
from glm_jax.recipes import guesses
from glm_jax.text import loading
from glm_jax.training import state

_RNG = np.random.default_rng(0)
_TEXTS = [bytes(_RNG.integers(97, 123, 60)).decode() for _ in range(16)]


@pytest.fixture(scope='module')
def vocabulary():
  return loading.load('bytes')


@pytest.fixture(scope='module')
def documents(vocabulary):
  v = vocabulary
  return [[*v.prefix, *v.encode(text), v.specials.eos] for text in _TEXTS]


@pytest.fixture(scope='module')
def rows(documents, vocabulary):
  """A document a row, several blanks each, in random order."""
  return texts.batch(documents, vocabulary, 'blank', 0, block_positions=True)


def _packed(rows):
  """Neighbouring rows as two documents of one."""
  made = {}
  T = rows.tokens.shape[1]
  for name, x in rows._asdict().items():
    if x is None:
      continue
    shifted = x[1::2]
    if name in ('key_start', 'key_end'):
      shifted = np.where(rows.key_end[1::2] > 0, shifted + T, 0)
    # A document may end in padding, which no document sees.
    made[name] = np.concatenate([x[::2], shifted], axis=1)
  return Batch(**made)


def _is_text(vocabulary, ids):
  return [i for i in ids if i not in vars(vocabulary.specials).values()]


@pytest.mark.parametrize('packed', [False, True])
def test_a_blank_hides_what_stood_between_its_neighbours(
  rows, documents, vocabulary, packed
):
  batch = _packed(rows) if packed else rows
  found = guesses.blanks(batch, vocabulary.specials)
  assert (
    len(found) == (rows.tokens == vocabulary.specials.mask).sum() > 2 * len(rows.tokens)
  )
  # Spans are shuffled: else any order of them would do.
  starts = [(b.row, b.start) for b in found]
  assert starts == sorted(starts)
  places = []
  for blank in found:
    whole = documents[blank.row]
    if packed:
      whole = [*documents[2 * blank.row], -2, *documents[2 * blank.row + 1]]
    line, near = [blank.left, *blank.ids, blank.right], len(blank.ids) + 2
    windows = [i for i in range(len(whole)) if whole[i : i + near] == line]
    assert windows, (blank, vocabulary.decode(blank.ids))
    places.append((blank.row, windows[0]))
  assert places != sorted(places)


def test_a_text_that_is_a_blank_at_either_end_has_no_neighbour_there(vocabulary):
  """Two documents of a row, the first of which ends with a mask, the second begins so."""
  s = vocabulary.specials
  #            A: x     mask  | B: sop   a   | A: mask    x  | B: sop   b
  tokens = np.array([[7, s.mask, s.sop, 9, s.mask, 8, s.sop, 6]], np.int32)
  targets = np.array([[0, 0, 9, s.eop, 0, 0, 6, s.eop]], np.int32)
  batch = Batch(
    tokens=tokens,
    targets=targets,
    loss_weights=np.array([[0, 0, 1, 1, 0, 0, 1, 1]], np.float32),
    positions=np.array([[0, 1, 1, 1, 0, 1, 0, 0]], np.int32),
    block_positions=np.array([[0, 0, 1, 2, 0, 0, 1, 2]], np.int32),
    key_start=np.array([[0, 0, 0, 0, 4, 4, 4, 4]], np.int32),
    key_end=np.array([[2, 2, 3, 4, 6, 6, 7, 8]], np.int32),
    objective=np.zeros((1, 8), np.int32),
  )
  assert guesses.blanks(batch, s) == [
    guesses.Blank(row=0, start=2, ids=(9,), left=7, right=-1),
    guesses.Blank(row=0, start=6, ids=(6,), left=s.pad, right=8),
  ]


def test_text_pairs_are_neighbours_in_the_text(rows, documents, vocabulary):
  s = vocabulary.specials
  before, behind = guesses.text_pairs([rows], s)
  of_texts = {pair for ids in documents for pair in itertools.pairwise(ids)}
  assert {*zip(before.tolist(), behind.tolist(), strict=True)} <= of_texts
  # All of Part A but the pairs that a mask is in.
  wanted = 0
  for tokens, ends in zip(rows.tokens, rows.key_end, strict=True):
    part = tokens[: ends[0]].tolist()
    wanted += sum(s.mask not in pair for pair in itertools.pairwise(part))
  assert len(before) == wanted
  packed = guesses.text_pairs([_packed(rows)], s)
  assert sorted(zip(*packed, strict=True)) == sorted(zip(before, behind, strict=True))


def test_what_is_offered_has_as_many_tokens_and_is_different(rows, vocabulary):
  found = guesses.blanks(rows, vocabulary.specials)
  asked = guesses.choices(found, 10)
  assert len(asked) == 10 == len({number for number, _ in asked})
  known = {blank.ids for blank in found}
  for number, offered in asked:
    assert offered[0] == found[number].ids and len({*offered}) == len(offered) == 4
    assert {len(ids) for ids in offered} == {len(offered[0])} and {*offered} <= known
  assert asked == guesses.choices(found, 10) != guesses.choices(found, 10, seed=1)
  # Too few others of that length: the blank is not asked for.
  assert guesses.choices([found[0]] * 9, 10) == []


def test_other_words_in_a_blank_change_nothing_else(rows, vocabulary):
  blank = guesses.blanks(rows, vocabulary.specials)[-1]
  same = guesses.with_words(rows, blank, blank.ids)
  for name, x in rows._asdict().items():
    if x is not None:
      np.testing.assert_array_equal(getattr(same, name), x[blank.row : blank.row + 1])
  other = guesses.with_words(rows, blank, [1] * len(blank.ids))
  end = blank.start + len(blank.ids)
  assert (other.targets[0, blank.start : end] == 1).all()
  assert other.targets[0, end] == vocabulary.specials.eop
  # The input of a position is the target of the one before it.
  assert (other.tokens[0, blank.start + 1 : end + 1] == 1).all()
  assert other.tokens[0, blank.start] == vocabulary.specials.sop
  assert (other.tokens != same.tokens).sum() == len(blank.ids)


class _Oracle:
  """Knows which target stands where in some rows, and finds all else improbable."""

  def __init__(self, rows):
    self._true = {tokens.tobytes() for tokens in rows.targets}

  def compared(self, rows):
    right = np.array([targets.tobytes() in self._true for targets in rows.targets])
    log_probs = np.where(right, -0.5, -9.0)[:, None] + np.zeros(rows.targets.shape)
    return log_probs, np.where(right, 1, 7)[:, None] + np.zeros(rows.targets.shape, int)


def test_a_model_that_knows_the_rows_is_always_right(rows, vocabulary):
  made = guesses.guesses(_Oracle(rows), [rows], [rows], vocabulary)
  of_model = {key: made[key]['model'] for key in ('top 1', 'top 5', 'of 4')}
  # The first token is always its second guess.
  assert of_model == {'top 1': 0.0, 'top 5': 1.0, 'of 4': 1.0}
  assert made['loss'] == pytest.approx({'text': 0.5, '[eop]': 0.5})
  # Pairs that were counted in these very rows tell, and more of them tell more.
  of_4 = made['of 4']
  assert of_4['chance'] == 0.25 < of_4['bigram'] < of_4['both ways'] <= 1
  assert made['blanks'] == (rows.tokens == vocabulary.specials.mask).sum()
  assert len(guesses.table(made)) == 7
  assert guesses.guesses(_Oracle(rows), [], [rows], vocabulary) == {}


def test_a_model_that_finds_everything_alike_is_right_by_chance(rows, vocabulary):
  class Indifferent:
    def compared(self, rows):
      return np.zeros(rows.targets.shape), np.zeros(rows.targets.shape, int)

  made = guesses.guesses(Indifferent(), [rows], [rows], vocabulary)
  assert made['of 4']['model'] == 0.25


def test_pairs_are_a_distribution_whose_ranks_are_counted():
  rng = np.random.default_rng(0)
  V = 12
  tokens, targets = rng.integers(0, 6, (2, 200))
  counted = NGrams(tokens, targets * 2, V)
  every = np.arange(V)
  for token in range(V):
    of_token = counted.bigram(np.full(V, token), every)
    assert of_token.sum() == pytest.approx(1)
    wanted = [(of_token > of_token[target]).sum() for target in every]
    np.testing.assert_array_equal(counted.ranks(np.full(V, token), every), wanted)
    np.testing.assert_array_equal(ranks_of(of_token, every), wanted)
  # A token that was never seen has the unigram alone.
  np.testing.assert_allclose(counted.bigram(np.full(V, 11), every), counted.unigram)


def test_a_forward_compares_each_target_with_all_tokens(rows):
  config = models.GLMConfig(
    num_layers=1,
    hidden_size=16,
    num_heads=2,
    vocab_size=384,
    max_positions=rows.tokens.shape[1],
  )
  params = state.init_params(config, jax.random.key(0))
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  forward = Forward(config, {'params': params}, models.ComputeConfig(), layout, 4)
  log_probs, ranks = forward.compared(rows)
  logits = forward.logits(rows)
  of_target = np.take_along_axis(logits, rows.targets[..., None], -1)
  total = np.log(np.exp(logits).sum(-1))
  np.testing.assert_allclose(log_probs, of_target[..., 0] - total, atol=1e-5)
  np.testing.assert_array_equal(ranks, (logits > of_target).sum(-1))


def test_what_is_barred_stands_in_no_token_that_may_be_generated(vocabulary):
  config = models.GLMConfig(
    num_layers=1, hidden_size=16, num_heads=2, vocab_size=384, max_positions=64
  )
  every = prompts.allowed(config, vocabulary)
  without = prompts.allowed(config, vocabulary, '\n')
  [line_break] = vocabulary.encode('\n')
  assert np.flatnonzero(every != without).tolist() == [line_break]
  assert every[line_break] and without[[*vocabulary.stops]].all()
