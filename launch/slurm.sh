#!/usr/bin/env bash
#SBATCH --job-name=lasp
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Runs `lasp train` as a Slurm job. From lasp's directory, which all nodes see:
#     sbatch --nodes 4 launch/slurm.sh RECIPE [--overrides]
# One launcher a node, and one rank a GPU (RANKS_PER_NODE if set). Five minutes before its time is over the job saves a
# checkpoint, stops, and goes to the queue again, to go on.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch --nodes N launch/slurm.sh RECIPE [--overrides]" >&2; exit 2; }
ranks="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs: set RANKS_PER_NODE}}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

export RUN_ID="$SLURM_JOB_ID"
code=0
# Slurm runs a copy of this file, so the others are found from where the job was submitted.
srun --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash "$SLURM_SUBMIT_DIR/launch/multinode.sh" "$SLURM_NNODES" "$head:${MASTER_PORT:-29400}" "$ranks" "$@" || code=$?
[ "$code" != 75 ] || scontrol requeue "$SLURM_JOB_ID" # told to stop
exit "$code"
