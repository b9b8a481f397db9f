"""An object of a file or a data set as a document, in the form that a run reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glm_jax.data.corpora import fields, questions, ranked, turns
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document


def read(content: Any, config: CorpusConfig, where: Callable[[], str] = str) -> Document:
  """Its text or pair; its conversation, ranked answers or question, as configured."""
  if config.asked:
    return questions.document(content, config, where)
  if config.ranked:
    return ranked.document(content, config, where)
  return (turns if config.conversations else fields).document(content, config, where)
