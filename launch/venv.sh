# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes and enters .venv at the top of the
# repository. Needs Python 3.11, 3.12 or 3.13 with pip; PYTHON=... names another one.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
  echo "error: glm_jax needs Python 3.11, 3.12 or 3.13, got $("$python" -V 2>&1); set PYTHON to one of these." >&2
  exit 65
fi

# use_venv REQUIREMENTS...: installs them, only when they or this project's own changed.
use_venv() {
  local wanted stamp
  stamp=.venv/requirements-$(basename "${@: -1}").sha256
  wanted=$(cat requirements.txt pyproject.toml "$@" | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [[ ! -x .venv/bin/python ]]; then
    echo "+ $python -m venv .venv"
    "$python" -m venv .venv
  fi
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    local arguments=()
    local file
    for file in "$@"; do arguments+=(-r "$file"); done
    echo "+ pip install ${arguments[*]} -e .   (a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}" -e .
    echo "$wanted" > "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}
