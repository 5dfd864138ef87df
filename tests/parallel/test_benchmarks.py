"""The benchmarks run, with tiny shapes on CPUs, and write what they say."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import simulate
from lasp.parallel.cost import Costs
from tests.parallel.scripts import run_script
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # a world of one process
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}


def in_this_launch(test):
    """In the processes of the launch; what the benchmark says is looked at on rank 0, which says it."""
    return pytest.mark.mpi(pytest.mark.no_exchange(pytest.mark.cpu_only("its shapes are for CPUs")(test)))


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs one of them; the result is what it prints."""

    def run(name: str, options: str) -> str:
        return run_script(monkeypatch, capsys, BENCHMARKS / f"{name}.py", *shlex.split(options))

    return run


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python with these arguments, in processes of its own."""
    everything = os.environ | {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=PATIENCE)


def ended_well(done: subprocess.CompletedProcess[str]) -> bool:
    """Python may end while a thread of PyTorch's gloo still frees the last collective's tensors; then gloo aborts."""
    return done.returncode == 0 or "terminate called without an active exception" in done.stderr


@in_this_launch
def test_exchanges_and_ops_are_timed(benchmark, two):
    options = "--heads 2 --head-dim 8 --runs 1 --tokens 16 --ops scalar delta log-linear softmax --exchanges"
    options += " all_gather scan auto"
    output = benchmark("exchange", options)
    if two.rank > 0:
        return
    rows = re.findall(r"^  \S.*\S +eager +[\d.]+ +[\d.]+ x$", output, re.MULTILINE)
    assert len(rows) == 2 * 4 * 4 + 2 * 4 + 2 + 1
    assert output.count("x bare all-gather") == 2 * 4 and output.count("x without") == 3
    assert "softmax, 16 tokens a rank" in output


@in_this_launch
def test_calibration_is_what_the_simulator_reads(benchmark, two, shared_tmp_path):
    file = shared_tmp_path / "links.json"
    benchmark("exchange", f"--heads 2 --runs 1 --calibrate inside --sizes 1024 65536 --costs {file}")
    if two.rank > 0:
        return
    costs = Costs.read(file)
    assert costs.inside != Costs().inside and costs.across == Costs().across
    picture = shared_tmp_path / "curves.png"
    simulate.main(simulate.Settings(ranks=(2, 4), costs=file, output=picture))
    assert picture.stat().st_size > 1000


SOFTMAX = "--heads 4 --kv-heads 4 --head-dim 8 --runs 1 --tokens 16 --packed 64 --accuracy-tokens 64 --ranks 4"


@in_this_launch
def test_softmax_is_timed_over_ranks(benchmark, two):
    output = benchmark("softmax", SOFTMAX)
    assert two.rank > 0 or ("2 ranks, 16 tokens each" in output and "2 ranks, 32 tokens each, 8 documents" in output)


def test_softmax_is_emulated(benchmark):
    output = benchmark("softmax", SOFTMAX)
    assert "4 ranks, 16 tokens each, 8 documents" in output
    ratios = [float(ratio) for ratio in re.findall(r"\( *([\d.]+)\)", output)]
    assert len(ratios) == 2 * 3 * 4 and max(ratios) < 2  # few tokens; enough to see that all arrive


def rows(table: str) -> list[dict[str, str]]:
    """Of the Markdown table in a text."""
    lines = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    names, *found = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in found]


@in_this_launch
def test_scaling_becomes_a_table_and_a_figure(benchmark, two, shared_tmp_path):
    options = (
        f"--output {shared_tmp_path} --heads 2 --head-dim 8 --runs 1 --tokens 64 --sequence 128 "
        "--ops scalar softmax --models LLLN --exchanges scan"
    )
    if two.rank == 0:
        done = run("benchmarks/scaling.py", *options.split(), **ALONE)
        assert ended_well(done), done.stderr
    two.barrier("one rank was measured")
    benchmark("scaling", options)
    if two.rank > 0:
        return
    benchmark("scaling_report", f"--output {shared_tmp_path}")
    table = rows((shared_tmp_path / "scaling.md").read_text())
    assert len(table) == 2 * (3 + 4)
    found = {(row["scaling"], row["case"], row["exchange"], row["ranks"]): row for row in table}

    def ms(*key: str) -> float:
        return float(found[key]["ms"])

    for mode, share in (("weak", 1), ("strong", 2)):
        op = found[mode, "scalar", "scan", "2"]
        one, alone = ms(mode, "scalar", "without", "1"), ms(mode, "scalar", "without", "2")
        assert float(op["efficiency"]) == pytest.approx(one / share / float(op["ms"]), abs=2e-3)
        assert float(op["not hidden, ms"]) == pytest.approx(float(op["ms"]) - alone, abs=2e-3)
        assert float(op["predicted, ms"]) > alone
        softmax = found[mode, "softmax", "ring", "2"]
        ideal = ms(mode, "softmax", "ring", "1") * 2 / share**2  # twice the keys for each query, or half the queries
        assert float(softmax["efficiency"]) == pytest.approx(ideal / float(softmax["ms"]), abs=2e-3)
        steps = [found[mode, "model LLLN", "auto", count] for count in ("1", "2")]
        parts = [float(step["softmax layers"].rstrip("%")) / 100 for step in steps]
        assert all(0 < part < 1 for part in parts)
        assert float(steps[0]["efficiency"]) == 1
        ideal = float(steps[0]["ms"]) * (1 - parts[0] + parts[0] * 2 / share) / share
        assert float(steps[1]["efficiency"]) == pytest.approx(ideal / float(steps[1]["ms"]), rel=5e-3, abs=2e-3)
    assert (shared_tmp_path / "scaling.png").stat().st_size > 1000


def test_a_report_of_nothing_says_so(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"^{tmp_path}/points.csv has no points: nothing was measured$"):
        benchmark("scaling_report", f"--output {tmp_path}")
    header, row = "mode,case,exchange,ranks,tokens,work,note", "weak,scalar,ring,2,64,1.0,no room"
    (tmp_path / "points.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(SystemExit, match=f"^no point of {tmp_path}/points.csv has a time: no figure$"):
        benchmark("scaling_report", f"--output {tmp_path}")
    assert "no room" in capsys.readouterr().out


FAILING = """
from pathlib import Path
import torch, torch.distributed as dist
from lasp.parallel import leave
from scaling import FewRuns, Point, Points, Settings
from watch import Watched

def make(fails):
    if fails and dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return Watched(dist.barrier, torch.device("cpu"))

dist.init_process_group("gloo")
points = Points(Settings(output=Path({output!r})), FewRuns(torch.device("cpu"), runs=1, seconds=1.0))
for case in ("too large", "small"):
    point = Point(mode="weak", case=case, exchange="none", ranks=2, tokens=1, work=1.0)
    points.measure(point, lambda: make(case == "too large"))
leave()
"""


def test_a_point_without_room_on_one_rank_ends_the_run_which_goes_on_behind_it(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(output=str(tmp_path)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    first, second = (run(*launch) for _ in range(2))
    assert first.returncode != 0
    assert ended_well(second), second.stderr
    with (tmp_path / "points.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["case"], row["note"], bool(row["seconds"])) for row in table] == [
        ("too large", "no room", False),
        ("small", "", True),
    ]


@in_this_launch
def test_memory_and_time_are_told_beside_the_plan(benchmark, two):
    output = benchmark("memory", "--tokens 64 --ways none 'selective offloaded' full --runs 1 --seconds 0.1")
    if two.rank > 0:
        return
    table = rows(output)
    assert [row["way"] for row in table] == ["none", "selective offloaded", "full"]
    for row in table:
        assert float(row["tokens/s"].replace(",", "")) == pytest.approx(
            64e3 / float(row["ms"].replace(",", "")), rel=0.1
        )


@in_this_launch
def test_training_steps_of_all_models_are_timed(benchmark, two):
    options = "--llama-tokens 64 --hybrid-tokens 128 --moe-tokens 128 --log-linear-tokens 64 --runs 1"
    output = benchmark("training", options)
    if two.rank > 0:
        return
    table = rows(output)
    mixers = ["mamba2", "log_linear_mamba2", "gated_delta_net", "log_linear_gated_delta_net"]
    names = 2 * ["pure"] + ["pure", "hybrid", "dense"] + 2 * ["mixture"] + mixers
    assert [row["model"].split(",")[0] for row in table] == names
    for row in table:
        assert int(row["tokens a rank"]) == 64
        assert float(row["tokens/s"].replace(",", "")) == pytest.approx(2 * 64e3 / float(row["ms"]), rel=0.01)
        assert bool(row["softmax layers"]) == (row["model"] == "hybrid")
    dense, mixture = (next(r for r in table if r["model"].startswith(name)) for name in ("dense", "mixture"))
    routers = 4 * 4 * 32  # layers, experts, hidden size
    active = [int(row["active parameters"].replace(",", "")) for row in (dense, mixture)]
    assert active[0] == active[1] - routers
    split, apart = (float(row["ms"]) for row in table[:2])
    (ratio,) = re.findall(r"SP at ([\d.]+)%", output)
    assert float(ratio) == pytest.approx(100 * apart / split, rel=0.01)


@in_this_launch
def test_steps_in_segments_are_timed(benchmark, two):
    output = benchmark("streaming", "--pattern LN --tokens 96 128 --segment-tokens 32 --offload --recompute full")
    if two.rank > 0:
        return
    table, told = rows(output), [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [row["tokens"] for row in table] == ["96", "128"] and [row["tokens"] for row in told] == [96, 128]
    for row in told:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] is row["peak_gpu_bytes"] is None and row["host_bytes"] >= 0


def test_preparing_is_timed(benchmark):
    output = benchmark("preparing", "--megabytes 0.1 --vocab-size 300 --cores 1")
    row = json.loads(output.splitlines()[-1])
    assert row["megabytes"] >= 0.1 and row["tokens"] > 0 and row["megabytes_per_second"] > 0
    assert 2**20 < row["peak_bytes"] < 2**31
