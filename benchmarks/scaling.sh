#!/usr/bin/env bash
# Weak and strong scaling over 1, 2, 4 and 8 ranks: points.csv, scaling.md and scaling.png in a folder.
#
#   bash benchmarks/scaling.sh                           the GPUs of this machine; without any, tiny shapes on the CPU
#   bash benchmarks/scaling.sh --output runs/here --ops scalar --models     with options of benchmarks/scaling.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ ! -e .venv ] || . .venv/bin/activate

for option in "$@"; do
    case $option in -h | --help) exec python benchmarks/scaling.py --help ;; esac
done
output=runs/scaling
for ((i = 1; i < $#; i++)); do
    [ "${!i}" != --output ] || { next=$((i + 1)) && output=${!next}; }
done
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
options=()
most=$gpus
if [ "$gpus" = 0 ]; then
    most=4
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    options=(--tokens 1024 --sequence 4096 --heads 2 --head-dim 32)
fi
mkdir -p "$output"
points=$output/points.csv
rm -f "$points"
rows() { if [ -e "$points" ]; then wc -l <"$points"; else echo 0; fi; }
for ranks in 1 2 4 8; do
    [ "$ranks" -le "$most" ] || break
    # A point that fails ends a run, but leaves a row; the next run goes on behind it.
    while before=$(rows) && ! torchrun --standalone --nproc-per-node "$ranks" benchmarks/scaling.py "${options[@]}" "$@"
    do
        [ "$(rows)" -gt "$before" ] || { echo "the run on $ranks ranks ended early" >&2 && break; }
    done
done
python benchmarks/scaling_report.py --output "$output"
