"""TRL's GRPO on what `benchmarks.rollouts` exports.

python -m benchmarks.trl_step FOLDER SIZES

A process of its own, since PyTorch's threads and XLA's would share the cores. SIZES are
those of `benchmarks.rollouts.Steps`, as JSON. Prints the seconds of each step, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from typing import Any

import datasets
import tokenizers
import transformers
import trl


def main(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
  config = transformers.AutoConfig.from_pretrained(folder)
  # Words of one token each.
  words = {f'w{i}': i for i in range(config.vocab_size - 2)}
  words |= {'<pad>': config.vocab_size - 2, '<end>': config.vocab_size - 1}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<pad>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token='<pad>', eos_token='<end>', padding_side='left'
  )
  rng = random.Random(0)
  prompts = [' '.join(rng.choices([*words][:256], k=sizes['asked'])) for _ in range(256)]
  taken: list[float] = []

  class Clock(transformers.TrainerCallback):
    """Rollout, scoring and update are all in a step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
      self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      taken.append(time.perf_counter() - self.began)

  def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [len(set(text)) / max(len(text), 1) for text in completions]

  with tempfile.TemporaryDirectory() as output:
    arguments = trl.GRPOConfig(
      output_dir=output,
      max_steps=sizes['count'],
      per_device_train_batch_size=sizes['batch'],
      num_generations=sizes['group'],
      steps_per_generation=1,
      max_completion_length=sizes['answered'],
      model_init_kwargs={'dtype': 'float32'},
      beta=0.04,
      loss_type='grpo',
      learning_rate=1e-6,
      lr_scheduler_type='constant',
      gradient_checkpointing=False,
      bf16=False,
      use_cpu=True,
      report_to=[],
      save_strategy='no',
      logging_strategy='no',
      disable_tqdm=True,
    )
    trl.GRPOTrainer(
      model=folder,
      reward_funcs=reward,
      args=arguments,
      train_dataset=datasets.Dataset.from_dict({'prompt': prompts}),
      processing_class=tokenizer,
      callbacks=[Clock()],
    ).train()
  versions = {'trl': trl.__version__, 'transformers': transformers.__version__}
  return {'seconds': taken, 'versions': versions}


if __name__ == '__main__':
  print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
