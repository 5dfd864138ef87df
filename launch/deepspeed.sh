#!/usr/bin/env bash
# Runs `lasp train` with DeepSpeed:   bash launch/deepspeed.sh RANKS_PER_NODE ZERO_STAGE RECIPE [--overrides]
# Several nodes as in launch/torchrun.sh; `--deepspeed.offload` keeps optimiser states on the CPU. Needs the extra:
#     bash launch/install.sh deepspeed
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 RANKS_PER_NODE ZERO_STAGE RECIPE [--overrides]" >&2; exit 2; }
ranks="$1" stage="$2" recipe="$3"
shift 3

# DeepSpeed takes an x86 machine without a GPU for one unless told.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" "$ranks" "$recipe" \
    --engine deepspeed --deepspeed.stage "$stage" --parallel.no-fsdp "$@"
