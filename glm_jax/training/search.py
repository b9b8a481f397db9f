"""What a search of settings is over: the configuration of `glm_jax.tune`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from glm_jax import configs
from glm_jax.configs import LOCAL, NOT_EMPTY, SEED, at_least

# Numbers behind each kind of dimension; any number of choices.
_KINDS = {'float': 2, 'log': 2, 'int': 2, 'choice': None, 'share': 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
  """A search.

  Attributes:
    study_dir: where trials, study.db and plots are (STUDY_DIR).
    search: {gin binding: dimension}: ('float', low, high), ('log', low, high), ('int',
      low, high), ('choice', a, b, ...) or ('share',): all bindings of that kind are one
      point of a simplex, drawn evenly; they sum to 1.
    metric: of validation, that is to be small: 'loss', the mean of the objectives' losses
      on masks that no trial changes, or one of them, such as 'loss/blank'.
    startup_trials: that are drawn at random before the sampler looks at results.
    prune: stop trials whose metric is worse than the median of others at the same step.
    seed: of the sampler.
  """

  study_dir: Annotated[str, NOT_EMPTY, LOCAL]
  search: dict[str, tuple[Any, ...]]
  metric: Annotated[str, NOT_EMPTY] = 'loss'
  startup_trials: Annotated[int, at_least(1)] = 5
  prune: bool = True
  seed: Annotated[int, SEED] = 0

  def __post_init__(self):
    configs.check_fields(self)
    name = 'TuneConfig'
    configs.check(
      bool(self.search), f'{name}.search must name a binding', '{}', 'give what to search'
    )
    for binding, dimension in self.search.items():
      kind = dimension[0] if dimension else None
      known = isinstance(kind, str) and kind in _KINDS
      numbers = dimension[1:]
      bounds = known and _KINDS[kind] == 2
      ok = known and (bool(numbers) if kind == 'choice' else len(numbers) == _KINDS[kind])
      if ok and bounds:
        types = (int,) if kind == 'int' else (int, float)
        ok = all(isinstance(n, types) for n in numbers) and numbers[0] < numbers[1]
        ok = ok and (kind != 'log' or numbers[0] > 0)
      configs.check(
        ok,
        f"{name}.search must hold ('float', low, high), ('log', low, high), ('int', low, "
        "high), ('choice', a, b, ...) or ('share',)",
        f'{dimension!r} for {binding}',
        'write it as one of these',
      )
