"""What looks for growth in long runs: here that it runs, and what it calls growth."""

from importlib import import_module

from tests.parallel.test_benchmarks import BENCHMARKS, run


def test_growth_is_that_of_a_thousand_steps_after_the_first_ones(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    soak = import_module("benchmarks.soak")
    sizes = [0, 50, 100, 102, 104, 106, 108, 110]  # the first looks are of a run that warms up
    looks = [soak.Look(100 * i, float(i), size, 7, 3) for i, size in enumerate(sizes)]
    assert soak.growth(looks, "bytes") == (109 - 101) / (650 - 250) * 1000
    assert soak.growth(looks, "handles") == soak.growth(looks, "threads") == 0


def test_a_run_is_looked_at():
    few = "--context-length 64 --data.eval-contexts 1 --checkpoint-every 2 --eval-every 4"
    done = run("benchmarks/soak.py", "--ranks=1", "--starts=1", "--steps=4", "--every=0.2", f"--options={few}")
    assert "start 1, " in done.stdout and "'metrics.jsonl': " in done.stdout, done.stdout + done.stderr
