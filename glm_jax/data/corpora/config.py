"""Which text a run reads, and how it becomes tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from glm_jax import configs
from glm_jax.configs import LOCAL, NOT_EMPTY, READABLE, at_least, one_of, within
from glm_jax.text.chat import FAMILIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
  """The text.

  Attributes:
    corpus: 'documentation' (what every Python installation carries),
      'documentation:summaries' (questions about its functions), 'shards:DIR' (what
      `make_shards` wrote), 'tfds:NAME' or 'tfds:NAME:VERSION', 'task:NAME' (a seqio task
      of text, or of the feature tokens), or a glob of files: .txt (a document each),
      .jsonl, .json, .csv and .parquet (objects), also .gz and .zst. An object has a text,
      or a prompt and an answer with loss on the answer alone.
    packed: several whole documents a row, each an example of its own, instead of one
      stream of text that is cut into rows: for short documents, and for pairs, whose
      answers a cut would part from their prompts. None packs a corpus with prompts. In
      fine-tuning, False is one conversation or pair a row.
    too_long: what becomes of a pair longer than a packed row: its prompt loses its
      beginning ('truncate_prompt_left') or its answer its end ('truncate_answer'), which
      is followed by the end token all the same; it is left out ('drop'), as where nothing
      of one or the other would remain; or it stops the run ('error'). A conversation
      loses its first rounds with both of the former, and only its last answer an end.
      Answers that are compared stay whole: what was asked loses its first rounds, then
      the beginning of the last question, the same for all of them.
    verify: compare shards with their checksums before training, each process its part.
    validation: a glob of held-out files; '' holds out `validation_fraction`.
    validation_fraction: share of the documents held out, by a hash of all of each; of
      fewer than 20, the end of the text (see `glm_jax.data.corpora.held_out`).
    errors: invalid UTF-8 stops the run ('strict'), becomes U+FFFD ('replace') or is left
      out ('ignore').
    text_key: the field of an object, or feature of a data set, that holds the text.
    prompt_key: the field that precedes the text without loss, where an object has it;
      '' for 'prompt'.
    answer_key: the field with loss of objects that are all pairs; '' takes `text_key`, or
      the pairs of `glm_jax.data.corpora.fields.PAIRS` where there is none.
    conversations: the family (of `glm_jax.text.chat.FAMILIES`) in whose roles objects are
      read as conversations; '' for texts and pairs. The task glm_conversations sets it.
    ranked: whether objects are answers of which one was preferred, in those roles; a recipe
      of preferences sets it.
    asked: whether objects are questions, in those roles, to which a run finds answers of
      its own; a recipe of rewards sets it.
    tfds_data_dir: where TFDS data sets are; '' for the TFDS default.
    cache_dir: where vocabularies and rows are kept between runs.
  """

  corpus: Annotated[
    str, NOT_EMPTY.but("use 'documentation', a glob of files, or 'tfds:NAME'"), READABLE
  ] = 'documentation'
  packed: bool | None = None
  too_long: Annotated[
    str, one_of('truncate_prompt_left', 'truncate_answer', 'drop', 'error')
  ] = 'truncate_prompt_left'
  verify: bool = True
  validation: Annotated[str, READABLE] = ''
  validation_fraction: Annotated[float, within('(0, 1)')] = 0.05
  errors: Annotated[str, one_of('strict', 'replace', 'ignore')] = 'strict'
  text_key: Annotated[str, NOT_EMPTY] = 'text'
  prompt_key: str = ''
  answer_key: str = ''
  conversations: Annotated[str, one_of('', *FAMILIES)] = ''
  ranked: bool = False
  asked: bool = False
  tfds_data_dir: Annotated[str, READABLE] = ''
  cache_dir: Annotated[str, LOCAL] = '~/.cache/glm_jax'

  def __post_init__(self):
    configs.check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
  """Text to tokens.

  Attributes:
    path: a sentencepiece .model file, 'bytes', or KIND:PATH for that of a released model
      (see `glm_jax.text.loading.load`); '' trains one on the corpus, once, or takes that
      of the checkpoint that the model comes from.
    kind: of a trained one: 'sentencepiece', or 'chatglm3', byte pairs with the control
      pieces of ChatGLM3-6B.
    size: of a trained one, its 9 control pieces included.
  """

  path: Annotated[str, LOCAL] = ''
  kind: Annotated[str, one_of('sentencepiece', 'chatglm3')] = 'sentencepiece'
  size: Annotated[int, at_least(512).but("raise it, or use path='bytes'")] = 8192

  def __post_init__(self):
    configs.check_fields(self)
