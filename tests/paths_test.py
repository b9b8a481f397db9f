"""Addresses where paths are meant: whatever does not work there is refused, and at once."""

import dataclasses

import pytest
from commands import TINY, gin, in_process, refused

from glm_jax import configs
from glm_jax.recipes import CONFIGURABLES
from glm_jax.training.search import TuneConfig

QUICKSTART = '--gin_file=gin_configs/glm_tiny.gin'
# {}: the address.
LOCAL = {
  'train': [
    [QUICKSTART, *gin("VocabularyConfig.path='chatglm3:{}'")],
    [QUICKSTART, *gin("CorpusConfig.cache_dir='{}'")],
    ['--gin_file={}'],
  ],
  'convert': [['{}', 'there'], ['.', '{}'], ['.', 'there', '--vocabulary=bytes:{}']],
  'generate': [
    ['--checkpoint=a', '--input={}'],
    ['--checkpoint=a', '--input=a.txt', '--output={}.jsonl'],
  ],
  'evaluate': [
    ['--checkpoint=a', '--task=lambada', '--input={}'],
    ['--checkpoint=a', '--task=lambada', '--input=a.txt', '--output={}.jsonl'],
    ['--checkpoint=a', '--task=answers', '--input=a.jsonl', '--answers={}'],
  ],
  'quantize': [['{}', 'there', '--bits=8'], ['.', '{}', '--bits=8']],
  'plan': [[QUICKSTART, '--platform=cpu', '--json={}']],
  'preview': [[QUICKSTART, '--output={}', '--examples=1']],
  'tune': [['--gin_file=gin_configs/tune_quickstart.gin', *gin("STUDY_DIR='{}'")]],
}
ELSEWHERE = {
  'evaluate': [['--checkpoint={}', '--task=lambada', '--input=a.txt']],
  'generate': [['--checkpoint={}', '--prompt=a [MASK]']],
  'train': [
    [QUICKSTART, *gin("MODEL_DIR='{}'")],
    [QUICKSTART, *gin("TrainConfig.init_from='{}'")],
    [
      '--gin_file=gin_configs/runs/continue.gin',
      *gin("INIT_FROM='{}'", "CORPUS='a'", "MODEL_DIR='x'"),
    ],
    [QUICKSTART, *gin("CorpusConfig.corpus='{}/*.txt'")],
    [QUICKSTART, *gin("CorpusConfig.corpus='shards:{}'")],
    [QUICKSTART, *gin("CorpusConfig.validation='{}/*.txt'", "CorpusConfig.corpus='a'")],
    [QUICKSTART, *gin("MixtureConfig.corpora={'a': '{}/*.txt'}")],
  ],
  'make_shards': [[QUICKSTART, '--output_dir={}']],
}


def _calls(table, addresses):
  return [
    (name, [argument.replace('{}', address) for argument in arguments], address)
    for name, several in table.items()
    for arguments in several
    for address in addresses
  ]


@pytest.mark.parametrize(
  'name,arguments,address',
  [
    *_calls(LOCAL, ['gs://bucket/a', 'gs:/bucket/a', 'https://host/a']),
    *_calls(ELSEWHERE, ['s3://bucket/a', 'file:///a']),
  ],
)
def test_an_address_is_refused_before_anything_is_written(
  name, arguments, address, tmp_path
):
  tiny = gin(*TINY) if QUICKSTART in arguments else []
  done = in_process(name, *tiny, *arguments, cwd=tmp_path)
  refused(done, address)
  assert not [*tmp_path.iterdir()]


def test_every_path_among_the_fields_has_a_rule():
  """By their names: a new one must say whether it may be an address."""
  ways = ('dir', 'path', 'file', 'folder', 'corpus', 'validation', 'from')
  for kind in (*CONFIGURABLES, TuneConfig):
    for field in dataclasses.fields(kind):
      if field.type in ('str', "str = ''") and field.name.split('_')[-1] in ways:
        raise AssertionError(f'{kind.__name__}.{field.name} has no rule')


@pytest.mark.parametrize(
  'path,scheme',
  [
    *((p, '') for p in ('', 'a', '/a/b', 'C:/a', 'shards:/a', 'chatglm3:/a', 'a:b')),
    *(('gs://a', 'gs'), ('GS://a', 'gs'), ('shards:gs://a/b', 'gs'), ('gs:/a', 'gs')),
    *(('s3://a', 's3'), ('hf://a', 'hf'), ('./https:/a', 'https')),
  ],
)
def test_what_is_an_address(path, scheme):
  assert configs.LOCAL.holds(path) == (scheme == '')
  assert configs.READABLE.holds(path) == (scheme in ('', 'gs'))
