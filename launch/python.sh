#!/usr/bin/env bash
# Says which Python other launchers use: that of the environment they are started in, if lasp is installed there, else .venv's.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
echo "$(dirname "$(command -v lasp || echo "$root/.venv/bin/lasp")")/python"
