"""Numbers that say how good answers are, in percent."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

import numpy as np

from glm_jax import configs

# A character of Chinese, Japanese or Korean is a word of its own.
_CJK = r'[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]'


def check_libraries(otherwise: str) -> None:
  """Raises UserError if what `score` needs is not installed.

  Args:
    otherwise: what can be done instead.
  """
  needed = ('rouge_score', 'sacrebleu')
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  configs.check(
    not missing,
    'answers are scored by rouge_score and sacrebleu, which must be installed',
    f'no {" and no ".join(missing)}',
    f"pip install -e '.[answers]', or {otherwise}",
  )


def words(text: str) -> list[str]:
  """Of any language: runs of letters and digits, and each character of Chinese.

  Example:
    >>> words("It's 3. 语言")
    ['it', 's', '3', '语', '言']
  """
  return re.findall(rf'{_CJK}|(?:(?!{_CJK})[^\W_])+', text.lower())


class _Words:
  """`words`, as rouge_score asks for them: its own are of Latin letters alone."""

  def tokenize(self, text: str) -> list[str]:
    return words(text)


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
  """Exact match, ROUGE (F) and corpus BLEU.

  Example:
    >>> score(['a cat sat'], ['a cat sat'])['rougeL']
    100.0
  """
  import sacrebleu
  from rouge_score import rouge_scorer

  kinds = ('rouge1', 'rouge2', 'rougeL')
  scorer = rouge_scorer.RougeScorer(kinds, tokenizer=_Words())
  pairs = [*zip(references, answers, strict=True)]
  each = [scorer.score(*pair) for pair in pairs]
  chinese = any(re.search(_CJK, reference) for reference in references)
  bleu = sacrebleu.corpus_bleu(
    [*answers], [[*references]], tokenize='zh' if chinese else '13a'
  )
  return {
    'exact_match': 100 * float(np.mean([a == b for a, b in pairs])),
    **{kind: 100 * float(np.mean([s[kind].fmeasure for s in each])) for kind in kinds},
    'bleu': float(bleu.score),
  }
