"""PyTorch's files, and transformers on what is exported."""

import csv
import json
import os
import pickle
import random
import subprocess
import sys

import chat_test
import numpy as np
import pytest
from commands import ROOT, command, in_process
from foreign import arrays_of, config_json, imported, write_safetensors
from safetensors.numpy import load_file

from glm_jax import convert, models
from glm_jax.batch import Visibility
from glm_jax.checkpoints import slices
from glm_jax.inference.filling import Filler
from glm_jax.interop import tokenizer_files
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.chat import template_for
from glm_jax.text.released import ChatGLM3Vocabulary, GLM4Vocabulary

pytestmark = pytest.mark.slow

SIZES = dict(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_size=16)
SIZES |= dict(mlp_size=48, vocab_size=768, max_positions=64)


def _convert(*arguments):
  convert.main([str(argument) for argument in arguments])


def _torch_tensors(tensors):
  import torch

  return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}


def _state_dict(folder):
  import torch

  found = {}
  for path in sorted(folder.rglob('*.pt')):
    found[path.name] = torch.load(path, weights_only=True)['module']
  return found


def _transformers(folder, program='transformers_peer.py', **request):
  """What transformers makes of an export, see the program."""
  done = subprocess.run(
    [sys.executable, ROOT / 'tests' / program, folder],
    input=json.dumps(request),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  'name,format', [('chatglm2', 'glm'), ('hf_glm', 'glm'), ('glm4_0414', 'glm4')]
)
def test_transformers_computes_the_same_logits(name, format, tmp_path):
  arrays, tensors = arrays_of(name)
  write_safetensors(tmp_path / 'source', tensors, config_json(name, arrays))
  _convert(tmp_path / 'source', tmp_path / 'checkpoint')
  _convert(tmp_path / 'checkpoint', tmp_path / 'glm', f'--to={format}')
  made = _transformers(tmp_path / 'glm', ids=arrays['in/ids'].tolist())
  assert made['class'] == f'{format.capitalize()}ForCausalLM'
  theirs = np.array(made['logits'], np.float32)
  # Its norms behind attention and MLP enlarge differences of the last bits.
  atol = 1e-5 if format == 'glm4' else 1e-6
  np.testing.assert_allclose(theirs, arrays['out/logits'], atol=atol)
  config = json.loads((tmp_path / 'glm' / 'config.json').read_text())
  found, params = imported(load_file(tmp_path / 'glm' / 'model.safetensors'), config)
  t = np.broadcast_to(np.arange(theirs.shape[1]), theirs.shape[:2])
  ours, _ = models.build(found.config).apply(
    {'params': params}, arrays['in/ids'], t, 0 * t, Visibility(0 * t, t + 1)
  )
  np.testing.assert_allclose(theirs, ours, atol=atol)


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
  """A chat model with a vocabulary of its own, exported for transformers."""
  folder = tmp_path_factory.mktemp('exported')
  text = ['the quick brown fox jumps over the lazy dog. ' * 4, '语言模型在学习文字。' * 8]
  vocabulary = ChatGLM3Vocabulary(vocabularies.train_sentencepiece(text, 512, bpe=True))
  arrays, tensors = arrays_of('chatglm2')
  rng = np.random.default_rng(0)
  rows = vocabulary.size  # none that only one of two programs would generate
  for name in ('embedding.word_embeddings', 'output_layer'):
    width = tensors[f'transformer.{name}.weight'].shape[1]
    tensors[f'transformer.{name}.weight'] = rng.normal(0, 0.5, (rows, width)).astype('f4')
  config = {**config_json('chatglm2', arrays), 'padded_vocab_size': rows, 'seq_length': 256}
  write_safetensors(folder / 'source', tensors, config)
  (folder / 'source' / 'tokenizer.model').write_bytes(vocabulary.model)
  (folder / 'source' / 'tokenization_chatglm.py').write_text("roles = ['<|user|>']")
  _convert(folder / 'source', folder / 'checkpoint')
  _convert(folder / 'checkpoint', folder / 'glm', '--to=glm')
  found, params = imported(tensors, config)
  return folder, vocabulary, found.config, params


def test_transformers_generates_the_same_greedy_tokens(exported):
  folder, vocabulary, config, params = exported
  filler = Filler(config, {'params': params}, vocabulary)
  prompts = [filler.encode(text) for text in ('the quick brown', '语言模型', 'fox')]
  made = _transformers(folder / 'glm', prompts=prompts, new=24)
  assert made['stops'] == list(vocabulary.stops) and len(made['stops']) == 3
  for prompt, theirs in zip(prompts, made['generated'], strict=True):
    [[ours]] = filler.fill([prompt], max_new_tokens=24)
    if theirs[-1] in vocabulary.stops:
      theirs = theirs[:-1]
    assert ours == theirs and len(ours) > 3


def test_the_exported_tokenizer_is_ours(exported):
  folder, vocabulary, *_ = exported
  texts = ['the quick brown fox', '语言 模型，\n学习\t文字', '  a  naïve “quote” 😀', '']
  made = _transformers(folder / 'glm', texts=texts)
  ids = [vocabulary.encode(text) for text in texts]
  assert made['tokens'] == [[*vocabulary.prefix, *row] for row in ids]
  assert made['decoded'] == [vocabulary.decode(row) for row in ids]
  assert made['padding'] == ['left', 0, vocabulary.stops[0]]


@pytest.mark.parametrize(
  'family,name',
  [
    ('chatglm3', 'chatglm3'),
    ('chatglm3', 'chatglm3 spaced'),
    ('chatglm2', 'chatglm2 spaced'),
    ('glm4', 'glm4 tiktoken'),
    ('glm4-0414', 'glm4'),
  ],
)
def test_transformers_reads_conversations_as_we_do(family, name, tmp_path):
  template = template_for(chat_test.MAKERS[name](), family)
  chat_test.export(tmp_path, template.vocabulary, family)
  config = {'model_type': 'glm4' if family == 'glm4-0414' else 'glm'}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  rng, chats, ids = random.Random(4), [], []
  glm4 = family.startswith('glm4')
  words = chat_test.WORDS + ([] if glm4 else chat_test.MARKERS)
  for number in range(40):
    messages = chat_test.conversation(rng, template, words)
    tools = chat_test.TOOLS[glm4:] if number % 2 and family != 'chatglm2' else ()
    told = template.with_tools(messages, tools)
    plain = [{k: v for k, v in vars(m).items() if v} for m in messages]
    chats.append([plain, tools or None, True])
    ids.append(template.encode(told, opening=True))
  assert _transformers(tmp_path, chats=chats) == ids


# As the tokenization_chatglm.py published with ChatGLM3-6B: the pieces of a sentencepiece
# model, control pieces behind them, and properties that nobody can set.
CODE = """
import sentencepiece
from transformers import PreTrainedTokenizer

NAMES = ['[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop']
NAMES += ['<|system|>', '<|user|>', '<|assistant|>', '<|observation|>']


class ChatGLMTokenizer(PreTrainedTokenizer):
  vocab_files_names = {'vocab_file': 'tokenizer.model'}

  def __init__(self, vocab_file, padding_side='left', **kwargs):
    self.model = sentencepiece.SentencePieceProcessor(vocab_file)
    self.control = {name: len(self.model) + i for i, name in enumerate(NAMES)}
    super().__init__(padding_side=padding_side, **kwargs)

  @property
  def eos_token(self):
    return '</s>'

  @property
  def vocab_size(self):
    return len(self.model) + len(self.control)

  def get_vocab(self):
    return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

  def _tokenize(self, text, **kwargs):
    return self.model.encode(text, out_type=str)

  def _convert_token_to_id(self, token):
    return self.control.get(token, self.model.piece_to_id(token))

  def _convert_id_to_token(self, index):
    names = {token: name for name, token in self.control.items()}
    return names.get(index) or self.model.id_to_piece(index)

  def build_inputs_with_special_tokens(self, ids, pair=None):
    return [self.control['[gMASK]'], self.control['sop'], *ids]
"""


def test_the_code_of_the_original_reads_the_exported_tokenizer(exported):
  """Copied beside an export in the layout that it was made for, as the command advises."""
  folder, vocabulary, *_ = exported
  _convert(folder / 'checkpoint', folder / 'chatglm2', '--to=chatglm2')
  (folder / 'chatglm2' / 'tokenization_chatglm.py').write_text(CODE)
  names = ['<|user|>', 'sop', '[gMASK]', '</s>']
  texts = ['the quick brown fox', '语言模型']
  made = _transformers(folder / 'chatglm2', texts=texts, names=names)
  assert made['class'] == 'ChatGLMTokenizer'
  assert made['names'] == [vocabulary.control[name] for name in names]
  ids = [[*vocabulary.prefix, *vocabulary.encode(text)] for text in texts]
  assert made['tokens'] == ids


def test_transformers_reads_a_vocabulary_that_was_tiktokens(tmp_path):
  golden = json.loads((ROOT / 'tests/golden/tiktoken.json').read_text())
  vocabulary = GLM4Vocabulary.from_ranks(golden['model'].encode(), {})
  tokenizer_files.write(tmp_path, vocabulary, models.ChatGLM2Config(**SIZES))
  names = ['<|user|>', '<sop>', '[gMASK]', '<|endoftext|>']
  # Without those that spell control pieces, which transformers reads as such.
  texts = [text for text in golden['texts'] if '<|' not in text]
  made = _transformers(tmp_path, texts=texts, names=names)
  assert made['names'] == [vocabulary.control[name] for name in names]
  ids = [[*vocabulary.prefix, *golden['texts'][text]] for text in texts]
  assert made['tokens'] == ids


@pytest.mark.parametrize('kind', ['single', 'sharded', 'legacy'])
def test_bin_files_are_read_as_safetensors_are(kind, tmp_path):
  import torch

  arrays, tensors = arrays_of('chatglm')
  tensors = {k: v.astype(np.float16) for k, v in tensors.items()}
  write_safetensors(tmp_path / 'safe', tensors, config_json('chatglm', arrays))
  folder = tmp_path / 'bin'
  folder.mkdir()
  (folder / 'config.json').write_text((tmp_path / 'safe/config.json').read_text())
  if kind == 'sharded':
    where, names = {}, sorted(tensors)
    for number in range(2):
      file = f'pytorch_model-{number + 1:05}-of-00002.bin'
      part = {name: tensors[name] for name in names[number::2]}
      torch.save(_torch_tensors(part), folder / file)
      where |= dict.fromkeys(part, file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': where}))
  else:
    torch.save(
      _torch_tensors(tensors),
      folder / 'pytorch_model.bin',
      _use_new_zipfile_serialization=kind != 'legacy',
    )
  for name in ('safe', 'bin'):
    _convert(tmp_path / name, tmp_path / f'{name}-checkpoint')
  a, b = (slices.StoredLeaves(tmp_path / f'{name}-checkpoint') for name in ('safe', 'bin'))
  assert a.specs == b.specs
  for path in a.specs:
    np.testing.assert_array_equal(a.read(path, None), b.read(path, None))


@pytest.mark.parametrize('name,parts', [('glm', 1), ('glm', 2), ('glm_130b', 2)])
def test_mp_rank_files_come_back_byte_for_byte(name, parts, tmp_path):
  import torch

  _, tensors = arrays_of(name)
  source = tmp_path / 'source' / '1000'
  source.mkdir(parents=True)
  torch.save({'module': _torch_tensors(tensors)}, source / 'mp_rank_00_model_states.pt')
  (tmp_path / 'source' / 'latest_checkpointed_iteration.txt').write_text('1000')
  _convert(tmp_path / 'source', tmp_path / 'one', '--set=num_heads=4')
  _convert(tmp_path / 'one', tmp_path / 'cut', f'--parts={parts}')
  assert len(_state_dict(tmp_path / 'cut')) == parts
  _convert(tmp_path / 'cut', tmp_path / 'again', '--set=num_heads=4')
  _convert(tmp_path / 'again', tmp_path / 'whole', '--parts=1')
  [found] = _state_dict(tmp_path / 'whole').values()
  assert set(found) == set(tensors)
  for key, tensor in tensors.items():
    assert found[key].numpy().tobytes() == tensor.tobytes(), key


class Evil:
  """Makes a file if it is ever unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
  import torch

  folder, trace = tmp_path / 'source', tmp_path / 'executed'
  folder.mkdir()
  arrays, tensors = arrays_of('chatglm')
  (folder / 'config.json').write_text(json.dumps(config_json('chatglm', arrays)))
  file = folder / 'pytorch_model.bin'
  for save in (
    lambda: torch.save({**_torch_tensors(tensors), 'x': Evil(trace)}, file),
    lambda: file.write_bytes(pickle.dumps({'x': Evil(trace)})),
  ):
    save()
    with pytest.raises(ValueError, match=r'pytorch_model\.bin must'):
      _convert(folder, tmp_path / 'checkpoint')
    assert not trace.exists() and not (tmp_path / 'checkpoint').exists()
  torch.save(_torch_tensors(tensors), file)
  file.write_bytes(file.read_bytes()[:-2000])
  with pytest.raises(ValueError, match=r'pytorch_model\.bin must be a complete'):
    _convert(folder, tmp_path / 'checkpoint')
  torch.save({**_torch_tensors(tensors), 'epoch': 3}, file)
  with pytest.raises(ValueError, match=r"must hold tensors by name, got \['epoch'\]"):
    _convert(folder, tmp_path / 'checkpoint')


def _run(module, *arguments):
  # Outside of training, a process's start would take longer than its work.
  run = command if module == 'train' else in_process
  done = run(module, *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_from_scratch_to_transformers_and_on_with_text_of_ones_own(tmp_path):
  """The README's way, with fewer steps: train, export, generate, continue, export."""
  text = 'The quick brown fox number {} jumps over the lazy dog. 语言模型在学习文字。\n'
  (tmp_path / 'text').mkdir()
  for number in range(60):
    content = ''.join(text.format(number * 7 + line) for line in range(20))
    (tmp_path / 'text' / f'{number:02}.txt').write_text(content, encoding='utf-8')
  common = (
    f"--gin.CorpusConfig.cache_dir='{tmp_path}/cache'",
    '--gin.EvaluationConfig.examples=32',
    '--gin.OptimizerConfig.warmup_steps=5',
    '--gin.BATCH_SIZE=8',
  )
  _run(
    'train',
    '--gin_file=gin_configs/chatglm2_tiny.gin',
    f"--gin.CorpusConfig.corpus='{tmp_path}/text/*.txt'",
    f"--gin.MODEL_DIR='{tmp_path}/run'",
    '--gin.TRAIN_STEPS=25',
    *common,
  )
  _run('convert', tmp_path / 'run', tmp_path / 'exported')
  prompt = 'The quick brown'
  made = _transformers(tmp_path / 'exported', texts=[prompt], new=16)
  [theirs] = made['continued']
  generate = ('generate', f'--prompt={prompt}', '--max_new_tokens=16')
  ours = _run(*generate, f'--checkpoint={tmp_path}/run').rstrip('\n')
  assert ours == theirs.rstrip('\n') and len(ours) > len(prompt)

  # Training goes on from the export, at the loss where it was.
  _run('convert', tmp_path / 'exported', tmp_path / 'imported')
  _run(
    'train',
    '--gin_file=gin_configs/runs/continue.gin',
    f"--gin.INIT_FROM='{tmp_path}/imported'",
    f"--gin.MODEL_DIR='{tmp_path}/more'",
    f"--gin.CORPUS='{tmp_path}/text/*.txt'",
    "--gin.TASK_FEATURE_LENGTHS={'tokens':128}",
    "--gin.ComputeConfig.dtype='float32'",
    '--gin.OptimizerConfig.learning_rate=1e-3',
    '--gin.TRAIN_STEPS=40',
    *common,
  )
  first, validated = {}, {}
  for run in ('run', 'more'):
    lines = (tmp_path / run / 'metrics.jsonl').read_text().splitlines()
    found = [json.loads(line) for line in lines]
    first[run] = found[0]['loss']
    [validated[run]] = [line['loss'] for line in found if line['kind'] == 'validation']
  assert first['run'] > 6 and first['more'] == pytest.approx(validated['run'], abs=0.4)
  assert validated['more'] < validated['run'] - 0.05
  _run('convert', tmp_path / 'more', tmp_path / 'again', '--dtype=bfloat16')
  config = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert config['model_type'] == 'glm' and config['torch_dtype'] == 'bfloat16'


def test_an_evaluation_is_that_of_pytorch_on_the_export(exported, tmp_path):
  """Perplexity in overlapping windows, last words, and letters behind questions."""
  folder, *_ = exported
  text = 'the quick brown fox jumps over the lazy dog. 语言模型在学习文字。'
  texts, passages = (
    [text * 4, text],
    ['the quick brown fox', 'the lazy dog jumps over the fox'],
  )
  rows = [('the fox', 'a', 'the dog', 'b', 'fox', 'C'), ('dog', 'over', 'x', 'y', 'z', 'A')]
  lines = [json.dumps({'text': text}) for text in texts]
  (tmp_path / 'texts.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'passages.txt').write_text('\n'.join(passages))
  (tmp_path / 'mmlu' / 'test').mkdir(parents=True)
  with (tmp_path / 'mmlu/test/law_test.csv').open('w', newline='') as file:
    csv.writer(file).writerows(rows)
  opening = 'The following are multiple choice questions (with answers) about law.\n\n'
  questions = []
  for question, *choices, _ in rows:
    listed = ''.join(f'\n{k}. {v}' for k, v in zip('ABCD', choices, strict=True))
    questions.append((f'{opening}{question}{listed}\nAnswer:', [f' {k}' for k in 'ABCD']))
  request = dict(texts=texts, passages=passages, choices=questions, length=48, stride=16)
  theirs = _transformers(folder / 'glm', 'evaluation_peer.py', **request)
  found = {}
  for task, path in (
    ('perplexity', 'texts.jsonl'),
    ('lambada', 'passages.txt'),
    ('mmlu', 'mmlu'),
  ):
    windows = ('--length=48', '--stride=16') if task == 'perplexity' else ()
    done = in_process(
      *(
        'evaluate',
        f'--checkpoint={folder}/checkpoint',
        f'--task={task}',
        f'--input={path}',
      ),
      *(*windows, f'--output={task}.jsonl'),
      cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    records = (tmp_path / f'{task}.jsonl').read_text().splitlines()
    found[task] = [*map(json.loads, records)]
  [line] = json.loads((tmp_path / 'perplexity.json').read_text())['table']
  assert line['tokens'] == theirs['tokens']
  expected = np.exp(theirs['nll'] / theirs['tokens'])
  assert line['token_perplexity'] == pytest.approx(expected, rel=1e-5)
  words = [[record['log_prob'], record['right']] for record in found['lambada']]
  np.testing.assert_allclose(words, theirs['words'], atol=1e-4)
  letters = [record['log_probs'] for record in found['mmlu']]
  np.testing.assert_allclose(letters, theirs['letters'], atol=1e-4)
