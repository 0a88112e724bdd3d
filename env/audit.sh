#!/usr/bin/env bash
# Checks the locked set for known vulnerabilities with pip-audit; skipped with a message where it has no answer in a minute.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python} locked=${2:-requirements.lock}
output=$(timeout 60 "$python" -m pip_audit --requirement "$locked" --no-deps --disable-pip --progress-spinner off 2>&1)
code=$?
if [ "$code" -eq 0 ]; then
  echo "pip-audit: no known vulnerability"
elif grep -qE '^Found [0-9]+ known vulnerabilit' <<< "$output"; then
  echo "$output" >&2
  exit 1
else
  echo "pip-audit: skipped, it had no answer within a minute ($(tail -n 1 <<< "$output" | cut -c -120))"
fi
