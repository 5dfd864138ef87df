"""The benchmarks on Megatron run, with tiny shapes on CPUs."""

import re

import pytest

megatron = pytest.importorskip("megatron.core")

from tests.integrations.test_megatron_launch import program

__all__ = ["program"]
pytestmark = [pytest.mark.mpi, pytest.mark.no_exchange, pytest.mark.cpu_only("its shapes are for CPUs")]


def test_steps_are_timed_beside_lasps_own(program):
    options = "--cases tiny_moe:L --tokens 64 --runs 1"
    output = program("benchmarks/megatron_step.py", *options.split())
    rows = re.findall(r"(native|megatron) .* ([\d.]+), ([\d.]+)$", output, re.MULTILINE)
    assert [name for name, *_ in rows] == ["native", "megatron"]
    assert all(float(last) < float(first) for _, first, last in rows)  # both learn the tokens
    assert float(rows[0][1]) == pytest.approx(float(rows[1][1]), abs=0.1)


@pytest.mark.skipif(megatron.__version__ < "0.19", reason="its Gated DeltaNet knows no context parallelism")
def test_layers_are_timed_and_their_messages_counted(program):
    options = "--tokens 64 128 --hidden 32 --heads 4 --head-dim 8 --runs 1 --exchanges all_gather"
    output = program("benchmarks/megatron_layer.py", *options.split())
    rows = re.findall(r"lasp, all_gather" + 4 * r" +([\d.]+)" + "$", output, re.MULTILINE)
    assert len(rows) == 2
    assert rows[0] == rows[1]  # however long the sequence
    computed, counted = rows[0][:2], rows[0][2:]
    assert computed == counted
