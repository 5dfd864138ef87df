#!/usr/bin/env bash
# Sets up what is missing and runs every check and test, those over several ranks included:
#     bash launch/test.sh             what CI runs
#     bash launch/test.sh --full      also what shows nothing new: every test on every number of ranks
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
interpreter=interpreter
command -v nvidia-smi >/dev/null && interpreter=
bash launch/install.sh test docs dev $interpreter || exit 1
. .venv/bin/activate

export OMP_NUM_THREADS=1
[ -t 1 ] || export NO_COLOR=1 # mpirun gives its processes a terminal
if [ "$(id -u)" = 0 ]; then # in a container, say
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
summary=()
failed=0
full=${1:-} few="not contiguous and not packed" # of the tests with zeros: of every kind, those of one layout
[ "$full" != --full ] || few=

step() { # step NAME COMMAND…: runs it, whatever came of the steps before
    local name=$1 outcome=ok start=$SECONDS
    shift
    printf '\n\033[1m== %s\033[0m\n' "$name"
    "$@" || { outcome=FAILED failed=$((failed + 1)); }
    summary+=("$(printf '%-6s %4d s  %s' "$outcome" $((SECONDS - start)) "$name")")
}

on_ranks() { # on_ranks N PYTEST_ARGUMENT…: under mpirun; rank 0 speaks for all, the others' words are shown if one dies
    local world=$1 code
    shift
    # Tests that failed are no reason for mpirun to end other ranks, which may take it for ever.
    mpirun --oversubscribe -n "$world" bash -c '
        [ "$OMPI_COMM_WORLD_RANK" = 0 ] || exec >"$0/$OMPI_COMM_WORLD_RANK" 2>&1
        python -m pytest --only-mpi "$@" || { code=$?; [ $code = 1 ] && touch "$0/failed" || exit $code; }' \
        "$logs" -q --durations 10 $full "$@"
    code=$?
    [ $code = 0 ] || tail -n 30 "$logs"/*
    [ ! -e "$logs/failed" ] || code=1
    rm -f "$logs"/*
    return $code
}

told_types() { # what mypy found meanwhile
    wait $types
    local code=$?
    cat "$logs/types"
    return $code
}

step "ruff check" ruff check
step "ruff format" ruff format --check
step "docs" env NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$logs/site"
rm -rf "$logs/site"
mypy >"$logs/types" 2>&1 & # keeps one core, so beside the tests
types=$!
step "tests on 1 rank" python -m pytest -q -n 2 --dist worksteal --durations 10
step "types" told_types
step "tests on 2 ranks started by torchrun" \
    torchrun --standalone --nproc-per-node 2 --local-ranks-filter 0 -m pytest --only-mpi -q --durations 10 $full \
    tests/parallel tests/examples tests/integrations/test_megatron_{launch,benchmarks}.py # last: Megatron's stays on CPUs
# DeepSpeed's meshes want 2 or 4 ranks; subgroups of 4 ranks are those of 3 but for what works in both at the same time.
step "tests on 3 ranks" on_ranks 3 tests/fuzz/test_ranks.py tests/parallel --ignore tests/parallel/test_deepspeed.py
step "tests on 4 ranks" on_ranks 4 tests/parallel \
    -k "not subgroup or test_exchange or test_documents or test_conv"
step "tests on 3 ranks fail when the exchange gives zeros" on_ranks 3 tests/fuzz/test_ranks.py tests/parallel --zero-exchange \
    -k "not subgroup${few:+ and not deepspeed and $few}"
step "Megatron models on 4 ranks" on_ranks 4 tests/integrations

printf '\n\033[1m== Summary (%d s)\033[0m\n' $SECONDS
printf '%s\n' "${summary[@]}"
[ $failed = 0 ]
