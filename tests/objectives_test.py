"""The objectives: laws of the original, exact reconstruction, determinism."""

import functools
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from glm_jax.batch import MIXED
from glm_jax.data.examples import infilling
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import ByteVocabulary

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden/objectives.json').read_text())
VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials
MASKS = (S.mask, S.gmask, S.smask)
SAMPLES = 2048


def _documents(count, lengths, seed=0, sentence=20):
  """[ENC] letters <eos>, a full stop every `sentence` tokens or so."""
  rng = np.random.default_rng(seed)
  lengths = np.broadcast_to(lengths, count).astype(np.int32)
  N = int(lengths.max())
  tokens = rng.integers(97, 123, (count, N))
  tokens = np.where(rng.random((count, N)) < 1 / sentence, ord('.'), tokens)
  tokens[:, 0] = S.enc
  tokens[np.arange(count), lengths - 1] = S.eos
  inside = np.arange(N) < lengths[:, None]
  return np.where(inside, tokens, S.pad).astype(np.int32), lengths


@functools.cache
def _op(length, config):
  def make(tokens, lengths, scored, index, seed):
    keys = stateless.example_keys(seed, index)
    source = infilling.TextRows(tokens, lengths, scored, keys, tf.zeros_like(index))
    return infilling.make_examples(source, length, config, VOCABULARY)

  return tf.function(make, autograph=False, reduce_retracing=False)


def _make(tokens, lengths, length, config, seed=1, first=0, scored=None):
  scored = np.ones(tokens.shape, bool) if scored is None else scored
  index = tf.range(first, first + len(tokens), dtype=tf.int64)
  example = _op(length, config)(
    tf.constant(tokens), tf.constant(lengths), scored, index, tf.constant(seed, tf.int64)
  )
  return {k: v.numpy() for k, v in example.items()}


def _spans(example):
  """Of each row, [(position, tokens, whether closed by [eop])] in Part B's order.

  Checks the layout of all rows.
  """
  names = ('tokens', 'targets', 'block_positions', 'positions', 'key_end')
  tokens, targets, block, position, end = (example[name] for name in names)
  t = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  length, part_a = (end > 0).sum(1, keepdims=True), end[:, :1]
  in_a, in_b = t < part_a, (part_a <= t) & (t < length)
  # Part A sees all of Part A, Part B is causal, and nothing else sees or is seen.
  wanted = np.where(in_a, part_a, np.where(in_b, t + 1, 0))
  np.testing.assert_array_equal(end, wanted)
  assert (example['key_start'] == 0).all()
  assert (example['loss_weights'][~in_b] == 0).all()
  assert (tokens[t >= length] == S.pad).all()
  assert (block[in_a] == 0).all()
  starts = in_b & (block == 1)
  assert (tokens[starts] == S.sop).all()
  row, at = np.nonzero(in_b & ~starts)  # each goes on with what is before it
  assert (at > part_a[row, 0]).all()
  np.testing.assert_array_equal(block[row, at], block[row, at - 1] + 1)
  np.testing.assert_array_equal(position[row, at], position[row, at - 1])
  # Inputs are the targets one step later: nothing is shifted anywhere else.
  given = tokens[row, at]
  assert ((given == S.dblock) | (given == targets[row, at - 1])).all()
  found = [[] for _ in tokens]
  rows, firsts = np.nonzero(starts)
  lasts = np.where(
    np.append(rows[1:] == rows[:-1], False), np.append(firsts[1:], 0), length[rows, 0]
  )
  for row, a, z in zip(rows.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
    closed = bool(targets[row, z - 1] == S.eop)
    text = targets[row, a : z - closed].tolist()
    found[row].append((int(position[row, a]), text, closed))
  return found


def _rebuild(example):
  """The text of each row, from Part A and the spans put back at their positions."""
  part_a = example['key_end'][:, 0].tolist()
  for row, spans in enumerate(_spans(example)):
    by_position = {position: tokens for position, tokens, _ in spans}
    assert len(by_position) == len(spans)
    places = example['positions'][row][: part_a[row]]
    np.testing.assert_array_equal(places, np.arange(part_a[row]))
    out = []
    for place, token in enumerate(example['tokens'][row][: part_a[row]].tolist()):
      out += by_position.pop(place) if token in MASKS else [token]
    assert not by_position
    yield out


@pytest.mark.parametrize(
  'config',
  [
    ObjectiveConfig(),
    ObjectiveConfig(mask_ratio=0.5, span_mean=2.0),
    ObjectiveConfig(single_span_probability=1.0),
    ObjectiveConfig(shuffle_spans=False),
    ObjectiveConfig(dblock_probability=0.3),
    ObjectiveConfig(blank=0, document=1),
    ObjectiveConfig(blank=0, document=1, document_infill_probability=1.0),
    ObjectiveConfig(blank=0, sentence=1),
    ObjectiveConfig(blank=1, document=1, sentence=1),
  ],
)
def test_text_is_rebuilt_from_part_a_and_spans(config):
  """Documents of 2 to 2,048 tokens of text."""
  rng = np.random.default_rng(1)
  lengths = np.concatenate([np.arange(4, 44), rng.integers(4, 2051, 60), [2050]])
  tokens, lengths = _documents(len(lengths), lengths)
  example = _make(tokens, lengths, 2050 + 2 * 600, config)
  for row, (text, length) in enumerate(zip(_rebuild(example), lengths, strict=True)):
    assert text == tokens[row, :length].tolist()
  assert (example['loss_weights'].sum(1) > 0).all()
  assert not example['lost'].any()
  if config.mask_ratio == 0.15:  # half of a tiny document may not hold the spans drawn
    assert not example['capped'].any()


@pytest.mark.parametrize('objective', MIXED)
def test_rows_of_several_documents_keep_spans_inside_one(objective):
  rng = np.random.default_rng(2)
  tokens = rng.integers(97, 123, (300, 256)).astype(np.int32)
  tokens[rng.random(tokens.shape) < 0.04] = ord('.')
  tokens[:, 0] = S.enc
  for row in tokens:
    at = 0
    while (at := at + int(rng.integers(4, 60))) < 255:
      row[at - 1 : at + 1] = S.eos, S.enc
  tokens[:, -1] = S.eos
  example = _make(
    tokens, np.full(300, 256, np.int32), 400, ObjectiveConfig().only(objective)
  )
  assert [*_rebuild(example)] == tokens.tolist()
  for spans in _spans(example):
    for _, span, _ in spans:
      if objective != 'document':
        assert S.enc not in span and S.eos not in span
  if objective == 'blank':
    hidden = (example['block_positions'] > 1).sum(1)
    assert (hidden >= int(0.15 * 256)).all()  # short documents cost no masks


def _statistics(example):
  spans = _spans(example)
  lengths = [len(tokens) for row in spans for _, tokens, _ in row]
  hidden = np.array([sum(len(tokens) for _, tokens, _ in row) for row in spans])
  return spans, np.array(lengths), hidden


def _same_mean(values, golden, count):
  """Within 3 standard errors of the two samples."""
  error = np.sqrt(np.var(values) / len(values) + golden['std'] ** 2 / count)
  assert abs(np.mean(values) - golden['mean']) <= 3 * error + 1e-9, (
    np.mean(values),
    golden['mean'],
    error,
  )


def _same_histogram(lengths, golden, count):
  """Chi-squared against the golden's counts, rare lengths together."""
  shares = {int(k): v for k, v in golden.items()}
  top = max(k for k, v in shares.items() if v * count >= 10)
  ours = np.bincount(np.minimum(lengths, top), minlength=top + 1)[1:]
  theirs = (
    np.array(
      [shares[k] for k in range(1, top)] + [sum(v for k, v in shares.items() if k >= top)]
    )
    * count
  )
  assert stats.chi2_contingency([ours, theirs]).pvalue > 1e-3


@pytest.mark.parametrize(
  'name,tokens,config',
  [
    ('bert_512', 512, ObjectiveConfig()),
    ('bert_60', 60, ObjectiveConfig()),
    ('bert_ratio_30_lam6', 512, ObjectiveConfig(mask_ratio=0.3, span_mean=6.0)),
    ('bert_single_span', 512, ObjectiveConfig(single_span_probability=1.0)),
    ('bert_dblock', 512, ObjectiveConfig(dblock_probability=0.1)),
  ],
)
def test_blank_statistics_equal_the_original(name, tokens, config):
  golden = GOLDEN[name]
  rows, lengths = _documents(SAMPLES, tokens)
  example = _make(rows, lengths, tokens + 2 * 40, config)
  spans, sizes, hidden = _statistics(example)
  counts = np.array([len(row) for row in spans])
  seen = golden['samples_seen']
  _same_mean(hidden / tokens, golden['masked_ratio']['bert'], seen)
  _same_mean(counts, golden['spans_per_sample']['bert'], seen)
  total = round(golden['spans_per_sample']['bert']['mean'] * seen)
  _same_histogram(sizes, golden['span_length_hist']['bert'], total)
  inputs = example['block_positions'] > 1
  noise = (example['tokens'] == S.dblock)[inputs]
  error = 3 * np.sqrt(0.1 * 0.9 / noise.size)
  assert abs(noise.mean() - config.dblock_probability) <= error
  assert (example['tokens'][~inputs] != S.dblock).all()


@pytest.mark.parametrize(
  'name,config',
  [
    ('gpt_default', ObjectiveConfig(blank=0, document=1)),
    ('gpt_quarter', ObjectiveConfig(blank=0, document=1, document_min_ratio=0.25)),
  ],
)
def test_document_statistics_equal_the_original(name, config):
  golden = GOLDEN[name]
  rows, lengths = _documents(SAMPLES, 512)
  example = _make(rows, lengths, 514, config)
  spans, _, hidden = _statistics(example)
  # The original draws one length for a batch of 4, so its mean is that of fewer draws.
  _same_mean(hidden / 512, golden['masked_ratio']['gpt'], golden['samples_seen'] / 4)
  assert hidden.min() >= int(config.document_min_ratio * 512) and hidden.max() <= 510
  assert (
    stats.kstest(
      hidden, stats.randint(int(config.document_min_ratio * 512), 511).cdf
    ).pvalue
    > 1e-3
  )
  closed = np.array([row[0][2] for row in spans])
  split = golden['gpt_split']
  table = [[closed.sum(), (~closed).sum()], [split['infill'], split['tail']]]
  assert stats.chi2_contingency(table).pvalue > 1e-3
  for row in np.flatnonzero(~closed)[
    :50
  ]:  # to the end of the row: <eos> is the last target
    assert spans[row][0][1][-1] == S.eos
  assert (example['tokens'] == S.gmask).sum(1).tolist() == [1] * SAMPLES


def test_sentences_are_whole_and_reach_the_budget():
  rows, lengths = _documents(SAMPLES, 512)
  example = _make(rows, lengths, 640, ObjectiveConfig(blank=0, sentence=1))
  spans, _, hidden = _statistics(example)
  for row in range(200):
    text = rows[row].tolist()
    for _, tokens, closed in spans[row]:
      assert closed and (tokens[-1] == ord('.') or text[-1 - len(tokens) : -1] == tokens)
      assert ord('.') not in tokens[:-1]
  has_sentences = (rows == ord('.')).sum(1) > 3
  assert (hidden[has_sentences] >= int(0.15 * 512)).all()
  # One sentence less would not have reached it: what is over is less than the last.
  golden = GOLDEN['sentence']['masked_ratio']['sentence']
  assert abs(hidden.mean() / 512 - golden['mean']) < 0.02
  assert (example['tokens'] == S.smask).sum() == sum(map(len, spans))


def test_span_order_is_uniform_and_fixed_without_shuffling():
  rows, lengths = _documents(SAMPLES, 60)
  counts = {}
  spans, _, _ = _statistics(_make(rows, lengths, 120, ObjectiveConfig()))
  for row in spans:
    if len(row) == 3:
      order = tuple(np.argsort([position for position, _, _ in row]).tolist())
      counts[order] = counts.get(order, 0) + 1
  assert len(counts) == 6
  assert stats.chisquare(list(counts.values())).pvalue > 1e-3
  spans, _, _ = _statistics(_make(rows, lengths, 120, ObjectiveConfig(shuffle_spans=False)))
  assert all(row == sorted(row, key=lambda span: span[0]) for row in spans)


def test_every_token_is_hidden_equally_often():
  rows, lengths = _documents(SAMPLES, 130)
  example = _make(rows, lengths, 260, ObjectiveConfig())
  hits = np.zeros(130)
  for row, spans in enumerate(_spans(example)):
    at = {p: tokens for p, tokens, _ in spans}
    place = 0
    for t, token in enumerate(
      example['tokens'][row][: example['key_end'][row][0]].tolist()
    ):
      size = len(at[t]) if token in MASKS else 1
      hits[place : place + size] += token in MASKS
      place += size
  rate = hits / SAMPLES
  assert rate[0] == rate[-1] == 0  # [ENC] and <eos>
  assert np.ptp([rate[1:44].mean(), rate[44:87].mean(), rate[87:-1].mean()]) < 0.02


def test_spans_never_touch():
  rows, lengths = _documents(512, 200)
  example = _make(rows, lengths, 400, ObjectiveConfig(mask_ratio=0.4))
  for row in range(512):
    places = np.flatnonzero(np.isin(example['tokens'][row], MASKS))
    assert (np.diff(places) >= 2).all()


def test_the_mixture_draws_each_objective_with_its_weight():
  rows, lengths = _documents(SAMPLES, 64)
  example = _make(rows, lengths, 100, ObjectiveConfig(blank=5, document=2, sentence=3))
  counts = np.bincount(example['objective'][:, 0], minlength=3)
  assert stats.chisquare(counts, SAMPLES * np.array([0.5, 0.2, 0.3])).pvalue > 1e-3
  for row in range(SAMPLES):
    kind = example['objective'][row, 0]
    mask = (S.mask, S.gmask, S.smask)[kind]
    assert mask in example['tokens'][row]
    assert not np.isin(example['tokens'][row], [m for m in MASKS if m != mask]).any()


def test_a_row_of_the_mixture_is_what_its_objective_alone_makes_of_it():
  rows, lengths = _documents(40, np.random.default_rng(0).integers(30, 65, 40))
  config = ObjectiveConfig(blank=1, document=1, sentence=1)
  mixed = _make(rows, lengths, 100, config)
  for kind, name in enumerate(MIXED):
    own = mixed['objective'][:, 0] == kind
    alone = _make(rows, lengths, 100, config.only(name))
    assert own.any()
    for field in mixed:
      np.testing.assert_array_equal(mixed[field][own], alone[field][own], err_msg=field)


def test_without_task_masks_every_objective_uses_mask():
  rows, lengths = _documents(64, 64)
  config = ObjectiveConfig(blank=1, document=1, sentence=1, task_masks=False)
  tokens = _make(rows, lengths, 100, config)['tokens']
  assert (tokens == S.mask).any(1).all() and not np.isin(tokens, [S.gmask, S.smask]).any()


def test_original_positions_count_the_uncorrupted_text():
  rows, lengths = _documents(64, 64)
  example = _make(rows, lengths, 100, ObjectiveConfig(original_positions=True))
  corrupted = _make(rows, lengths, 100, ObjectiveConfig())
  for row in range(64):
    end = int((example['key_end'][row] > 0).sum())
    for t in range(end):
      place, token = example['positions'][row][t], example['tokens'][row][t]
      if example['block_positions'][row][t] == 0 and token not in MASKS:
        assert rows[row][place] == token
      elif example['block_positions'][row][t] == 1:  # [sop] stands where its span began
        assert rows[row][place] == example['targets'][row][t]
  np.testing.assert_array_equal(example['tokens'], corrupted['tokens'])


def test_without_block_positions_a_continuation_goes_on_counting():
  """GLM-130B: 130B/generate.py has plain positions after [gMASK], the mask's elsewhere."""
  tokens, lengths = _documents(256, 60)
  kinds = dict(blank=0.4, document=0.3, sentence=0.3)
  plain = _make(tokens, lengths, 96, ObjectiveConfig(**kinds))
  made = _make(tokens, lengths, 96, ObjectiveConfig(**kinds, block_positions=False))
  in_b = made['block_positions'] > 0
  goes_on = in_b & (made['objective'] == MIXED.index('document'))
  place = np.broadcast_to(np.arange(96), in_b.shape)
  np.testing.assert_array_equal(made['positions'][goes_on], place[goes_on])
  assert (plain['positions'][goes_on] < place[goes_on]).all() and goes_on.any()
  np.testing.assert_array_equal(made['positions'][~goes_on], plain['positions'][~goes_on])
  for name in ('tokens', 'targets', 'key_end'):
    np.testing.assert_array_equal(made[name], plain[name])


def test_prompts_carry_no_loss():
  rows, lengths = _documents(256, 100)
  scored = np.arange(100) >= 60
  scored = np.broadcast_to(scored, rows.shape).copy()
  config = ObjectiveConfig(blank=1, document=1, sentence=1)
  example = _make(rows, lengths, 200, config, scored=scored)
  everything = _make(rows, lengths, 200, config)
  for row, spans in enumerate(_spans(example)):
    at, place = {p: len(t) for p, t, _ in spans}, 0
    starts = {}
    for t, token in enumerate(
      example['tokens'][row][: example['key_end'][row][0]].tolist()
    ):
      starts[t] = place
      place += at[t] if token in MASKS else 1
    for t in np.flatnonzero(everything['loss_weights'][row]):
      start = starts[int(example['positions'][row][t])]
      offset = int(example['block_positions'][row][t]) - 1
      closes = example['targets'][row][t] == S.eop
      wanted = float(start + offset - closes >= 60)
      assert example['loss_weights'][row][t] == wanted


def test_short_rows_are_windows_of_the_row_and_say_what_they_leave():
  rows, lengths = _documents(400, 200)
  example = _make(rows, lengths, 300, ObjectiveConfig(short_probability=0.5))
  short = example['lost'] > 0
  assert 0.4 < short.mean() < 0.6
  texts = [*_rebuild(example)]
  for row in np.flatnonzero(short)[:100]:
    text = texts[row]
    assert len(text) == 200 - example['lost'][row] >= 32 and text[0] == S.enc
    whole = rows[row].tolist()
    assert any(whole[i : i + len(text) - 1] == text[1:] for i in range(200))


def test_a_row_is_cut_short_at_its_last_span_never_trimmed():
  """Room for 20 spans where 24 or more are drawn: fewer spans, all of them whole."""
  rows, lengths = _documents(100, 512)
  example = _make(rows, lengths, 512 + 40, ObjectiveConfig())
  assert example['capped'].mean() > 0.9
  assert [*_rebuild(example)] == rows.tolist()


def test_a_feature_length_without_room_is_refused():
  rows, lengths = _documents(4, 64)
  with pytest.raises(ValueError, match='at least 2 tokens shorter'):
    _make(rows, lengths, 64, ObjectiveConfig())


def test_an_example_depends_on_seed_and_index_alone():
  rows, lengths = _documents(32, 64)
  config = ObjectiveConfig(blank=1, document=1, sentence=1)
  together = _make(rows, lengths, 100, config, first=1000)
  for start in (0, 5, 31):
    alone = _make(rows[start : start + 1], lengths[:1], 100, config, first=1000 + start)
    for name in together:
      np.testing.assert_array_equal(alone[name][0], together[name][start], err_msg=name)
  again = _make(rows, lengths, 100, config, first=1000, seed=2)
  later = _make(rows, lengths, 100, config, first=1032)
  for other in (again, later):
    assert (other['tokens'] != together['tokens']).any(1).mean() > 0.9


def test_random_numbers_are_uniform_and_independent_across_purposes():
  keys = stateless.example_keys(3, tf.range(2000, dtype=tf.int64))
  draws = [stateless.uniform(keys, purpose, 8).numpy() for purpose in (0, 1, 18)]
  for draw in draws:
    assert draw.min() >= 0 and draw.max() < 1
    assert stats.kstest(draw.ravel(), 'uniform').pvalue > 1e-3
    assert abs(np.corrcoef(draw[:-1, 0], draw[1:, 0])[0, 1]) < 0.08
  assert abs(np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]) < 0.04


@pytest.mark.parametrize(
  'fields,message',
  [
    (dict(mask_ratio=0.0), r'mask_ratio must be in \(0, 1\)'),
    (dict(mask_ratio=1.5), r'mask_ratio must be in \(0, 1\)'),
    (dict(mask_ratio=0.9), 'leave a token between spans'),
    (dict(blank=0.0), 'one above 0'),
    (dict(blank=-1.0), '0 or more'),
    (dict(span_mean=0.0), 'span_mean'),
    (dict(document_min_ratio=1.0), 'document_min_ratio'),
    (dict(dblock_probability=2.0), 'dblock_probability'),
    (dict(shuffle_spans=1), 'must be bool'),
  ],
)
def test_bad_objectives_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    ObjectiveConfig(**fields)


def test_row_lengths_leave_room_and_little_padding():
  for length in (128, 512, 1024, 2048):
    config = ObjectiveConfig()
    row = config.row_length(length)
    rows, lengths = _documents(256, row)
    example = _make(rows, lengths, length, config)
    assert example['capped'].mean() < 0.05
    assert (example['key_end'] == 0).mean() < (0.07 if length == 128 else 0.03)


@pytest.mark.parametrize('name', ['blank', 'document', 'sentence'])
def test_an_empty_row_gives_an_empty_example(name):
  tokens, _ = _documents(4, 40)
  lengths = np.array([40, 0, 40, 0], np.int32)
  example = _make(tokens, lengths, 64, ObjectiveConfig().only(name))
  for row, length in enumerate(lengths):
    assert (example['key_end'][row].max() > 0) == (length > 0)
    assert (example['loss_weights'][row].sum() > 0) == (length > 0)
    assert length or not example['positions'][row].any()
