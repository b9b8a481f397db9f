"""What align_quickstart.sh needs besides commands: its data, its reward, its table.

  python launch/alignment.py data runs/align documentation:summaries
  python launch/alignment.py table runs/align sft dpo ppo grpo int4

The rule that models are aligned with can be checked: what says what a function does opens
with the verb of its name, so that `add_edge` is answered with 'Add ...'. Of what people
wrote, a half keeps to it. Pairs of answers differ in that, and not in their length.
"""

import argparse
import collections
import json
import random
import re
from pathlib import Path

# As many questions of each, so that no answer is right for more than one in twelve.
VERBS = ('get', 'set', 'add', 'create', 'check', 'load', 'read', 'write', 'remove')
VERBS += ('update', 'parse', 'convert')
# Questions of a verb in each split.
_MOST = {'train': 600, 'validation': 40}
# Held-out questions that the table is over.
_ASKED = 200


def verb(prompt: str) -> str:
  """Of the function that is asked about.

  Example:
    >>> verb('What does _add_edge(u, v) do?'), verb('What does readLine() do?')
    ('add', 'read')
  """
  found = re.match(r'What does _*([A-Za-z][a-z]*)', prompt)
  return found[1].lower() if found else ''


def opens_with_its_verb(prompts, completions, **_):
  """The reward: 1 for an answer that keeps to the rule, 0 for any other."""
  pairs = zip(prompts, completions, strict=True)
  return [float(said.lower().startswith(verb(prompt))) for prompt, said in pairs]


def write_data(folder: Path, corpus: str) -> None:
  """Questions with answers, and pairs of answers, of each split, as .jsonl."""
  from glm_jax.data.corpora import corpus as corpora
  from glm_jax.data.corpora.config import CorpusConfig

  config, rng = CorpusConfig(corpus=corpus, conversations='chatglm3'), random.Random(0)
  for split, most in _MOST.items():
    by_verb = collections.defaultdict(list)
    for document in corpora.documents(config, split):
      question, answer = (message.content for message in document.messages)
      by_verb[verb(question)].append((question, answer))
    chosen = {
      name: rng.sample(by_verb[name], min(most, len(by_verb[name]))) for name in VERBS
    }
    sft = [pair for name in VERBS for pair in chosen[name]]
    if not sft:
      raise SystemExit(
        'error: the corpus must hold questions such as "What does add_edge(u, v) do?", '
        f'got none in {corpus!r}; give others, or leave CORPUS out.'
      )
    pairs = []
    for name in VERBS:
      others = [text for other in VERBS if other != name for _, text in chosen[other]]
      for question, answer in chosen[name]:
        # Of as many words: length says nothing.
        worse = [
          text
          for text in others
          if len(text.split()) == len(answer.split()) and not text.lower().startswith(name)
        ]
        if answer.lower().startswith(name) and worse:
          pairs.append((question, answer, rng.choice(worse)))
    for kind, names, rows in (
      ('sft', ('prompt', 'response'), sft),
      ('pairs', ('prompt', 'chosen', 'rejected'), pairs),
    ):
      rng.shuffle(rows)
      lines = [json.dumps(dict(zip(names, row, strict=True))) + '\n' for row in rows]
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f'{kind}_{split}.jsonl').write_text(''.join(lines), encoding='utf-8')
      print(f'{kind}_{split}.jsonl: {len(rows):,} lines')


def print_table(folder: Path, runs: list[str]) -> None:
  """What each run answers to held-out questions, as Markdown; also in table.md."""
  import numpy as np

  import glm_jax
  from glm_jax.inference.candidates import Asked
  from glm_jax.inference.prompts import request
  from glm_jax.text import chat

  lines = (folder / 'sft_validation.jsonl').read_text(encoding='utf-8').splitlines()
  held_out = [json.loads(line) for line in lines[:_ASKED]]
  prompts = [line['prompt'] for line in held_out]
  table = [
    f'| run | opens with its verb (of {len(held_out)}) | loss of what people wrote '
    f'| {prompts[0]} |',
    '|---|---|---|---|',
  ]
  for run in runs:
    model = glm_jax.load(folder / run, batch_size=32)
    asked = [[{'role': 'user', 'content': prompt}] for prompt in prompts]
    # Sampled, as policies were.
    said = [a for [a] in model.reply(asked, max_new_tokens=40, temperature=1.0)]
    template, questions = chat.template_for(model.vocabulary), []
    for line in held_out:
      messages = [
        chat.Message('user', line['prompt']),
        chat.Message('assistant', line['response']),
      ]
      ids, scored = template.encode_masked(messages)
      first = scored.index(True)
      context = request(model.config, model.vocabulary, 0, ids[:first])
      questions.append(Asked(context, [ids[first:-1]]))
    found = [model.reader(questions[i : i + 32]) for i in range(0, len(questions), 32)]
    losses = np.concatenate([-one.log_probs[:-1] for part in found for [one] in part])
    rewards = opens_with_its_verb(prompts, said)
    shown = ' '.join(said[0].split()).replace('|', '\\|')
    table.append(f'| {run} | {np.mean(rewards):.0%} | {losses.mean():.3f} | {shown} |')
  text = '\n'.join(table)
  (folder / 'table.md').write_text(text + '\n', encoding='utf-8')
  print(text)


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument('what', choices=('data', 'table'))
  flags.add_argument('folder', type=Path)
  flags.add_argument('rest', nargs='*', help='the corpus, or runs in the folder')
  given = flags.parse_args()
  if given.what == 'data':
    write_data(given.folder, *given.rest)
  else:
    print_table(given.folder, given.rest)


# Processes that read sources begin with this file, too.
if __name__ == '__main__':
  main()
