#!/usr/bin/env bash
# The whole path on one machine, without a GPU in under ten minutes on two cores: installs lasp, tokenises the source text
# of Python's standard library, trains a small hybrid on contexts of 8192 tokens split over two ranks, and shows the result.
#     bash launch/quickstart.sh
# Started again, it goes on where it was; remove runs/quickstart to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
. .venv/bin/activate
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "Tokens: the standard library's source text, as bytes"
[ -f runs/data/stdlib_valid.idx ] || lasp prepare stdlib --output runs/data/stdlib

say "Training on two ranks (GPUs if there are two, else CPU cores)"
bash launch/torchrun.sh 2 quickstart

say "Result"
lasp report runs/quickstart

say "Text from the checkpoint"
lasp generate runs/quickstart --prompt $'class Reader:\n    def __init__(self' --tokens 400
