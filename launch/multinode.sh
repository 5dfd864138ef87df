#!/usr/bin/env bash
# Runs `lasp train` on several nodes. Start it on each of them, in any order, with the same arguments:
#     bash launch/multinode.sh NODES HEAD[:PORT] RANKS_PER_NODE RECIPE [--overrides]
# HEAD is the name of one of the nodes, where the others find each other. MAX_RESTARTS is torchrun's --max-restarts (3 unless
# set). All nodes share the run's directory.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 4 ] || { echo "usage: $0 NODES HEAD[:PORT] RANKS_PER_NODE RECIPE [--overrides]" >&2; exit 2; }
nodes="$1" head="$2" ranks="$3"
shift 3

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$root/.venv/bin/torchrun" --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$head" \
    --rdzv-id "${RUN_ID:-lasp}" --max-restarts "${MAX_RESTARTS:-3}" --nproc-per-node "$ranks" -m lasp.cli train "$@"
