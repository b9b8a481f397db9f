"""What is asked of a model to judge it, and how its answers are counted."""

from glm_jax.evaluation.choices import BENCHMARKS, Choices
from glm_jax.evaluation.language import Blanks, Lambada, Perplexity
from glm_jax.evaluation.replies import Replies
from glm_jax.evaluation.task import Task

TASKS: dict[str, Task] = {
  task.name: task
  for task in (Perplexity(), Lambada(), Blanks(), *map(Choices, BENCHMARKS), Replies())
}
"""By the name of --task; a module that --import names may add its own."""
