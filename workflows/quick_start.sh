#!/usr/bin/env bash
# From nothing to a tuned model that you can chat with: environment, model, data, training, evaluation, a chat.
#   ./workflows/quick_start.sh            guided on a terminal
#   ./workflows/quick_start.sh --yes      takes every default
#   ./workflows/quick_start.sh --demo     the small demo model, with or without a GPU (3 minutes on 2 cores)
# Without a GPU: SmolLM2-135M-Instruct, from the hub or the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ -n "${PYTHON:-}" ] || { [ -f .venv/.ready ] && [ .venv/.ready -nt requirements.lock ]; } || env/install.sh base
exec "${PYTHON:-.venv/bin/python}" scripts/quick_start.py "$@"
