#!/usr/bin/env bash
# Runs `lasp train` on several nodes. Start it on each of them, in any order, with the same arguments:
#     bash launch/multinode.sh NODES HEAD[:PORT] RANKS_PER_NODE RECIPE [--overrides]
# HEAD is the name of one of the nodes, where the others find each other. NODES may be a range, as 2:4: a node that is lost is
# then done without, and one that comes is taken in. All nodes share the run's directory. The rest is as in launch/torchrun.sh.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 NODES HEAD[:PORT] RANKS_PER_NODE RECIPE [--overrides]" >&2; exit 2; }
export NNODES="$1" MASTER_ADDR="$2"
shift 2

exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" "$@"
