#!/usr/bin/env bash
# Asks pip-audit for known vulnerabilities of the locked set; without an answer in a minute this is said and passed over.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python} locked=${2:-requirements.lock}
said=$(timeout 60 "$python" -m pip_audit --requirement "$locked" --no-deps --disable-pip --progress-spinner off 2>&1)
code=$?
if [ "$code" -eq 0 ]; then
  echo "pip-audit: no known vulnerability"
elif grep -qE '^Found [0-9]+ known vulnerabilit' <<< "$said"; then
  echo "$said" >&2
  exit 1
else
  echo "pip-audit: passed over, it had no answer within a minute ($(tail -n 1 <<< "$said" | cut -c -120))"
fi
