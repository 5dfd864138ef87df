"""`lasp plan`, what `recompute: auto` becomes, and what is said when memory does not suffice."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp import cli
from lasp.config import DeepSpeedConfig, ParallelConfig
from lasp.models import linear_llama3_1b
from lasp.plan import GPUS
from lasp.training import planning
from lasp.training.recipes import RECIPES
from lasp.training.runtime import join_world
from lasp.training.train import train


def planned(capsys, options: str) -> dict:
    cli.main(["plan", *options.split(), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_preset_gets_the_best_setting(capsys):
    found = planned(capsys, "linear_llama3_1b --pattern L --context 1048576")
    assert found["plan"]["fits"] and found["plan"]["setting"]["offload_activations"]
    assert found["plan"]["memory"]["peak"] == sum(
        found["plan"]["memory"]["moments"][found["plan"]["memory"]["moment"]].values()
    )
    assert found["advice"].startswith("nothing")
    assert not any(other["fits"] for other in found["others"] if not other["setting"]["offload_activations"])


def test_a_setting_can_be_asked_for(capsys):
    options = "linear_llama3_1b --context 65536 --gpu H100 --gpus 4 --mixer kda --recompute full --segment-tokens 32768"
    found = planned(capsys, options)
    assert found["job"]["gpu"]["name"] == "H100" and found["job"]["model"]["mixer"] == "kda"
    wanted = {"sequence_parallel": 4, "recompute": "full", "recompute_layers": None, "offload_activations": False}
    wanted |= {"segment_tokens": 32768, "segment_offload": False, "segment_graphs": 1}
    assert found["plan"]["setting"] == wanted
    assert "boundary states" in found["plan"]["memory"]["moments"]["loss"]


def test_a_recipe_brings_its_own(capsys):
    found = planned(capsys, "linear-moe-a0-3b-2b-128k")
    recipe = RECIPES["linear_moe_a0_3b_2b_128k"]()
    assert found["job"]["gpus"] == found["plan"]["setting"]["sequence_parallel"] == 8
    assert (found["job"]["context"], found["job"]["accumulated"]) == (recipe.context_length, recipe.batch_contexts)
    assert found["job"]["expert_parallel"] == 8


@pytest.mark.parametrize("context", [2**20, 2**23])
def test_a_million_tokens_fit_as_the_recipe_has_them(capsys, context):
    found = planned(capsys, f"linear-llama3-1b-1m --gpu H200 --context {context}")
    assert found["plan"]["fits"] and found["plan"]["memory"]["peak"] < 0.9 * 133.3 * 2**30


def test_a_recipe_on_as_many_gpus_as_it_is_not_made_for(capsys):
    found = planned(capsys, "linear-llama3-1b-128k --gpus 2 --context 65536")
    assert found["plan"]["fits"] and found["plan"]["setting"]["sequence_parallel"] in (1, 2)


def test_a_run_is_read_from_its_directory_also_an_old_one(config, capsys):
    train(replace(config, steps=1, eval_every=1))
    capsys.readouterr()
    found = planned(capsys, config.run_dir)
    assert found["job"]["context"] == 96 and found["job"]["half"] == 8
    assert found["plan"]["setting"]["recompute"] == "none"  # what the run was settled to, on a CPU
    (settings,) = (file for file in Path(config.run_dir).glob("checkpoints/step-*/config.json"))
    saved = json.loads(settings.read_text()) | {"recompute": True}
    del saved["offload_activations"]
    settings.write_text(json.dumps(saved))
    assert planned(capsys, config.run_dir)["plan"]["setting"]["recompute"] == "full"


def test_a_table_and_a_picture_are_for_people(tmp_path, capsys):
    picture = tmp_path / "memory.png"
    options = "linear_llama3_8b --context 2097152 --gpus 2 --recompute full"
    cli.main(["plan", *options.split(), "--plot", str(picture)])
    printed = capsys.readouterr().out
    for words in ("parameters, layers LLLN x 8", "peak memory", "optimiser states", "time of a step", "tokens/s"):
        assert words in printed
    assert "does not fit; to change: --" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nothing", "model: got 'nothing', expected a run's directory, or one of tiny, mini, linear_llama3_1b"),
        ("tiny", "context: got None, expected a number of tokens, for the preset tiny"),
        ("tiny --context 64 --gpu H300", "gpu: got 'H300', expected here, or one of"),
        ("tiny --context 64 --gpus 3 --sequence-parallel 2", "sequence_parallel: got 2, expected a divisor of the 3"),
        ("tiny --context 64 --mixer tiny", "mixer: got 'tiny', expected one of linear,"),
    ],
)
def test_what_cannot_be_planned_is_named_in_a_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["lasp", "plan", *options.split()])
    with pytest.raises(SystemExit):
        cli.console()
    assert capsys.readouterr().err.startswith(f"lasp: {message}")


def large(config, **changes):
    """A run that no machine of tests could do."""
    return replace(config, model=linear_llama3_1b(pattern="L"), context_length=2**20, batch_contexts=1, **changes)


@pytest.mark.parametrize(
    ("tokens", "offload", "policy"),
    [
        (4096, False, ("none", None)),
        (2**15, False, ("selective", 4)),
        (2**20, False, ("full", None)),
        (2**12, True, ("selective", None)),
    ],
)
def test_auto_is_the_least_recomputation_that_fits_the_gpu(config, monkeypatch, tokens, offload, policy):
    config = large(config, parallel=ParallelConfig(), dtype="bfloat16", offload_activations=offload)
    config = replace(config, context_length=tokens)
    with join_world(config) as world:
        assert planning.settled(config, world).recompute == ("selective" if offload else "none")  # on a CPU
        monkeypatch.setattr(planning, "of_device", lambda device: GPUS["H100"])
        world.device = torch.device("cuda", 0)
        settled = planning.settled(config, world)
        assert settled == replace(config, recompute=policy[0], recompute_layers=policy[1])
        assert planning.settled(settled, world) is settled


@pytest.mark.parametrize(("tokens", "policy", "graphs"), [(2**20, "full", 16), (2**23, "selective", 1)])
def test_auto_computes_segments_once_where_that_fits(config, monkeypatch, tokens, policy, graphs):
    config = large(config, parallel=ParallelConfig(), dtype="bfloat16", segment_tokens=2**16)
    config = replace(config, context_length=tokens)
    with join_world(config) as world:
        assert planning.settled(config, world).segment_graphs is None  # on a CPU
        monkeypatch.setattr(planning, "of_device", lambda device: GPUS["H200"])
        world.device = torch.device("cuda", 0)
        settled = planning.settled(config, world)
        assert (settled.recompute, settled.segment_graphs) == (policy, graphs)
        assert planning.settled(replace(config, segment_graphs=2), world).segment_graphs == 2


def test_auto_knows_deepspeed(config, monkeypatch):
    engine = {"engine": "deepspeed", "deepspeed": DeepSpeedConfig(stage=3), "dtype": "bfloat16"}
    config = replace(config, parallel=ParallelConfig(fsdp=False), **engine)
    with join_world(config) as world:
        monkeypatch.setattr(planning, "of_device", lambda device: GPUS["H100"])
        world.device = torch.device("cuda", 0)
        assert planning.settled(config, world).recompute == "none"


def test_a_run_without_memory_says_what_grew_and_what_to_do(config, monkeypatch):
    """The plan is told of a larger model than the one that runs."""

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has …")

    told = large(config, parallel=ParallelConfig(), dtype="bfloat16", recompute="full")
    job_of = planning.job_of
    monkeypatch.setattr(planning, "job_of", lambda config, gpu, gpus: job_of(told, gpu, gpus))
    monkeypatch.setattr(planning, "of_device", lambda device: GPUS["H200"])
    monkeypatch.setattr("lasp.training.train.compute_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(replace(config, recompute="full"))
    said = str(caught.value)
    assert said.startswith("CUDA out of memory. Tried to allocate 16.00 GiB. Of 139.8 GiB the plan gives 145.8 to")
    assert "to the backward of layer 16: one layer 64.4, layer inputs 64.0," in said
    assert "What has grown most with the context: one layer." in said
    assert "Proposed instead: --offload-activations, 94.3 GiB" in said
    place, traceback = caught.value.__notes__
    assert place == "on rank 0 of 1, during step 1"
    assert traceback == f"(traceback: {config.run_dir}/ranks/traceback-0.txt)"
