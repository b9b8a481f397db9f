"""An evaluation by PyTorch alone, in a process of its own: `evaluation_peer.py FOLDER`.

Reads a request as JSON, with texts, passages and choices; prints what transformers and the
tokenizer of an export make of them: the sum over windows of `length` tokens, that of each
last word and whether it is the greedy one, and those of the letters behind a question.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder, request):
  tokenizer = AutoTokenizer.from_pretrained(folder)
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  opens = tokenizer('').input_ids
  ids_of = lambda text: tokenizer(text).input_ids[len(opens) :]

  @torch.no_grad()
  def said(ids):
    """Log-probabilities of the tokens behind the first, and which are the largest."""
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(ids[1:])
    chosen = scores.gather(-1, targets[:, None])[:, 0]
    return chosen.tolist(), (scores.argmax(-1) == targets).tolist()

  nll = tokens = 0
  for text in request['texts']:
    ids, done = ids_of(text), 0
    room = request['length'] - len(opens) + 1
    while done < len(ids):
      end = min(len(ids), done + request['stride'] if done else room)
      log_probs, _ = said([*opens, *ids[max(0, end - room) : end]])
      nll -= sum(log_probs[len(log_probs) - (end - done) :])
      tokens, done = tokens + end - done, end
  words = []
  for passage in request['passages']:
    count = len(ids_of(passage)) - len(ids_of(passage.rpartition(' ')[0]))
    log_probs, best = said(tokenizer(passage).input_ids)
    words.append([sum(log_probs[-count:]), all(best[-count:])])
  letters = []
  for question, answers in request['choices']:
    count = len(tokenizer(question).input_ids)
    both = [tokenizer(question + answer).input_ids for answer in answers]
    letters.append([sum(said(ids)[0][count - 1 :]) for ids in both])
  return {'nll': nll, 'tokens': tokens, 'words': words, 'letters': letters}


if __name__ == '__main__':
  json.dump(main(sys.argv[1], json.load(sys.stdin)), sys.stdout)
