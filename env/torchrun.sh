#!/usr/bin/env bash
# The same on every machine, with torchrun instead of accelerate: its settings are environment variables.
#   NODES=2 NODE=0 HEAD=10.0.0.1 GPUS=8 env/torchrun.sh --config configs/run_bnb.yaml --set tuning.mode=lora
# NODE: this machine's number. HEAD: address of machine 0. SHARD=ddp: a copy of the model on each GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${SHARD:-fsdp}" = fsdp ]; then
  export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true
  export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_CPU_RAM_EFFICIENT_LOADING=false
elif [ "$SHARD" != ddp ]; then
  echo "SHARD=$SHARD is neither fsdp nor ddp" >&2; exit 2
fi
exec "${TORCHRUN:-.venv/bin/torchrun}" --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-gpu}" \
  --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" scripts/train.py "$@"
