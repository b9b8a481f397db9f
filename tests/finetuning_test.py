"""Fine-tuning through the commands."""

import json
import re

import jax
import numpy as np
import pytest
import tuned
from commands import in_process, refused, snapshot
from runs import params

import glm_jax
from glm_jax.evaluation import metrics
from glm_jax.training import writer

PAIRS = "MIXTURE_OR_TASK_NAME='glm_pairs'"


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tuned')
  for family in ('chatglm3', 'chatglm', 'glm'):
    tuned.checkpoint(folder, family)
  tuned.write(folder / 'lines.jsonl', tuned.lines(120))
  pairs = [{'prompt': f'{n} what is a fox?', 'text': f'a fox is {n}.'} for n in range(120)]
  tuned.write(folder / 'pairs.jsonl', pairs)
  marked = [{'prompt': f'a [MASK] {n}', 'text': 'c'} for n in range(40)]
  tuned.write(folder / 'marked.jsonl', marked)
  tuned.write(folder / 'text.jsonl', [{'text': f'{n} the fox. ' * 5} for n in range(200)])
  return folder


def _losses(run):
  return {record['step']: record['loss'] for record in writer.read(str(run), 'train')}


@pytest.mark.slow
def test_a_checkpoint_is_tuned_on_conversations_and_answers(place):
  answers = ('AnswerConfig.examples=6', 'AnswerConfig.max_new_tokens=8')
  done = tuned.run('train', place, *answers, 'EvaluationConfig.at_start=True')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('validation loss  answer ') == 2
  last = writer.read(str(place / 'run'), 'validation')[-1]
  assert {'exact_match', 'rouge1', 'rouge2', 'rougeL', 'bleu', 'loss/answer'} <= {*last}
  lines = (place / 'run' / 'predictions.jsonl').read_text(encoding='utf-8').splitlines()
  assert len(lines) == 6
  for line in map(json.loads, lines):
    assert line['prompt'].endswith('?<|assistant|>')
    assert line['reference'].endswith(' is quick.')
  assert 'held-out questions' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('way', ['lora', 'qlora', 'ptuning'])
def test_adapters_learn_answers_and_answer_what_is_held_out(place, way):
  """With a rate of nothing the run answers as its base does; else as what it learnt."""
  base = place / 'chatglm3_base'
  if way == 'qlora':
    base = place / 'chatglm3_int4'
    done = in_process('quantize', place / 'chatglm3_base', base, '--bits=4')
    assert done.returncode == 0, done.stderr
  said, flags = {}, (f'--gin_file=gin_configs/runs/{way}.gin',)
  for rate in (1e-12, 0.3):
    done = tuned.run(
      'train',
      place,
      'AnswerConfig.examples=4',
      'AnswerConfig.max_new_tokens=8',
      f'OptimizerConfig.learning_rate={rate}',
      'TRAIN_STEPS=4',
      base=base,
      run=f'{way}_{rate}',
      flags=flags,
    )
    assert done.returncode == 0, done.stderr
    path = place / f'{way}_{rate}' / 'predictions.jsonl'
    lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    said[rate] = [line['answer'] for line in lines]
  assert said[1e-12] != said[0.3]
  tuned_one, own = glm_jax.load(place / f'{way}_0.3'), glm_jax.load(base)
  text = ['what is a fox?']
  assert not np.allclose(tuned_one.logits(text), own.logits(text), atol=1e-3)


@pytest.mark.slow
def test_a_prefix_model_learns_pairs_by_heart_and_says_them(place):
  """What training asks is what the engine answers: with the same ids and positions."""
  line = {'prompt': 'what is a fox?', 'text': 'a quick fox.'}
  same = tuned.write(place / 'same.jsonl', [line] * 300)
  done = tuned.run(
    'train',
    place,
    PAIRS,
    "Finetuning.blank='{prompt} [MASK].'",
    f"CorpusConfig.validation='{same}'",
    'TRAIN_STEPS=40',
    'OptimizerConfig.learning_rate=1e-2',
    'AnswerConfig.examples=4',
    'LossConfig.label_smoothing=0.1',
    base=place / 'glm_base',
    corpus=same,
    run='heart',
  )
  assert done.returncode == 0, done.stderr
  last = writer.read(str(place / 'heart'), 'validation')[-1]
  assert last['exact_match'] == 100 and last['rougeL'] == 100, done.stdout


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit_with_text_mixed_in(place, monkeypatch):
  mixed = (
    f"Finetuning.text='{place}/text.jsonl'",
    "Finetuning.template='chatglm'",
    'CheckpointConfig.every=2',
    "OptimizerConfig.schedule='constant'",
  )
  base = place / 'chatglm_base'
  for run, ends in (('straight', [4]), ('stopped', [2, 4])):
    for end in ends:
      done = tuned.run('train', place, *mixed, f'TRAIN_STEPS={end}', base=base, run=run)
      assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout
  straight, stopped = (place / run for run in ('straight', 'stopped'))
  assert _losses(straight) == _losses(stopped) and {*_losses(stopped)} == {1, 2, 3, 4}
  monkeypatch.setattr('runs.STEPS', 4)
  for a, b in zip(*(_leaves(run) for run in (straight, stopped)), strict=True):
    np.testing.assert_array_equal(a, b)
  other = (*mixed, 'Finetuning.text_share=0.2')
  refused(tuned.run('train', place, *other, base=base, run='straight'), 'data')


def _leaves(run):
  return jax.tree.leaves(params(run))


@pytest.mark.slow
def test_shards_train_as_their_files_do(place):
  """Conversations and the text between them, from one command."""
  text = f"Finetuning.text='{place}/text.jsonl'"
  assert tuned.run('train', place, text, run='files').returncode == 0
  flags = [f'--output_dir={place}/shards', '--processes=1', '--shards=2']
  done = tuned.run('make_shards', place, text, run='unused', flags=flags)
  assert done.returncode == 0, done.stderr
  bindings = re.findall(r'--gin\.(.*)', done.stdout)
  assert len(bindings) == 2
  bindings = [binding.replace('"', '') for binding in bindings]
  corpus = bindings[0].split('=')[1].strip("'")
  done = tuned.run('train', place, bindings[1], corpus=corpus, run='sharded')
  assert done.returncode == 0, done.stderr
  assert _losses(place / 'files') == _losses(place / 'sharded')
  # Shards say what they were rendered for.
  other = ("Finetuning.template='chatglm'",)
  done = tuned.run(
    'train', place, *other, base=place / 'chatglm_base', corpus=corpus, run='other'
  )
  refused(done, 'must be of the vocabulary')
  done = tuned.run('train', place, PAIRS, corpus=corpus, run='other')
  refused(done, 'must be of what this run reads, text', 'chatglm3')


def test_preview_marks_what_is_learnt(place):
  shown = lambda *bindings, **how: tuned.run(
    'preview',
    place,
    *bindings,
    flags=[f'--output={place}/mask.png', '--examples=1'],
    **how,
  )
  done = shown()
  assert done.returncode == 0, done.stderr
  assert re.search(
    r'a (\w+)\?<\|assistant\|>⟦↵ a \1 is quick\.(<\|user\|>|</s>)⟧', done.stdout
  )
  assert 'answer: 100.0% of examples' in done.stdout
  done = shown(PAIRS, base=place / 'glm_base', corpus=place / 'pairs.jsonl')
  assert done.returncode == 0, done.stderr
  assert re.search(
    r'\[ENC\](\d+) what is a fox\?\[gMASK\]\[sop\]⟦a fox is \1\.\[eop\]⟧', done.stdout
  )


SIZES = dict(num_layers=1, hidden_size=32, num_heads=4, num_kv_heads=2, head_size=8)
SIZES |= dict(mlp_size=48, vocab_size=1024, max_positions=256)
REFUSED = [
  ((), {'base': 'glm'}, ['a family that has a chat template']),
  (("Finetuning.template='chatglm3'",), {'base': 'glm'}, ['must be used with a vocab']),
  (("Finetuning.template='glm5'",), {}, ['Finetuning.template must be one of']),
  (("MIXTURE_OR_TASK_NAME='glm_causal'",), {}, ['Finetuning.task must be one of']),
  (
    ('TrainConfig.recipe=@Pretraining()',),
    {},
    ['fine-tuning must have a recipe of its own', 'sft.gin'],
  ),
  (("Finetuning.blank='{prompt} [MASK][MASK]'",), {}, ['a prompt must be written as']),
  (("Finetuning.blank='[gMASK]'",), {}, ['a prompt must be written as']),
  ((PAIRS,), {'base': 'glm', 'corpus': 'marked'}, ['must have one blank', '2 in']),
  ((PAIRS,), {'base': 'glm', 'corpus': 'text'}, ['a pair must have a prompt']),
  (
    ('CorpusConfig.packed=False', "Finetuning.text='lines.txt'"),
    {},
    ['text that is mixed in must stand in packed rows'],
  ),
  (
    ('TrainConfig.adapters=@PTuningConfig()', 'PTuningConfig.tokens=4'),
    {},
    ['virtual tokens open rows of one document each', 'packed=False'],
  ),
  (
    ("CorpusConfig.too_long='error'", "TASK_FEATURE_LENGTHS={'tokens': 40}"),
    {},
    ['must fit a row, 41 tokens', 'lines.jsonl line '],
  ),
  (("TASK_FEATURE_LENGTHS={'tokens': 16}",), {}, ['the train split must hold a document']),
  (('Finetuning.text_share=1.5',), {}, ['text_share must be in (0, 1)']),
  (("TASK_FEATURE_LENGTHS={'tokens': 300}",), {}, ["must fit the model's position table"]),
  (
    (
      'TrainConfig.model=@ChatGLM2Config()',
      *(f'ChatGLM2Config.{name}={value}' for name, value in SIZES.items()),
    ),
    {},
    ['fine-tuning must have the vocabulary of a checkpoint'],
  ),
]


@pytest.mark.parametrize('bindings,how,words', REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_tuned_is_refused_and_nothing_is_written(
  place, bindings, how, words
):
  base = place / f'{how.get("base", "chatglm3")}_base'
  corpus = place / f'{how.get("corpus", "lines")}.jsonl'
  before = snapshot(place)
  done = tuned.run('train', place, *bindings, base=base, corpus=corpus, run='refused')
  refused(done, *words)
  assert snapshot(place) == before and not (place / 'refused').exists()


def test_roles_out_of_order_are_refused_with_their_line(place):
  lines = tuned.lines(40)
  lines[6]['messages'][0], lines[6]['messages'][1] = lines[6]['messages'][:2][::-1]
  path = tuned.write(place / 'disorder.jsonl', lines)
  done = tuned.run('train', place, corpus=path, run='refused')
  refused(done, "behind 'start', got 'assistant'", 'disorder.jsonl line 7')
  assert not (place / 'refused').exists()


def test_answers_need_their_libraries(place, monkeypatch):
  find = metrics.importlib.util.find_spec
  gone = lambda name: None if name == 'sacrebleu' else find(name)
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', gone)
  done = tuned.run('train', place, 'AnswerConfig.examples=2', run='refused')
  refused(done, 'no sacrebleu', "pip install -e '.[answers]'")


def test_scores_of_answers():
  """Whole words and Chinese characters; 100 is perfect."""
  perfect = metrics.score(['a b c d', '语言模型'], ['a b c d', '语言模型'])
  assert perfect == pytest.approx(dict.fromkeys(perfect, 100))
  made = metrics.score(['the cat', '语文'], ['the dog sat', '语言'])
  assert made['exact_match'] == 0
  # F of 1 of 2 and 1 of 3; of 1 of 2 twice.
  assert made['rouge1'] == pytest.approx(100 * (0.4 + 0.5) / 2)
  assert made['rouge2'] == 0 and made['rougeL'] == pytest.approx(made['rouge1'])
