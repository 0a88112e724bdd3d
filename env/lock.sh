#!/usr/bin/env bash
# Resolves requirements.txt and requirements-dev.txt for Python 3.10-3.13 into requirements.lock (needs uv).
# The CUDA packages that torch asks for on a GPU machine are left out: torch names their exact versions itself.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "error: make lock needs uv: pip install uv" >&2; exit 2; }
staged=$(mktemp)
trap 'rm -f "$staged"' EXIT
printf 'torch==2.13.0\n' | uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header \
  requirements.txt requirements-dev.txt - -o "$staged"
{
  echo "# The exact set that make install takes, as constraints; made by 'make lock' for Python 3.10-3.13."
  grep -vE '^(nvidia-[^m]|cuda-|triton|#)' "$staged"
} > requirements.lock
echo "requirements.lock: $(grep -c == requirements.lock) packages"
