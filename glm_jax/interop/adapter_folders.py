"""Adapters alone: from folders of other programs into a checkpoint, and out for peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax import checkpoints, configs
from glm_jax.checkpoints import beside, slices, verifying
from glm_jax.interop import peft, prefixes, reward_models
from glm_jax.interop.formats import FORMATS
from glm_jax.models import config as model_config


def bring_in(src: Path, dst: Path, base: str) -> str:
  """Writes a checkpoint of adapters, like that of a run.

  Args:
    src: a folder of peft, or of THUDM's ptuning/main.py.
    dst: a new folder.
    base: the checkpoint that they are for.

  Returns:
    What was read, in words.

  Raises:
    UserError: there are none, or they are of another model.
  """
  folder = checkpoints.find(base)
  meta = checkpoints.read_meta(folder)
  model = model_config.from_dict(meta['model'])
  configs.check(
    not meta.get('adapters'),
    '--base must be the checkpoint that adapters were trained on',
    f'{folder}, which holds adapters itself',
    f'give that, or merge them first: python -m glm_jax.convert {base} DST --to=checkpoint',
  )
  if (src / peft.CONFIG).exists():
    arrays, content = peft.read(src, model)
    tree = 'adapters'
    words = (
      f'LoRA of rank {content["rank"]} for {content["targets"].count("|") + 1} weights'
    )
  else:
    path = prefixes.find(src)
    configs.check(
      path is not None,
      f'SRC must hold {peft.CONFIG}, or transformer.prefix_encoder in pytorch_model.bin',
      str(src),
      'leave --base out for the weights of a model',
    )
    arrays, content = prefixes.read(path, model)
    tree, words = 'prefix', f'{content["tokens"]} virtual tokens'
  leaves = {(tree, *path): array for path, array in arrays.items()}
  specs = {path: slices.LeafSpec(a.shape, a.dtype) for path, a in leaves.items()}
  description = {
    **{name: meta.get(name) for name in ('model', 'vocabulary', 'source')},
    **({'quantized': meta['quantized']} if meta.get('quantized') else {}),
    'step': 0,
    'base': checkpoints.describe(folder),
    'adapters': content,
  }
  size = sum(array.nbytes for array in leaves.values())
  identity = {'files': beside.files_of(src), 'base': description['base']['fingerprint']}
  with beside.written(dst, identity, room=size, total=size, doing='converting') as (
    partial,
    progress,
  ):
    slices.write(partial, specs, lambda path, _: leaves[path], description, progress)
  return words


def take_out(src: Path, dst: Path, format: str | None) -> str:
  """Writes a folder of peft; see `peft.export`.

  Args:
    src: a MODEL_DIR with adapters, or a checkpoint of them.
    dst: a new folder.
    format: of the model that peft puts them on.

  Returns:
    What was written, in words.

  Raises:
    UserError: there are no low-rank factors, or others besides.
  """
  folder = verifying.find(str(src), alone=True)
  meta = checkpoints.read_meta(folder)
  content, source = meta.get('adapters') or {}, meta.get('source') or {}
  model = model_config.from_dict(meta['model'])
  known = [
    name
    for name, form in FORMATS.items()
    if isinstance(model, form.config) and form.container == 'huggingface'
  ]
  configs.check(
    content.get('kind') == 'lora',
    '--peft is for a checkpoint of low-rank factors',
    f'{content.get("kind") or "none"} in {folder}',
    'leave it out, or give the MODEL_DIR of a run with LoRAConfig',
  )
  configs.check(
    format in known,
    f'--peft must say with --to what model the adapters are for, one of {known}',
    f'--to={format}',
    'give the format of that model',
  )
  held = checkpoints.stored_leaves(folder)
  others = [
    '/'.join(path)
    for path in held
    if path[0] != 'adapters' and path[0] not in reward_models.CRITIC
  ]
  configs.check(
    not others,
    'peft is given adapters alone',
    f'{others[:3]} in {folder}, which were trained besides',
    'leave --peft out: a merged model holds all of it',
  )
  factors = _factors(folder)
  size = sum(array.nbytes for array in factors.values())
  prefix = source.get('prefix') if source.get('format') == format else None
  if prefix is None:
    prefix = 'glm.' if format == 'glm-10b' else ''
  with beside.written(
    dst,
    {'files': beside.files_of(Path(folder)), 'to': format},
    room=size,
    total=size,
    doing='converting',
  ) as (partial, _):
    peft.export(partial, factors, content, model, format, prefix, meta['base']['folder'])
  return f'LoRA of rank {content["rank"]} for peft and {format!r}'


def _factors(folder: Any) -> Mapping[tuple[str, ...], np.ndarray]:
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(Path(folder).absolute() / 'params')
  return {path[1:]: np.asarray(array) for path, array in slices.flat(tree).items()}
