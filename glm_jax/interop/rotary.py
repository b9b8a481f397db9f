"""What a checkpoint does with its `rope_ratio`: one field that two programs read otherwise.

ChatGLM2-6B-32k divides positions by it; ChatGLM3, GLM-4 and what came after multiply the
rotary base. Names and paths tell neither: a copy, a fine-tune or an upload rewrites them.
"""

from __future__ import annotations

import ast
from pathlib import Path

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.interop.files import Source
from glm_jax.text import loading

KEY = 'glm_jax_rope_scaling'
"""Says it in the config.json of an export, since the field alone does not."""

CODE = {
  'theta': ('multiplies the rotary base by', 'ChatGLM3-6B-32k or GLM-4-9B'),
  'positions': ('divides positions by', 'ChatGLM2-6B-32k'),
}
"""For each scaling, what a program does, and whose published code does it."""

_FIELD = 'rope_ratio'


def scaling(source: Source) -> str:
  """'theta' or 'positions', for a ratio other than 1.

  From the surest evidence to the weakest: what an export says of itself, the program that
  came with the weights, and the vocabulary, which is of one or the other model.

  Raises:
    UserError: nothing in the folder tells.
  """
  said = source.config.get(KEY)
  if said is not None:
    configs.check(
      isinstance(said, str) and said in CODE,
      f"{KEY} in {source.folder / 'config.json'} must be 'theta' or 'positions'",
      repr(said),
      'write what the model was trained with',
    )
    return said
  found = _of_program(source.folder) or _of_vocabulary(source.folder)
  if found is None:
    raise UserError(
      f'a {_FIELD} must multiply the rotary base (ChatGLM3, GLM-4) or divide positions '
      f'(ChatGLM2-6B-32k), got {source.config.get(_FIELD)!r} in '
      f'{source.folder / "config.json"} and no file beside it that tells which; fetch the '
      'modeling_chatglm.py of this model, or give --set rope_scaling=theta or --set '
      'rope_scaling=positions.'
    )
  return found


def _of_program(folder: Path) -> str | None:
  """What the published code computes; it is read and never run."""
  does = set()
  for path in sorted(folder.glob('modeling_*.py')):
    try:
      tree = ast.parse(path.read_text(encoding='utf-8', errors='replace'))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      continue  # of another version of Python, or no program: it tells nothing
    for node in ast.walk(tree):
      if not isinstance(node, ast.BinOp):
        continue
      if isinstance(node.op, ast.Div) and _is_ratio(node.right):
        does.add('positions')
      if isinstance(node.op, ast.Mult) and (_is_ratio(node.left) or _is_ratio(node.right)):
        does.add('theta')
  return does.pop() if len(does) == 1 else None


def _is_ratio(node: ast.expr) -> bool:
  """`rope_ratio`, `self.rope_ratio`, `config.rope_ratio`."""
  return _FIELD in (getattr(node, 'id', None), getattr(node, 'attr', None))


def _of_vocabulary(folder: Path) -> str | None:
  """GLM-4's vocabulary, ChatGLM3's roles, or ChatGLM2's lack of them."""
  kind = loading.kind_of_chatglm(folder)
  return {'chatglm2': 'positions', 'chatglm3': 'theta', 'glm4': 'theta'}.get(kind or '')
