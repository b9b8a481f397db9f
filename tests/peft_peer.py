"""peft on an export, in a process of its own: `peft_peer.py MODEL ADAPTERS`.

Reads {"ids": rows, "merged": folder} as JSON; prints the logits with the adapters beside
the model, and merged, as JSON; the merged model is saved in the folder.
"""

import json
import sys


def main(folder, adapters, request):
  import torch
  from peft import PeftModel
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )
  model = PeftModel.from_pretrained(model, adapters).eval()
  ids = torch.tensor(request['ids'])
  with torch.no_grad():
    made = {'beside': model(ids).logits.tolist()}
    merged = model.merge_and_unload()
    made['merged'] = merged(ids).logits.tolist()
  merged.save_pretrained(request['merged'])
  return made


if __name__ == '__main__':
  json.dump(main(*sys.argv[1:], json.load(sys.stdin)), sys.stdout)
