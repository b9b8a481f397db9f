"""Which parameters a run trains; the others stay as they were when it began."""

from __future__ import annotations

import re
from typing import Any

from flax import traverse_util

from glm_jax import configs


def split(params: Any, pattern: str | None, always: Any = ()) -> tuple[Any, Any]:
  """Parameters that are trained, and those that are frozen.

  Args:
    params: a nested dict.
    pattern: of paths, matched whole; '' for all of them, None for none. Layers are
      stacked, so that a path such as 'layers/attention/q/weight' names that of every
      layer.
    always: names of trees that are trained whatever the pattern: a recipe's leaves, and
      adapters.

  Raises:
    UserError: it matches nothing.

  Example:
    >>> split({'words': {'weight': 1}, 'norm': {'scale': 2, 'bias': 3}}, 'norm/.*')
    ({'norm': {'scale': 2, 'bias': 3}}, {'words': {'weight': 1}})
  """
  if pattern == '':
    return params, {}
  flat = traverse_util.flatten_dict(params, sep='/')
  matching = {path for path in flat if pattern and re.fullmatch(pattern, path)}
  configs.check(
    bool(matching) or pattern is None,
    'TrainConfig.trained must match paths of parameters',
    f'{pattern!r}, and there are {", ".join(sorted(flat))}',
    "write one that matches, such as 'layers/attention/.*'",
  )
  chosen = {k for k in flat if k in matching or k.split('/')[0] in always}
  parts = ({k: flat[k] for k in flat if (k in chosen) == own} for own in (True, False))
  trained, frozen = (traverse_util.unflatten_dict(part, sep='/') for part in parts)
  return trained, frozen


def merge(trained: Any, frozen: Any) -> Any:
  """The inverse of `split`.

  Example:
    >>> merge({'norm': {'scale': 2}}, {'norm': {'bias': 3}, 'words': {'weight': 1}})
    {'norm': {'scale': 2, 'bias': 3}, 'words': {'weight': 1}}
  """
  if not frozen:
    return trained
  flat = {
    **traverse_util.flatten_dict(trained, sep='/'),
    **traverse_util.flatten_dict(frozen, sep='/'),
  }
  return traverse_util.unflatten_dict(flat, sep='/')
