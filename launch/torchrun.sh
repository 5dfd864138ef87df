#!/usr/bin/env bash
# Runs `lasp train` on several ranks:   bash launch/torchrun.sh RANKS_PER_NODE RECIPE [--overrides]
# On several nodes, start it on each with NNODES, NODE_RANK and MASTER_ADDR set (MASTER_PORT if 29500 is taken).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: $0 RANKS_PER_NODE RECIPE [--overrides]" >&2; exit 2; }
ranks="$1"
shift

# One thread per rank unless told otherwise: the ranks of a machine share its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "$root/.venv/bin/torchrun" "${rendezvous[@]}" --nproc-per-node "$ranks" -m lasp.cli train "$@"
