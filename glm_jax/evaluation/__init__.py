"""What is asked of a model to judge it, and how its answers are counted."""

from glm_jax.evaluation import patterns
from glm_jax.evaluation.choices import BENCHMARKS, Choices
from glm_jax.evaluation.cloze import PatternTask
from glm_jax.evaluation.language import Blanks, Lambada, Perplexity
from glm_jax.evaluation.replies import Replies
from glm_jax.evaluation.task import Task

_TASKS = (Perplexity(), Lambada(), Blanks(), *map(Choices, BENCHMARKS), Replies())


def tasks() -> dict[str, Task]:
  """By the name of --task, patterns that modules have registered among them."""
  clozes = map(PatternTask, patterns.PATTERNS.values())
  return {task.name: task for task in (*_TASKS, *clozes)}
