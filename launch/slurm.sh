#!/usr/bin/env bash
#SBATCH --job-name=lasp
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --open-mode=append
#SBATCH --requeue
# Runs `lasp train` as a Slurm job. From lasp's directory, which all nodes see:
#     sbatch --nodes 4 launch/slurm.sh RECIPE [--overrides]
# One launcher a node, and one rank a GPU (RANKS_PER_NODE if set).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch --nodes N launch/slurm.sh RECIPE [--overrides]" >&2; exit 2; }
ranks="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs: set RANKS_PER_NODE}}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

export RUN_ID="$SLURM_JOB_ID"
# Slurm runs a copy of this file, so the others are found from where the job was submitted.
exec srun --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash "$SLURM_SUBMIT_DIR/launch/multinode.sh" "$SLURM_NNODES" "$head:${MASTER_PORT:-29400}" "$ranks" "$@"
