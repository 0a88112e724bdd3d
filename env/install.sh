#!/usr/bin/env bash
# Makes .venv with exactly what requirements.lock names: uv where it is, else venv and pip.
#   env/install.sh base | dev | unsloth
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-base}
case $kind in
  base) requirements=requirements.txt ;;
  dev) requirements=requirements-dev.txt ;;
  unsloth) requirements=requirements-unsloth.txt ;;
  *) echo "error: unknown set '$kind'; one of: base, dev, unsloth" >&2; exit 2 ;;
esac

find_python() { # the first Python between 3.10 and 3.13
  for name in python3 python3.12 python3.11 python3.13 python3.10 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
    then echo "$name"; return; fi
  done
  echo "error: no Python from 3.10 to 3.13 found; install one (apt install python3), or uv, which fetches its own" >&2
  exit 2
}

started=$SECONDS
if command -v uv >/dev/null; then
  [ -x .venv/bin/python ] || uv venv --quiet --python '>=3.10,<3.14' .venv
  echo "installing $requirements into .venv with uv ..."
  uv pip install --quiet --python .venv/bin/python -r "$requirements" -c requirements.lock
else
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    "$python" -m venv .venv 2>/dev/null || {
      echo "error: '$python -m venv' failed; on Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
  fi
  echo "installing $requirements into .venv with pip (a few minutes the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" -c requirements.lock
fi
case $kind in
  base) touch .venv/.ready ;;
  dev) touch .venv/.ready .venv/.ready-dev ;;
esac
echo "done in $((SECONDS - started)) s: .venv/bin/python is $(.venv/bin/python --version)"
