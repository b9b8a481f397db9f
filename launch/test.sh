#!/usr/bin/env bash
# Lints and tests. --all adds the slow tests; other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
use_venv requirements.txt launch/requirements/test.txt

chosen=(-m 'not slow')
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then chosen=(); else arguments+=("$argument"); fi
done
echo "+ ruff check ."
ruff check .
echo "+ python -m pytest -n 2 --dist loadfile ${chosen[*]+"${chosen[*]}"} ${arguments[*]+"${arguments[*]}"}"
exec python -m pytest -q -n 2 --dist loadfile "${chosen[@]+"${chosen[@]}"}" \
  "${arguments[@]+"${arguments[@]}"}"
