"""Converts released weights into a checkpoint of this package, and back.

The phases, in order: what SRC is, what DST becomes, checks (vocabulary, room on the
disk), writing beside DST, and the renaming that makes it DST. An interrupted conversion
goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from glm_jax import cli, configs
from glm_jax.checkpoints import beside, slices, verifying
from glm_jax.interop import (
  files,
  hub,
  integers,
  leaves,
  reward_models,
  rotary,
  tokenizer_files,
)
from glm_jax.interop.formats import FORMATS, WITH_INTEGERS
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary

DTYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
_CHECKPOINT = 'checkpoint'
# The format by family, for a model that was not converted from a released one.
_DEFAULTS = {'glm': 'megatron', 'chatglm': 'chatglm', 'chatglm2': 'glm', 'glm4': 'glm4'}


class Model(NamedTuple):
  """What is converted.

  Attributes:
    config: of the model.
    leaves: its parameters.
    vocabulary: None where SRC has none.
    source: what it was converted from: format, config.json, parts, prefix,
      repeats_head, buffers, chat_template; empty for a model that was trained from the
      start.
    step: training steps behind a checkpoint; 0 for a released model.
    quantized: bits and group of its integers; None for plain weights.
    adapted: the checkpoint whose adapters are to be merged; None for one without.
  """

  config: Any
  leaves: leaves.Leaves
  vocabulary: Vocabulary | None
  source: dict[str, Any]
  step: int
  quantized: dict[str, int] | None
  adapted: slices.StoredLeaves | None = None


def convert(flags: argparse.Namespace) -> None:
  """The command.

  Args:
    flags: src, dst, to, set, dtype, dequantize, vocabulary, parts, shard_size, base, peft.

  Raises:
    UserError: anything about the files that a user can mend.
    ResourceError: no room.
  """
  began = time.perf_counter()
  paths = {'SRC': flags.src, 'DST': flags.dst, '--vocabulary': flags.vocabulary}
  paths['--base'] = flags.base
  for name, path in paths.items():
    configs.check_value(name, path, configs.LOCAL)
  configs.check_value('--shard_size', flags.shard_size, configs.within('(0, 1e6]'))
  src, dst = Path(flags.src), Path(flags.dst)
  beside.check_free(dst)
  if flags.base or flags.peft:
    return _adapters(src, dst, flags)

  # What SRC is: a MODEL_DIR holds `checkpoints`, one checkpoint of it `params`; beside
  # released weights, folders of these names are somebody's own.
  is_checkpoint = any((src / name).exists() for name in ('checkpoints', 'params'))
  is_checkpoint = is_checkpoint and not any((src / name).exists() for name in files.FILES)
  configs.check(
    not (is_checkpoint and flags.set),
    '--set is for checkpoints of other programs',
    str(flags.set),
    'leave it out',
  )
  model = _read_checkpoint(src) if is_checkpoint else _read_foreign(src, flags)
  dtype = DTYPES[flags.dtype] if flags.dtype else None
  if flags.dequantize:
    configs.check(
      model.quantized is not None,
      '--dequantize is for weights that are integers',
      f'{flags.src}, which has plain ones',
      'leave it out',
    )
    plain = integers.Dequantized(model.leaves, dtype)
    model = model._replace(leaves=plain, quantized=None)
  if model.adapted is not None:
    model = model._replace(leaves=slices.Merged(model.leaves, model.adapted))
  if flags.vocabulary:
    model = model._replace(vocabulary=loading.load(flags.vocabulary))
  if model.vocabulary is not None:
    pieces, rows = model.vocabulary.size, model.config.vocab_size
    configs.check(
      # Tables are rounded up, by 520 rows at most in the released models; a corpus may
      # have had fewer pieces than a small model of one's own has rows.
      pieces <= rows <= max(2 * pieces, pieces + 2048),
      "the vocabulary must fit the model's embedding table",
      f'{pieces} pieces ({model.vocabulary.kind}) and {rows} rows',
      'give the right one with --vocabulary=KIND:PATH',
    )

  # What DST becomes.
  target = flags.to or (_default_format(model) if is_checkpoint else _CHECKPOINT)
  name, held = model_config.to_dict(model.config)['family'], model.leaves.specs
  if target != _CHECKPOINT:
    configs.check(
      FORMATS[target].config is type(model.config),
      f'a model of the family {name!r} can be exported to one of '
      f'{[k for k, v in FORMATS.items() if v.config is type(model.config)]}',
      repr(target),
      'choose one of these',
    )
    held = reward_models.exported(target, model.config, held)
    _check_integers(model, target)
    if FORMATS[target].container == 'huggingface':
      hub.check(target, model.config, model.source, model.vocabulary)
  # mp_rank_* files; each is put together from a copy of what goes into it.
  in_parts = target != _CHECKPOINT and FORMATS[target].container == 'megatron'
  parts = flags.parts or (model.source.get('parts', 1) if in_parts else 1)
  configs.check(
    parts >= 1 and (parts == 1 or in_parts),
    "--parts must be 1 or more, and is for the formats 'megatron' and 'glm-130b'",
    f'{parts} for {target!r}',
    'leave it out',
  )
  specs = slices.cast(held, dtype)
  count = slices.count(specs)
  size = sum(spec.nbytes for spec in specs.values())
  if target != _CHECKPOINT:
    # For its check alone: it raises for sizes that the parts do not divide.
    FORMATS[target].entries(model.config, parts)

  # Writing, beside DST.
  with beside.written(
    dst,
    _identity(src, flags, target, model),
    # In parts, the scratch files of one part are there beside its .pt file.
    room=size + (-(-size // parts) if in_parts else 0),
    total=size,
    doing='converting',
  ) as (partial, progress):
    if target == _CHECKPOINT:
      _write_checkpoint(partial, model, dtype, progress)
    else:
      _write_foreign(partial, model, target, dtype, parts, flags.shard_size, progress)

  vocabulary = (
    'no vocabulary'
    if model.vocabulary is None
    else f'vocabulary {model.vocabulary.kind} of {model.vocabulary.size:,}'
  )
  if left_out := [path for path in model.leaves.specs if path not in specs]:
    print(f'left out, which such a model has not: {", ".join(map("/".join, left_out))}')
  if target in hub.OWN_CODE:
    print('copy the .py files of the released model beside it for transformers to read it')
    if getattr(model.config, 'rope_ratio', 1) != 1:
      does, of = rotary.CODE[model.config.rope_scaling]
      print(f'  those of {of}, whose code {does} rope_ratio')
    if model.vocabulary and model.vocabulary.kind not in tokenizer_files.CLASSES:
      print(
        f'  none of them reads a vocabulary of the kind {model.vocabulary.kind!r}: '
        'AutoTokenizer would give other ids'
      )
  print(
    f'{target}: {count:,} parameters, {size / 1e9:.2f} GB, {vocabulary}, in {dst} '
    f'({time.perf_counter() - began:.0f} s)'
  )


def _read_checkpoint(src: Path) -> Model:
  # Imported late: `--help` and refusals need not wait for the libraries behind it.
  from glm_jax import checkpoints, opening

  folder = verifying.find(str(src))
  meta = checkpoints.read_meta(folder)
  vocabulary, stored = meta['vocabulary'], slices.StoredLeaves(folder)
  config = model_config.from_dict(meta['model'])
  opening.check_shapes(config, stored.specs, folder)
  return Model(
    config,
    stored,
    loading.from_dict(vocabulary) if vocabulary else None,
    meta.get('source') or {},
    int(meta.get('step', 0)),
    meta.get('quantized'),
    stored if stored.adapted else None,
  )


def _adapters(src: Path, dst: Path, flags: argparse.Namespace) -> None:
  """Adapters alone, from other programs or for them."""
  from glm_jax.interop import adapter_folders

  others = ['set', 'dtype', 'dequantize', 'vocabulary', 'parts']
  given = [f'--{name}' for name in others if getattr(flags, name)]
  configs.check(
    not given and bool(flags.base) != flags.peft and not (flags.base and flags.to),
    'adapters alone are read with --base, or written with --peft and --to',
    f'{given or "--base and --peft or --to"} besides',
    'leave it out',
  )
  if flags.base:
    words = adapter_folders.bring_in(src, dst, flags.base)
  else:
    words = adapter_folders.take_out(src, dst, flags.to)
  print(f'{words}, in {dst}')


def _read_foreign(src: Path, flags: argparse.Namespace) -> Model:
  from glm_jax import opening
  from glm_jax.checkpoints import variables

  source, recognised, foreign = opening.foreign(src, _overrides(flags.set))
  of_integers = variables.of_channels(recognised.bits)
  vocabulary = None
  if not flags.vocabulary:
    vocabulary = loading.find(src, recognised.format, recognised.config.vocab_size)
  print(f'{src}: {FORMATS[recognised.format].describes}; {len(source.parts)} part(s)')
  for line in recognised.assumed:
    print(f'  {line}')
  origin = {
    # Kept in the checkpoint: an export in the same format gives the same files again.
    'format': recognised.format,
    'config': source.config,
    'parts': len(source.parts),
    'prefix': recognised.prefix,
    'repeats_head': recognised.repeats_head,
    'buffers': foreign.buffers(),
    'chat_template': tokenizer_files.read_template(src),
  }
  return Model(recognised.config, foreign, vocabulary, origin, 0, of_integers)


def _check_integers(model: Model, target: str) -> None:
  """Raises UserError for integers in a format that has none, or none such."""
  if model.quantized is None:
    return
  group = model.quantized['group']
  configs.check(
    target in WITH_INTEGERS and not group,
    f'integers are exported to {WITH_INTEGERS}, with one scale for each output',
    f'--to={target}' + (f', and groups of {group}' if group else ''),
    '--dequantize gives plain weights',
  )
  sizes = {name: getattr(model.config, name) for name in ('hidden_size', 'inner_size')}
  configs.check(
    model.quantized['bits'] == 8 or not any(size % 2 for size in sizes.values()),
    f'the format {target!r} packs two columns of a weight into a byte',
    f'a model of {sizes}',
    'quantise it with --bits=8, or --dequantize',
  )


def _write_checkpoint(folder: Path, model: Model, dtype: Any, progress: Any) -> None:
  specs = slices.cast(model.leaves.specs, dtype)

  def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
    return model.leaves.read(path, layer).astype(specs[path].dtype, copy=False)

  meta = {
    'model': model_config.to_dict(model.config),
    'vocabulary': model.vocabulary and model.vocabulary.to_dict(),
    'source': model.source,
    'step': model.step,
    **({'quantized': model.quantized} if model.quantized else {}),
  }
  slices.write(folder, specs, read, meta, progress)


def _write_foreign(
  folder: Path, model: Model, target: str, dtype, parts: int, shard_size: float, progress
) -> None:
  # Back in the format that it came from, the files are the original's; else the usual ones.
  same = model.source.get('format') == target
  prefix = model.source.get('prefix') if same else ('glm.' if target == 'glm-10b' else '')
  # ChatGLM-6B's files hold a tied head twice.
  repeats = model.source.get('repeats_head') if same else target == 'chatglm'
  scores = reward_models.is_reward_model(model.leaves.specs)
  tied = getattr(model.config, 'tied_head', False) and not scores

  def tensors(rank: int) -> list[leaves.Foreign]:
    return list(
      leaves.foreign_tensors(
        model.leaves,
        target,
        model.config,
        rank=rank,
        parts=parts,
        prefix=prefix or '',
        repeats_head=bool(repeats and tied),
        dtype=dtype,
        buffers=model.source.get('buffers') if same else None,
      )
    )

  if FORMATS[target].container == 'megatron':
    leaves.write_megatron(
      folder, str(model.step), [tensors(i) for i in range(parts)], progress
    )
    if model.vocabulary is not None:
      tokenizer_files.write_vocabulary(folder, model.vocabulary)
    return
  exported = tensors(0)
  leaves.write_shards(folder, leaves.shards(exported, int(shard_size * 2**30)), progress)
  # config.json names one dtype: that of the weights, whatever small tensors have; beside
  # integers, that of the embedding.
  plain = [tensor for tensor in exported if tensor.dtype != np.int8]
  kind = max(plain, key=lambda tensor: tensor.nbytes).dtype.name
  bits = model.quantized['bits'] if model.quantized else 0
  hub.write_config(
    folder, target, model.config, model.source, kind, model.vocabulary, bits, scores
  )


def _default_format(model: Model) -> str:
  family = model_config.to_dict(model.config)['family']
  if getattr(model.config, 'sandwich_norms', False):
    family = 'glm4'
  return model.source.get('format') or _DEFAULTS[family]


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
  overrides = {}
  for assignment in assignments:
    name, equals, value = assignment.partition('=')
    configs.check(
      bool(equals and name), '--set must be FIELD=VALUE', repr(assignment), 'write it so'
    )
    try:
      overrides[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      overrides[name] = value  # a word, such as float16
  return overrides


def _identity(src: Path, flags: argparse.Namespace, target: str, model: Model) -> dict:
  """What must be the same for an interrupted conversion to go on."""
  fingerprint = model.vocabulary and model.vocabulary.fingerprint
  # Without paths: SRC is known by its files.
  options = {k: v for k, v in vars(flags).items() if k not in ('src', 'dst')}
  return {
    'files': beside.files_of(src),
    'to': target,
    'vocabulary': fingerprint,
    'flags': options,
  }


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  # In host memory: accelerators are left to whoever trains on them.
  jax.config.update('jax_platforms', 'cpu')
  convert(flags)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'convert',
    'Converts the weights of released models into a checkpoint, and back.',
    'python -m glm_jax.convert chatglm3-6b/ runs/chatglm3\n'
    '  python -m glm_jax.convert runs/mine exported/ --to=glm --dtype=bfloat16\n\n'
    'formats:\n' + '\n'.join(f'  {k:<10} {v.describes}' for k, v in FORMATS.items()),
  )
  flags.add_argument('src', metavar='SRC', help='a released model, or a MODEL_DIR')
  flags.add_argument('dst', metavar='DST', help='a folder that does not exist yet')
  flags.add_argument(
    '--to',
    choices=(_CHECKPOINT, *FORMATS),
    metavar='FORMAT',
    help='by default a checkpoint from released weights; from a checkpoint, the format '
    "that it came from, else 'glm', or 'glm4' for its norms",
  )
  flags.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='a field of the model configuration that the files do not say, such as '
    'num_heads=16; may be repeated',
  )
  flags.add_argument(
    '--dtype',
    choices=tuple(DTYPES),
    help='cast the weights, or the scales of integers; by default they stay',
  )
  flags.add_argument(
    '--dequantize', action='store_true', help='give plain weights instead of integers'
  )
  flags.add_argument(
    '--base',
    default='',
    metavar='DIR',
    help='SRC holds adapters for this checkpoint, of peft (LoRA) or of ptuning/main.py: '
    'make a checkpoint of them',
  )
  flags.add_argument(
    '--peft',
    action='store_true',
    help="write a run's adapters alone, for peft to put on a model of the format --to; "
    'without it they are merged',
  )
  flags.add_argument(
    '--vocabulary',
    default='',
    metavar='KIND:PATH',
    help=f'instead of what SRC holds; KIND is one of {", ".join(loading.KINDS[2:])}',
  )
  flags.add_argument(
    '--parts', type=int, default=0, metavar='N', help='mp_rank_* files to write (1)'
  )
  flags.add_argument(
    '--shard_size', type=float, default=1.0, metavar='GB', help='of .safetensors files (1)'
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
