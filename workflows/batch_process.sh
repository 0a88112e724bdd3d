#!/usr/bin/env bash
# Runs several data sets through the pipeline, each in folders of its own; continues after a failure, ends with a table.
#   ./workflows/batch_process.sh data/raw/a.jsonl data/raw/b.csv      process each
#   ./workflows/batch_process.sh --train data/raw/*.jsonl             process, train and evaluate each
#   CONFIG=configs/demo_cpu.yaml ./workflows/batch_process.sh ...     with another config (PYTHON=: another Python)
# Exit code: 0 if every data set succeeded, else 2.
set -uo pipefail
cd "$(dirname "$0")/.."
train=0
case "${1:-}" in
  -h|--help|"") sed -n '2,6s/^# \{0,1\}//p' "$0"; exit $([ -n "${1:-}" ] && echo 0 || echo 2) ;;
  --train) train=1; shift ;;
esac
[ -n "${PYTHON:-}" ] || [ -f .venv/.ready ] || env/install.sh base || exit $?
python=${PYTHON:-.venv/bin/python}
config=${CONFIG:+--config $CONFIG}
mkdir -p outputs/batch
declare -a table
failed=0
for file in "$@"; do
  name=$(basename "$file" | sed -E 's/\.(gz|zst)$//I; s/\.[^.]*$//; s/[^A-Za-z0-9_-]/-/g')
  sets="--set data.processed_dir=outputs/batch/$name --set data.stage=processed --set train.output_dir=outputs/$name"
  log=outputs/batch/$name.log
  started=$SECONDS
  stage=process
  code=0
  # shellcheck disable=SC2086
  "$python" scripts/process_data.py $config $sets --raw_path "$file" >"$log" 2>&1 || code=$?
  if [ $code -eq 0 ] && [ $train -eq 1 ]; then
    stage=train;  "$python" scripts/train.py $config $sets >>"$log" 2>&1 || code=$?
    if [ $code -eq 0 ]; then
      stage=eval; "$python" scripts/eval.py $config $sets --split test >>"$log" 2>&1 || code=$?
    fi
  fi
  if [ $code -eq 130 ] || [ $code -eq 143 ]; then echo "$name: stopped; the same command continues"; exit $code; fi
  if [ $code -eq 0 ]; then result=done; else result="failed at $stage (exit $code)"; failed=1; fi
  rows=$(cat "${SFT_ROOT:-.}/outputs/batch/$name/train.jsonl" 2>/dev/null | wc -l)
  table+=("$(printf '%-28s %-26s %8s %6ss  %s' "$name" "$result" "$rows" "$((SECONDS - started))" "$log")")
  echo "$name: $result"
done
printf '\n%-28s %-26s %8s %7s  %s\n' "data set" result "train" time log
printf '%s\n' "${table[@]}"
exit $((failed * 2))
