#!/usr/bin/env bash
# From text to an aligned model of 4 bits that one talks to, in about 20 minutes on 2 CPU
# cores: a tiny ChatGLM3 is pretrained on the documentation of this Python, fine-tuned to say
# what functions do, and aligned with a rule, that an answer opens with the verb of the name
# ('add_edge' -> 'Add ...'): by DPO on pairs of answers, by a reward model and PPO, and by
# GRPO on the rule itself; then quantised and asked. At the end stands a table.
# RUNS says where all of it goes (runs/align), BASE which pretrained model to begin with
# (runs/chatglm2_tiny, trained if it is not there), CORPUS other questions of this kind with
# answers (.jsonl), STEPS shortens every stage to so many steps.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
use_venv requirements.txt
runs=${RUNS:-runs/align}
base=${BASE:-}
export PYTHONPATH=launch${PYTHONPATH:+:$PYTHONPATH}

run() {
  echo "+ $*"
  "$@"
}

# stage RUN FILE FROM DATA STEPS BINDINGS...: one run, on what the corpus holds.
stage() {
  local to=$1 file=$2 from=$3 data=$4 steps=$5 bindings=()
  shift 5
  for binding in "$@"; do bindings+=("--gin.$binding"); done
  echo "== $runs/$to: gin_configs/runs/$file.gin, from $from"
  python -m glm_jax.train --gin_file="gin_configs/runs/$file.gin" --import=alignment \
    --gin.INIT_FROM="'$from'" --gin.MODEL_DIR="'$runs/$to'" --gin.BATCH_SIZE=16 \
    --gin.CORPUS="'$runs/${data}_train.jsonl'" \
    --gin.CorpusConfig.validation="'$runs/${data}_validation.jsonl'" \
    --gin.TRAIN_STEPS="${STEPS:-$steps}" --gin.ComputeConfig.dtype="'float32'" \
    --gin.ComputeConfig.remat="'none'" --gin.EvaluationConfig.every=100 \
    --gin.EvaluationConfig.examples=256 "${bindings[@]}"
}

if [[ -z $base ]]; then
  base=runs/chatglm2_tiny
  run python -m glm_jax.train --gin_file=gin_configs/chatglm2_tiny.gin
fi
run python launch/alignment.py data "$runs" "${CORPUS:-documentation:summaries}"

rates=(OptimizerConfig.learning_rate=1e-3 TrainConfig.log_every=50 LossConfig.vocab_chunks=0)
stage sft sft "$base" sft 400 "${rates[@]}" "TASK_FEATURE_LENGTHS={'tokens': 128}"

# By preferences: of two answers, the one that keeps to the rule.
pairs=("${rates[@]}" "TASK_FEATURE_LENGTHS={'tokens': 192}")
stage dpo dpo "$runs/sft" pairs 200 "${pairs[@]}" OptimizerConfig.learning_rate=1e-4 \
  Preference.sft_weight=1.0
stage reward reward "$runs/sft" pairs 400 "${pairs[@]}"

# By rewards of its own answers.
rates=(OptimizerConfig.learning_rate=3e-4 TrainConfig.log_every=20)
rates+=("TASK_FEATURE_LENGTHS={'tokens': 112}")
of() { for binding in max_new_tokens=32 rollout_size=64 show_every=20 chunks=0; do echo "$1.$binding"; done; }
# shellcheck disable=SC2046 # words of `of`: bindings without spaces
# The reward model has not seen answers without an end: one is not to be had from them. The
# rule is only watched.
stage ppo ppo "$runs/sft" sft 160 "${rates[@]}" $(of PPO) BATCH_SIZE=32 PPO.epochs=2 PPO.kl=0.1 \
  PPO.sft_weight=0.2 PPO.unfinished_penalty=5.0 "PPO.reward_model='$runs/reward'" \
  "PPO.rewards={'alignment.opens_with_its_verb': 0.0}"
# shellcheck disable=SC2046
stage grpo grpo "$runs/sft" sft 60 "${rates[@]}" $(of GRPO) BATCH_SIZE=64 \
  "GRPO.rewards={'alignment.opens_with_its_verb': 1.0}"

run python -m glm_jax.quantize "$runs/grpo" "$runs/int4" --bits=4 --group=32
run python launch/alignment.py table "$runs" sft dpo ppo grpo int4
for question in 'What does add_edge(u, v) do?' 'What does load_file(path) do?'; do
  echo "$question"
  echo "$question" | python -m glm_jax.chat --checkpoint="$runs/int4" --max_new_tokens=40
done
echo "Talk to it: python -m glm_jax.chat --checkpoint=$runs/int4"
