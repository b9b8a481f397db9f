"""transformers on an export, in a process of its own: `transformers_peer.py FOLDER`.

Its compiler and TensorFlow's do not bear each other in one process. Reads a request as
JSON: {"ids": rows, "prompts": rows, "texts": strings, "new": tokens}; prints what the model
makes of it as JSON. With "names", only the tokenizer is read, with the code beside it: its
class, its ids of the texts, and those of pieces by these names. With "chats", too: its ids
of [messages, tools or null, whether an answer is to follow]. With "scored", conversations:
the class of a reward model, its ids, and its scores of them one by one, and padded together
on either side.
"""

import json
import sys


def main(folder, request):
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  if 'scored' in request:
    return scored(folder, request['scored'])
  if 'chats' in request:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
      tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=opening, return_dict=False
      )
      for messages, tools, opening in request['chats']
    ]
  if 'names' in request:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return {
      'class': type(tokenizer).__name__,
      'tokens': [tokenizer(text).input_ids for text in request['texts']],
      'names': tokenizer.convert_tokens_to_ids(request['names']),
    }
  model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  made = {
    'class': type(model).__name__,
    'stops': model.generation_config.eos_token_id,
    'generated': [
      model.generate(
        torch.tensor([prompt]), max_new_tokens=request['new'], do_sample=False
      )[0, len(prompt) :].tolist()
      for prompt in request.get('prompts', ())
    ],
  }
  if 'ids' in request:
    with torch.no_grad():
      made['logits'] = model(torch.tensor(request['ids'])).logits.tolist()
  if 'texts' in request:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in request['texts']]
    made |= {
      'tokens': ids,
      'decoded': [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
      'padding': [tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id],
    }
    if 'new' in request:
      made['continued'] = [
        tokenizer.decode(
          model.generate(
            torch.tensor([row]), max_new_tokens=request['new'], do_sample=False
          )[0],
          skip_special_tokens=True,
        )
        for row in ids
        if row
      ]
  return made


def scored(folder, conversations):
  import torch
  from transformers import AutoModelForSequenceClassification, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(folder)
  model, loading = AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
  )
  model = model.eval()
  rows = tokenizer.apply_chat_template(conversations, return_dict=False)
  made = {
    'class': type(model).__name__,
    'loading': {name: [*map(str, found)] for name, found in loading.items()},
    'ids': rows,
  }
  with torch.no_grad():
    made['alone'] = [model(torch.tensor([row])).logits.tolist() for row in rows]
    for side in ('left', 'right'):
      batch = tokenizer.pad({'input_ids': rows}, padding_side=side, return_tensors='pt')
      made[side] = model(**batch).logits.tolist()
  return made


if __name__ == '__main__':
  json.dump(main(sys.argv[1], json.load(sys.stdin)), sys.stdout)
