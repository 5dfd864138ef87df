#!/usr/bin/env bash
# Trains a Linear-Llama or a Linear-MoE on Megatron-Core:   bash launch/megatron.sh RANKS_PER_NODE --preset NAME [--options]
#     bash launch/megatron.sh 8 --preset llama3_1b --data data/corpus_train --tokenizer data/tokenizer.json \
#         --run-dir runs/megatron_1b --steps 20000 --sequence-length 131072 --context-parallel 8 --recompute
# All options: bash launch/megatron.sh 1 --help. Without a GPU it runs in fp32 on gloo (presets tiny and tiny_moe).
# Several nodes, restarts and signals as in launch/torchrun.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: $0 RANKS_PER_NODE --preset NAME [--options]" >&2; exit 2; }
ranks="$1"
shift

export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's overlap of messages asks for it
exec "$(bash "$root/launch/python.sh")" "$root/launch/elastic.py" "$ranks" "$root/launch/megatron_rank.py" "$@"
