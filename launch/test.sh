#!/usr/bin/env bash
# Lints and tests. --all adds the slow tests, and PyTorch, transformers, Apache Beam and
# the compilers for TPUs and GPUs for them (gigabytes); other arguments go to pytest.
# What XLA compiled is kept in ${XDG_CACHE_HOME:-~/.cache}/glm_jax/tests for the next time.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

chosen=(-m 'not slow')
extras=()
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then
    chosen=()
    extras=(launch/requirements/{torch,peers,compilers,beam}.txt)
  else
    arguments+=("$argument")
  fi
done
use_venv requirements.txt launch/requirements/test.txt "${extras[@]+"${extras[@]}"}"
if [[ ${#extras[@]} -gt 0 ]]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps \
    -r launch/requirements/vocabularies.txt
fi
echo "+ ruff check ."
ruff check .
echo "+ python -m pytest -n 2 --dist worksteal ${chosen[*]+"${chosen[*]}"} ${arguments[*]+"${arguments[*]}"}"
exec python -m pytest -q -n 2 --dist worksteal "${chosen[@]+"${chosen[@]}"}" \
  "${arguments[@]+"${arguments[@]}"}"
