import dataclasses
import math
import pathlib
from dataclasses import replace
from fractions import Fraction
from typing import get_type_hints

import pytest

from lasp.config import DataConfig, DeepSpeedConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.training.recipes import RECIPES

MODEL = {"vocab_size": 257, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 64}


def make(**changes):
    fields = {
        "model": ModelConfig(**MODEL),
        "data": DataConfig(train="a", valid="b"),
        "run_dir": "run",
        "steps": 100,
        "context_length": 64,
    }
    return TrainConfig(**fields | {"batch_contexts": 4} | changes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_frozen_config(name):
    config = RECIPES[name]()
    assert isinstance(config, TrainConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 1


def test_run_directories_of_recipes_differ():
    directories = [recipe().run_dir for recipe in RECIPES.values()]
    assert len(set(directories)) == len(directories)


CONFIGS = (make().model, make().data, make(), ParallelConfig(), OptimizerConfig(), DeepSpeedConfig())


def fields_of(*configs):
    return [pytest.param(c, f.name, id=f"{type(c).__name__}-{f.name}") for c in configs for f in dataclasses.fields(c)]


def require_checked(config, field):
    """A field whose annotation is a bare int, float or str takes some of these: give it a type of lasp.fields."""
    kind = str(get_type_hints(type(config))[field])
    wrong = [object(), [], {}, b"", 1j, -1, -1.0, math.nan, -math.inf, "", "\0", (object(),), 10**400]
    wrong += [] if "bool" in kind else [True, False]
    wrong += [] if "None" in kind or "Optional" in kind else [None]
    wrong += [] if "float" in kind else [2**64, 0.5, math.inf]
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
            replace(config, **{field: value})


@pytest.mark.parametrize(("config", "field"), fields_of(*CONFIGS))
def test_every_field_is_checked(config, field):
    require_checked(config, field)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (make().model, "rope_theta", 0),
        (make().model, "norm_eps", 0.0),
        (make().model, "head_dim", 0),
        (make().model, "init_std", math.inf),
        (ParallelConfig(), "timeout", 1e300),
        (DeepSpeedConfig(), "stage", True),
        (OptimizerConfig(), "betas", [0.9, 0.95]),
        (OptimizerConfig(), "betas", (0.9,)),
        (OptimizerConfig(), "betas", (0.9, True)),
        (make(), "allow_changed", "seed"),
        (make(), "run_dir", pathlib.Path("run")),
    ],
)
def test_values_at_the_edge_are_refused(config, field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        replace(config, **{field: value})


def test_values_at_the_edge_are_taken():
    assert make(seed=2**64 - 1, allow_changed=("seed", "data")).seed == 2**64 - 1
    assert OptimizerConfig(lr=1, clip_norm=math.inf, betas=(0, 0.5), weight_decay=0).lr == 1


@pytest.mark.parametrize(
    ("cls", "field", "value", "constraint"),
    [
        (ParallelConfig, "sequence_parallel", 0, "at least 1"),
        (ParallelConfig, "data_parallel", 0, "at least 1"),
        (ParallelConfig, "expert_parallel", 0, "at least 1"),
        (ParallelConfig, "layout", "spiral", "contiguous, zigzag"),
        (ParallelConfig, "state_exchange", "pigeon", "all_gather, ring, scan"),
        (ParallelConfig, "softmax", "none", "ring, all_gather, ulysses"),
        (ParallelConfig, "timeout", 0.0, "positive"),
        (ParallelConfig, "timeout", float("inf"), "positive number"),
        (OptimizerConfig, "lr", 0.0, "positive"),
        (OptimizerConfig, "lr", float("nan"), "positive"),
        (OptimizerConfig, "betas", (0.9, 1.0), r"\[0, 1\)"),
        (OptimizerConfig, "weight_decay", -0.1, "at least 0"),
        (OptimizerConfig, "warmup_steps", -1, "at least 0"),
        (OptimizerConfig, "schedule", "linear", "cosine, wsd"),
        (OptimizerConfig, "decay_fraction", 0.0, r"\(0, 1\]"),
        (OptimizerConfig, "min_ratio", 1.5, r"\[0, 1\]"),
        (OptimizerConfig, "clip_norm", 0.0, "positive"),
    ],
)
def test_bad_value_is_named(cls, field, value, constraint):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected .*{constraint}"):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("run_dir", "", "path"),
        ("steps", 0, "at least 1"),
        ("batch_contexts", 0, "at least 1"),
        ("context_length", 1, "at least 2"),
        ("eval_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("checkpoint_keep", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("dtype", "float16", "bfloat16, float32, float64"),
        ("device", "tpu", "auto, cpu, cuda"),
    ],
)
def test_bad_training_value_is_named(field, value, constraint):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected .*{constraint}"):
        make(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("train", ""), ("valid", ""), ("tokenizer", ""), ("eval_contexts", 0)])
def test_bad_data_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        DataConfig(**{"train": "a", "valid": "b", field: value})


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("pattern", "LLX", "only the letters L and N"),
        ("pattern", "", "at least one letter"),
        ("num_layers", 5, "a multiple"),
        ("num_heads", 3, "hidden_size"),
        ("num_kv_heads", 3, "a divisor of num_heads=4"),
        ("mixer", "rnn", "one of linear"),
    ],
)
def test_bad_model_value_is_named(field, value, constraint):
    with pytest.raises(ValueError, match=constraint):
        ModelConfig(**MODEL | {field: value})


@pytest.mark.parametrize("layers", [{"pattern": "LLLN"}, {"pattern": "L", "window": 8}], ids=["hybrid", "window"])
@pytest.mark.parametrize(("kv_heads", "field"), [(None, "num_heads"), (2, "num_kv_heads")])
def test_heads_that_ulysses_cannot_split(kv_heads, field, layers):
    ranks = 3 if kv_heads is None else 4
    model = ModelConfig(**MODEL | layers, num_kv_heads=kv_heads)
    with pytest.raises(ValueError, match=f"{field}: got .* multiple of sequence_parallel={ranks}"):
        make(model=model, parallel=ParallelConfig(sequence_parallel=ranks, softmax="ulysses"))
    whatever_is_left = make(model=model, parallel=ParallelConfig(sequence_parallel=None, softmax="ulysses"))
    with pytest.raises(ValueError, match=f"{field}: got .* multiple of sequence_parallel={ranks}"):
        whatever_is_left.mesh_shape(ranks)


def test_bfloat16_needs_fsdp():
    with pytest.raises(ValueError, match="dtype: got 'bfloat16', expected float32 or float64 without fsdp"):
        make(parallel=ParallelConfig(fsdp=False))
    assert make(parallel=ParallelConfig(fsdp=False), dtype="float32").dtype == "float32"


def test_mesh_shape_fills_or_checks_the_world():
    assert ParallelConfig(sequence_parallel=2).mesh_shape(8) == (4, 2)
    assert ParallelConfig(sequence_parallel=2, data_parallel=4).mesh_shape(8) == (4, 2)
    assert ParallelConfig(sequence_parallel=None).mesh_shape(3) == (1, 3)
    assert ParallelConfig(sequence_parallel=None, data_parallel=2).mesh_shape(8) == (2, 4)
    with pytest.raises(ValueError, match="sequence_parallel: got 2, expected a divisor of the world size 3"):
        ParallelConfig(sequence_parallel=2).mesh_shape(3)
    for world in (3, 1):
        with pytest.raises(ValueError, match=f"data_parallel: got 2, expected .* = {world} / 1"):
            ParallelConfig(sequence_parallel=None, data_parallel=2).mesh_shape(world)
    with pytest.raises(ValueError, match=r"data_parallel: got 2, expected world size / sequence_parallel = 8 / 2"):
        ParallelConfig(sequence_parallel=2, data_parallel=2).mesh_shape(8)


def test_contexts_must_divide_over_data_parallel_groups():
    assert make().mesh_shape(4) == (4, 1)
    with pytest.raises(ValueError, match="batch_contexts: got 4, expected a multiple of data_parallel=3"):
        make().mesh_shape(3)
    with pytest.raises(ValueError, match="eval_contexts: got 8, expected a multiple of data_parallel=3"):
        make(batch_contexts=3).mesh_shape(3)


def test_expert_parallel_must_fit_the_model_and_the_world():
    mixture = ModelConfig(**MODEL, num_experts=12)
    with pytest.raises(ValueError, match="expert_parallel: got 2, expected 1 for a model without experts"):
        make(parallel=ParallelConfig(expert_parallel=2))
    with pytest.raises(ValueError, match="num_experts: got 12, expected a multiple of expert_parallel=5"):
        make(model=mixture, parallel=ParallelConfig(expert_parallel=5))
    run = make(model=mixture, parallel=ParallelConfig(expert_parallel=2))
    with pytest.raises(ValueError, match="expert_parallel: got 2, expected a divisor of the world size 3"):
        run.mesh_shape(3)
    assert run.mesh_shape(4) == (4, 1)
    odd = make(model=replace(mixture, expert_intermediate_size=25), parallel=ParallelConfig(expert_parallel=2))
    with pytest.raises(
        ValueError, match="expert_intermediate_size: got 25, expected a multiple of world size / expert"
    ):
        odd.mesh_shape(4)


def test_deepspeed_takes_no_mixtures():
    mixture = ModelConfig(**MODEL, num_experts=12)
    with pytest.raises(ValueError, match="num_experts: got 12, expected 0 with engine='deepspeed'"):
        make(model=mixture, engine="deepspeed", parallel=ParallelConfig(fsdp=False), dtype="float32")


def test_older_runs_say_true_or_false_of_recomputation():
    assert make(recompute=True).recompute == "full" and make(recompute=False).recompute == "none"
    assert make() == make(recompute="auto") == replace(make(), recompute="auto")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recompute": "none", "offload_activations": True}, "offload_activations: got True, expected False with"),
        (
            {"recompute": "full", "recompute_layers": 5},
            "recompute_layers: got 5, expected at most num_layers=4",
        ),
        ({"recompute_layers": 1}, "recompute_layers: got 1, expected None with recompute='auto'"),
        ({"recompute": "none", "recompute_layers": 0}, "recompute_layers: got 0, expected None with recompute='none'"),
        ({"recompute": "some"}, "recompute: got 'some', expected one of auto, none, selective, full or True or False"),
    ],
)
def test_recomputation_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 2**23 + 1}, "context_length: got 8388609, expected at most 8388608, .* 24 levels"),
        (
            {"parallel": ParallelConfig(state_exchange="ring")},
            "state_exchange: got 'ring', expected 'auto'",
        ),
    ],
)
def test_what_levels_cannot_do_is_refused(changes, message):
    plain, pure = ModelConfig(**MODEL), ModelConfig(**MODEL, mixer="log_linear_mamba2", pattern="LN")
    for model in (plain, replace(pure, pattern="N")):
        make(model=model, **changes)
    make(model=pure, context_length=2**23)
    with pytest.raises(ValueError, match=message):
        make(model=pure, **changes)


def test_corpora_have_weights_or_not():
    def corpora(*names):
        return DataConfig(train=names, valid="b").corpora

    assert DataConfig(train="a", valid="b").corpora == corpora("a") == {"a": None}
    assert corpora("a:0.7", "b/c:d:0.3") == {"a": Fraction(7, 10), "b/c:d": Fraction(3, 10)}
    assert corpora("a", "b") == {"a": None, "b": None}
    for names, expected in (
        (("a:1", "b"), "a weight for all corpora, or for none"),
        (("a:1", "a:2"), "each corpus once"),
        (("a:0", "b:1"), "a weight above 0"),
        ((), "at least one corpus"),
    ):
        with pytest.raises(ValueError, match=rf"data\.train: got .*, expected {expected}"):
            corpora(*names)


def test_contexts_that_are_computed_one_at_a_time():
    mixture = replace(make().model, num_experts=12)
    for changes, expected in (
        ({"segment_tokens": 32}, "1 with segment_tokens"),
        (
            {"engine": "deepspeed", "parallel": ParallelConfig(fsdp=False), "dtype": "float32"},
            "1 with engine='deepspeed'",
        ),
        ({"model": mixture}, "1 for a model with experts"),
    ):
        make(**changes)
        with pytest.raises(ValueError, match=f"contexts_at_once: got 2, expected {expected}"):
            make(contexts_at_once=2, **changes)


def test_a_curriculum_is_of_lengths_and_steps():
    config = make(curriculum=("16:2", "32:3"))
    assert [config.context_length_at(step) for step in range(7)] == [16, 16, 32, 32, 32, 64, 64]
    for changes, expected in (
        ({"curriculum": ("16",)}, "LENGTH:STEPS, as 4096:1000"),
        ({"curriculum": ("24:1",)}, "a length of at least 2 that divides context_length=64"),
        ({"curriculum": ("1:1",)}, "a length of at least 2"),
        ({"curriculum": ("16:1",), "segment_tokens": 32}, "a length of at least segment_tokens=32"),
        ({"curriculum": ("16:1",), "engine": "deepspeed", "parallel": ParallelConfig(fsdp=False)}, "none with engine"),
    ):
        with pytest.raises(ValueError, match=f"curriculum: got .*, expected .*{expected}"):
            make(**changes)
