"""What somebody meant: names and values that are nearly right, and the words that help.

No check depends on this module: it only says more about what was refused already.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

# Names of other programs (Transformers, Megatron, T5X, PyTorch) -> our fields.
_HABITS = {
  'lr': 'learning_rate',
  'max_lr': 'learning_rate',
  'warmup': 'warmup_steps',
  'num_warmup_steps': 'warmup_steps',
  'lr_decay_iters': 'decay_steps',
  'lr_scheduler_type': 'schedule',
  'wd': 'weight_decay',
  'eps': 'epsilon',
  'adam_beta1': 'beta1',
  'adam_beta2': 'beta2',
  'adam_epsilon': 'epsilon',
  'grad_clip': 'clip_norm',
  'clip_grad': 'clip_norm',
  'max_grad_norm': 'clip_norm',
  'batch': 'batch_size',
  'bs': 'batch_size',
  'global_batch_size': 'batch_size',
  'train_batch_size': 'batch_size',
  'gradient_accumulation_steps': 'microbatches',
  'grad_accum': 'microbatches',
  'steps': 'train_steps',
  'max_steps': 'train_steps',
  'num_steps': 'train_steps',
  'train_iters': 'train_steps',
  'total_steps': 'train_steps',
  'epochs': 'train_epochs',
  'num_epochs': 'train_epochs',
  'max_epochs': 'train_epochs',
  'num_train_epochs': 'train_epochs',
  'early_stopping_patience': 'patience',
  'output_dir': 'model_dir',
  'logging_steps': 'log_every',
  'log_interval': 'log_every',
  'save_steps': 'every',
  'eval_steps': 'every',
  'checkpoint': 'init_from',
  'resume_from': 'init_from',
  'pretrained': 'init_from',
  'r': 'rank',
  'lora_r': 'rank',
  'lora_rank': 'rank',
  'lora_alpha': 'alpha',
  'lora_dropout': 'dropout',
  'target_modules': 'targets',
  'use_rslora': 'rank_stabilized',
  'pre_seq_len': 'tokens',
  'num_virtual_tokens': 'tokens',
  'prefix_projection': 'projection',
  'layers': 'num_layers',
  'n_layer': 'num_layers',
  'n_layers': 'num_layers',
  'num_hidden_layers': 'num_layers',
  'depth': 'num_layers',
  'heads': 'num_heads',
  'n_head': 'num_heads',
  'num_attention_heads': 'num_heads',
  'd_model': 'hidden_size',
  'n_embd': 'hidden_size',
  'dim': 'hidden_size',
  'hidden_dim': 'hidden_size',
  'd_ff': 'mlp_size',
  'mlp_dim': 'mlp_size',
  'ffn_hidden_size': 'mlp_size',
  'intermediate_size': 'mlp_size',
  'padded_vocab_size': 'vocab_size',
  'max_position_embeddings': 'max_positions',
  'max_seq_len': 'max_positions',
  'seq_length': 'feature_lengths',
  'sequence_length': 'feature_lengths',
  'precision': 'dtype',
  'bf16': 'dtype',
  'attn_implementation': 'attention',
  'gradient_checkpointing': 'remat',
  'data': 'corpus',
  'dataset': 'corpus',
  'train_file': 'corpus',
  'tokenizer': 'path',
  'alpha': 'blank',
  'beta': 'document',
  'gamma': 'sentence',
}
# Values of macros that a file leaves to its reader.
_EXAMPLES = {
  'MODEL_DIR': "'runs/mine'",
  'STUDY_DIR': "'runs/study'",
  'CORPUS': "'my_text/*.txt'",
  'VOCABULARY': "'vocabulary.model'",
  'INIT_FROM': "'runs/converted'",
  'MIXTURE_OR_TASK_NAME': "'glm_mixture'",
  'TASK_FEATURE_LENGTHS': "{'tokens': 512}",
  'TRAIN_STEPS': '1000',
  'TRAIN_EPOCHS': '2',
  'BATCH_SIZE': '8',
}


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
  """Those that are written like it, whatever the case of their letters.

  Example:
    >>> nearest('glmconfig', ['GLMConfig', 'MeshConfig'])
    ['GLMConfig']
  """
  lower = {other.lower(): other for other in names}
  return [lower[n] for n in difflib.get_close_matches(name.lower(), lower, count)]


def fields_like(kind: str, name: str, kinds: Sequence[type]) -> list[str]:
  """'Class.field' that somebody meant who wrote `kind`.`name`; the likeliest, or none.

  Args:
    kind: the name of a class, which may not exist; '' for any.
    name: of a field that it does not have.
    kinds: the classes that there are.
  """
  fields = {
    k.__name__: [f.name for f in dataclasses.fields(k)]
    for k in kinds
    if dataclasses.is_dataclass(k)
  }
  wanted = _HABITS.get(name.lower(), name.lower())
  having = [k for k, names in fields.items() if wanted in names]
  if kind in having:
    return [f'{kind}.{wanted}']
  if having:  # of a class that is written alike, if one is
    having = [k for k in nearest(kind, fields, 3) if k in having][:1] or having
    return [f'{k}.{wanted}' for k in having[:3]]
  own = nearest(wanted, fields.get(kind, ()))
  if own or not kind:
    return [f'{kind}.{n}' for n in own]
  return [f'{k}.{n}' for k, names in fields.items() for n in nearest(wanted, names)][:1]


def meant(near: Sequence[str], known: Iterable[str]) -> str:
  """The remedy for a name that there is not.

  Example:
    >>> meant(['GLMConfig'], ()), meant([], ['GLMConfig', 'MeshConfig'])
    ('did you mean GLMConfig?', 'known are GLMConfig, MeshConfig.')
  """
  return f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(known)}.'


def example(macro: str) -> str:
  """A flag that sets a macro, as one writes it in a shell.

  Example:
    >>> print(example('MODEL_DIR'), example('TRAIN_STEPS'))
    --gin.MODEL_DIR="'runs/mine'" --gin.TRAIN_STEPS=1000
  """
  return flag(macro, _EXAMPLES.get(macro, '...'))


def flag(name: str, value: str) -> str:
  """A binding for a shell, which takes one pair of quotes away."""
  return (
    f'--gin.{name}="{value}"' if re.search(r'[\'{*(\s]', value) else f'--gin.{name}={value}'
  )


def of_line(line: str, on_command_line: bool) -> tuple[str, str] | None:
  """What is wrong with a binding that gin cannot read, if that is a slip one often makes.

  Args:
    line: the text.
    on_command_line: whether it was a flag, from which the shell took the quotes.

  Returns:
    The rule that it breaks, and the remedy.

  Example:
    >>> of_line('MODEL_DIR = runs/a', False)
    ('a text must stand in quotes', "write MODEL_DIR = 'runs/a'")
  """
  match = re.fullmatch(r'\s*((?:\w+/)*[\w.]*\w)\s*=\s*([^=].*?)?\s*', line, re.DOTALL)
  if not match:
    return None
  name, value = match[1], match[2] or ''
  write = lambda right: (
    f'write {flag(name, right) if on_command_line else f"{name} = {right}"}'
  )
  words = {'true': 'True', 'false': 'False', 'none': 'None', 'null': 'None'}
  if not value:
    return 'a binding must have a value', write(_EXAMPLES.get(name, '...'))
  if value.lower() in words:
    return 'gin takes the values of Python', write(words[value.lower()])
  if re.fullmatch(r'-?\d{1,3}(,\d{3})+', value):
    return 'a number must be one number', write(value.replace(',', ''))
  if re.fullmatch(r'[\d.]+[kKmMgGbB]', value):
    return 'a number must be written out', write('1000')
  if re.fullmatch(r'[-\d_.\s()eE+*/%<>]+', value):
    return 'gin takes values and computes nothing', 'write the number itself'
  if re.match(r'[@%][\w./]+\(.+', value):
    return (
      'a reference must have empty brackets',
      f'write {value.partition("(")[0]}(), and bind each field by itself',
    )
  if value[0] in '{([':
    return (
      'texts in brackets must stand in quotes, and brackets be closed',
      write("{'tokens': 64}" if value[0] == '{' else "('a', 'b')"),
    )
  if value[0] in '\'"' or value[-1] in '\'"':
    return 'a text must stand in one pair of quotes', write("'" + value.strip('\'"') + "'")
  if re.match(r'[\w~./$*-]', value):
    return 'a text must stand in quotes', write(f"'{value}'")
  return None


def without_value(error: str) -> str:
  """What to say of a call that lacks arguments; '' for any other error."""
  match = re.match(
    r'(\w+)\.__init__\(\) missing \d+ required [\w-]+ arguments?: (.*)', error
  )
  if not match:
    return ''
  kind, names = match[1], re.findall(r"'(\w+)'", match[2])
  remedy = f'bind them, such as {kind}.{names[0]} = ...'
  if kind == 'TrainConfig':
    remedy = (
      'a file of gin_configs/models holds sizes alone: start from one that is a whole run, '
      'such as gin_configs/quickstart.gin, or include gin_configs/runs/pretrain.gin as well'
    )
  return f'{kind} must have {", ".join(names)}, got no value; {remedy}.'
