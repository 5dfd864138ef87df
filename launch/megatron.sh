#!/usr/bin/env bash
# Trains a Linear-Llama or a Linear-MoE on Megatron-Core:   bash launch/megatron.sh RANKS_PER_NODE --preset NAME [--options]
#     bash launch/megatron.sh 8 --preset llama3_1b --data data/corpus_train --tokenizer data/tokenizer.json \
#         --run-dir runs/megatron_1b --steps 20000 --sequence-length 131072 --context-parallel 8 --recompute
# All options: bash launch/megatron.sh 1 --help. Without a GPU it runs in fp32 on gloo (presets tiny and tiny_moe).
# On several nodes, start it on each with NNODES, NODE_RANK and MASTER_ADDR set (MASTER_PORT if 29500 is taken).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: $0 RANKS_PER_NODE --preset NAME [--options]" >&2; exit 2; }
ranks="$1"
shift

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's overlap of messages asks for it
if [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "$root/.venv/bin/torchrun" "${rendezvous[@]}" --nproc-per-node "$ranks" "$root/launch/megatron_rank.py" "$@"
