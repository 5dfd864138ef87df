#!/usr/bin/env bash
# Runs `lasp train` on several ranks:   bash launch/torchrun.sh RANKS_PER_NODE RECIPE [--overrides]
# Goes on with a run:                   bash launch/torchrun.sh RANKS_PER_NODE resume RUN_DIR [--overrides]
# On several nodes, start it on each with NNODES and MASTER_ADDR set, the name of one of them (MASTER_PORT if 29500 is taken).
# Ranks that die are started again, MAX_RESTARTS times (3 unless set). SIGTERM or SIGINT stops the run after its step, with a
# checkpoint and the exit code 75; the same command goes on from there.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: $0 RANKS_PER_NODE RECIPE [--overrides]" >&2; exit 2; }
ranks="$1"
shift

[ "$1" = resume ] || set -- train "$@"
exec "$(bash "$root/launch/python.sh")" "$root/launch/elastic.py" "$ranks" -m lasp.cli "$@"
