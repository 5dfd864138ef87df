#!/usr/bin/env bash
# Makes .venv at the repository's root and installs lasp there, with the command (the extra train) and the extras named as
# arguments (see setup.py):
#     bash launch/install.sh test docs dev
# Returns at once when that has been done before. A machine without an NVIDIA GPU gets PyTorch's CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu_version=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '\033[1m%s\033[0m\n' "$*"; }

find_python() { # the first Python that is new enough
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "lasp needs Python 3.11 or newer; found $(python3 --version 2>&1)" >&2
    return 1
}

has_torch() { "$1" -c 'import torch' 2>/dev/null; }

plain_pip_gives_cpu_torch() { # where PyTorch publishes nothing else, or where pip is configured to find such a build
    [ "$(uname -s)" = Darwin ] || [[ $(pip index versions torch 2>/dev/null) == *"$cpu_version+cpu"* ]]
}

install_torch() {
    if command -v nvidia-smi >/dev/null; then
        pip install torch
    elif plain_pip_gives_cpu_torch; then
        pip install "torch==$cpu_version"
    else
        pip install "torch==$cpu_version" --index-url "$cpu_index"
    fi
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "Making .venv with $("$python" --version)"
    # A PyTorch that is already on the machine fits its GPU's driver: use it rather than fetch another.
    if has_torch "$python"; then "$python" -m venv --system-site-packages .venv; else "$python" -m venv .venv; fi
fi
. .venv/bin/activate

# One stamp an extra, so that asking for fewer extras than before changes nothing.
state=$({ python --version; cat setup.py launch/install.sh lasp/parallel/build.py csrc/*.*; } | cksum)
missing=()
for extra in lasp "$@"; do
    [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$state" ] || missing+=("$extra")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! has_torch python; then
    say "Installing PyTorch"
    install_torch
fi
say "Installing lasp and what it needs (a minute or two)"
extras=$(IFS=,; echo "train${*:+,$*}")
torch=$(python -c 'import torch; print(torch.__version__)' 2>/dev/null)
pip install -qq --editable ".[$extras]" "torch==$torch" # the version is named so that pip keeps it
if [[ " $* " == *" test "* ]] && ! python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    # It says that it wants Python 3.12, yet comes built for 3.11, and works there.
    pip install -qq --ignore-requires-python --no-deps "$(grep -o 'megatron-core==[0-9.]*' setup.py)"
fi
for extra in lasp "$@"; do
    echo "$state" >".venv/installed-$extra"
done
