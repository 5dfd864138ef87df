"""Runs that are interrupted at random moments end with the bits of one that nobody interrupted."""

from tests.parallel.test_benchmarks import run


def test_killed_and_stopped_runs_end_as_if_nothing_had_been():
    options = "--trials rank+all+launcher+rank+term --times 1 --ranks 2 --steps 8"
    done = run("benchmarks/interruptions.py", *options.split())
    assert done.returncode == 0, done.stdout
    assert "1 of 1 end with the bits of the uninterrupted run" in done.stdout
