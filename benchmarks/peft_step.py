"""peft and transformers on what `benchmarks.adapters` exports.

python -m benchmarks.peft_step FOLDER

A process of its own, since PyTorch's threads and XLA's would share the cores. Prints the
losses, and the seconds a step, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from glm_jax import startup


def main(folder: Path) -> dict[str, list[float]]:
  model = AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.float32)
  if (folder / 'peft').exists():  # else all parameters are trained
    model = PeftModel.from_pretrained(model, folder / 'peft', is_trainable=True)
  model.train()
  own = [p for p in model.parameters() if p.requires_grad]
  how = json.loads((folder / 'optimizer.json').read_text())
  clip = how.pop('clip')
  optimizer = torch.optim.AdamW(own, weight_decay=0.0, fused=True, **how)
  result: dict[str, list[float]] = {'losses': [], 'seconds': []}
  for rows in torch.from_numpy(np.load(folder / 'tokens.npy')).long():
    began = time.perf_counter()
    logits = model(rows[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(own, clip)
    optimizer.step()
    optimizer.zero_grad()
    result['losses'].append(float(loss))
    result['seconds'].append(time.perf_counter() - began)
  return result


if __name__ == '__main__':
  startup.keep_memory()  # as ours does
  json.dump(main(Path(sys.argv[1])), sys.stdout)
