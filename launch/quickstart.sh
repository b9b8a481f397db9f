#!/usr/bin/env bash
# Trains a small GLM on the documentation of this Python: environment, corpus,
# vocabulary, training, results. Arguments are handed on to the training command.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
use_venv requirements.txt
command=(python -m glm_jax.train --gin_file=gin_configs/quickstart.gin "$@")
echo "+ ${command[*]}"
exec "${command[@]}"
