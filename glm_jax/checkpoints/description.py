"""`meta` of a checkpoint: what it says of itself, with digests of all that it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from glm_jax import configs, storage
from glm_jax.checkpoints import digests
from glm_jax.checkpoints.damage import Damaged, unreadable

FORMAT = 1
_DIGESTS, _OWN = 'digests', 'sha256'
# What others may have written in the place of it is told here, once for all readers.
_KINDS = {
  **dict.fromkeys(('model', _DIGESTS), dict),
  **dict.fromkeys(('vocabulary', 'source', 'base', 'adapters', 'quantized'), dict | None),
  'step': int,
}


class Description(dict):
  """The description of a checkpoint, as JSON has it; `folder` is that of the checkpoint."""

  folder: Any = None

  def __missing__(self, name: str) -> Any:
    raise Damaged(self.folder, f'meta has no {name!r}')

  def digests(self, item: str) -> digests.Digests | None:
    """Of the arrays of an item such as 'params'; None for a checkpoint from before."""
    return self[_DIGESTS].get(item, {}) if _DIGESTS in self else None

  @property
  def items_with_digests(self) -> list[str]:
    """Items of arrays that it was saved with."""
    return sorted(self.get(_DIGESTS, {}))


def sealed(meta: Mapping[str, Any], items: Mapping[str, digests.Digests]) -> dict[str, Any]:
  """What is written: a description, the digests of its items, and a hash of it all."""
  own = (_DIGESTS, _OWN)  # of a description that was read and is written anew
  content = {k: v for k, v in meta.items() if k not in own}
  content = json.loads(json.dumps({'format': FORMAT, **content, _DIGESTS: dict(items)}))
  return {**content, _OWN: digests.of_json(content)}


def read_meta(folder: epath.Path) -> Description:
  """The description that a checkpoint carries.

  Raises:
    UserError: unreadable, not as it was written, or of another format version.
  """
  # Orbax's reader would take JSON of any depth.
  with unreadable(folder, 'meta'):
    with (storage.absolute(folder) / 'meta' / 'metadata').open('rb') as file:
      meta = configs.parse_json(file.read(configs.LARGEST_JSON + 1))
  if not isinstance(meta, dict):
    raise Damaged(folder, 'meta is no JSON object')
  whole = {k: v for k, v in meta.items() if k != _OWN}
  # Those from before have neither; one flipped bit does not make both names others.
  if (_DIGESTS in meta or _OWN in meta) and digests.of_json(whole) != meta.get(_OWN):
    raise Damaged(folder, 'meta is not as it was written')
  configs.check(
    meta.get('format') == FORMAT,
    f'checkpoints of format {FORMAT} are read',
    f'format {meta.get("format")!r} in {folder}',
    'use the version that wrote it',
  )
  for name, kind in _KINDS.items():
    if name in meta and not isinstance(meta[name], kind):
      raise Damaged(folder, f'meta has another {name!r} than checkpoints have')
  if any(not isinstance(sums, dict) for sums in meta.get(_DIGESTS, {}).values()):
    raise Damaged(folder, 'meta has no digests by array')
  if meta.get('base') and not isinstance(meta['base'].get('folder'), str):
    raise Damaged(folder, 'meta names no base')
  result = Description(meta)
  result.folder = folder
  return result
