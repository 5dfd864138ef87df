"""Configurations of any values: refused by ValueError, or a model that runs."""

import json
from dataclasses import MISSING, asdict, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lasp.config import MIXERS, DataConfig, DeepSpeedConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.distillation.config import Distillation
from lasp.evaluation.config import Evaluation
from lasp.evaluation.extension import Extension
from lasp.evaluation.quality.config import QualityTable
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.tasks import TASKS
from lasp.fields import from_dict
from lasp.models import Decoder, count_parameters
from lasp.parallel import SequenceParallel

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 8)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["LN", "L", "N", "cpu", "full", "zigzag", "bfloat16", "adamw"])
    | st.lists(st.integers(0, 3), max_size=2)
    | st.tuples(st.floats(0, 1), st.floats(0, 1))
)
WHOLE = {
    ModelConfig: {
        "vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 8, "pattern": "LN"
    },
    DataConfig: {"train": "a", "valid": "b"},
    OptimizerConfig: {},
    ParallelConfig: {},
    DeepSpeedConfig: {},
    Distillation: {},
    Evaluation: {"model": "run"},
    Extension: {"model": "run", "output": "longer"},
    QualityTable: {"run_dir": "table", "corpus": ("text",), "models": ("gla", "softmax")},
    RecallSweep: {"run_dir": "sweep", "models": ("gla+conv:LN",)},
    **{type(task): {} for task in TASKS.values()},
}  # fmt: skip
WHOLE[TrainConfig] = {
    "model": ModelConfig(**WHOLE[ModelConfig]),
    "data": DataConfig(**WHOLE[DataConfig]),
    "run_dir": "run",
    "steps": 3,
    "context_length": 8,
}


@given(st.data(), st.sampled_from(sorted(WHOLE, key=lambda kind: kind.__name__)))
def test_any_value_of_any_field(data, kind):
    """Two fields are anything; what is taken goes through JSON and comes back as it was."""
    changes: dict[str, Any] = {}
    for name in data.draw(st.lists(st.sampled_from([field.name for field in fields(kind)]), max_size=2, unique=True)):
        changes[name] = data.draw(ANYTHING)
    try:
        made = kind(**(WHOLE[kind] | changes))
    except ValueError as error:
        assert any(name in str(error) for name in (*WHOLE[kind], *changes, *(f.name for f in fields(kind))))
        return
    assert from_dict(kind, json.loads(json.dumps(asdict(made)))) == made


@given(st.sampled_from([field.name for field in fields(TrainConfig)]))
def test_a_field_that_is_missing_or_unknown_is_refused(name):
    values = asdict(TrainConfig(**WHOLE[TrainConfig]))
    with pytest.raises(ValueError, match="no_field"):
        from_dict(TrainConfig, values | {"no_field": 1})
    field = next(field for field in fields(TrainConfig) if field.name == name)
    del values[name]
    if field.default is MISSING and field.default_factory is MISSING:
        with pytest.raises(ValueError, match=name):
            from_dict(TrainConfig, values)
    else:
        from_dict(TrainConfig, values)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    few = st.integers(1, 4)
    return {
        "vocab_size": draw(st.integers(2, 20)),
        "hidden_size": draw(st.sampled_from([2, 4, 6, 8, 12])),
        "num_layers": draw(few),
        "num_heads": draw(few),
        "intermediate_size": draw(st.integers(1, 9)),
        "pattern": draw(st.sampled_from(["L", "N", "LN", "LLN", "NL"])),
        "mixer": draw(st.sampled_from(MIXERS)),
        "head_dim": draw(st.none() | st.sampled_from([1, 2, 4, 6])),
        "value_head_dim": draw(st.none() | st.integers(1, 5)),
        "num_kv_heads": draw(st.none() | few),
        "short_conv": draw(st.sampled_from([False, False, True])),
        "conv_width": draw(few),
        "num_householder": draw(few),
        "negative_eigenvalues": draw(st.sampled_from([None, None, False, True])),
        "tie_embeddings": draw(st.booleans()),
        "num_experts": draw(st.sampled_from([0, 0, 1, 3])),
        "experts_per_token": draw(few),
        "num_shared_experts": draw(st.integers(0, 2)),
        "moe_every": draw(few),
        "router_scores": draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize_expert_weights": draw(st.booleans()),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.1])),
        "expert_bias_rate": draw(st.sampled_from([0.0, 0.1])),
    }


@given(shapes(), st.integers(1, 20), st.sampled_from(["contiguous", "zigzag"]), st.sampled_from(["none", "full"]))
def test_a_shape_is_refused_or_trains(shape, tokens, layout, recompute):
    try:
        config = ModelConfig(**shape)
    except ValueError:
        return
    torch.manual_seed(0)
    model = Decoder(config).double()
    model.recompute = recompute
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    seq = SequenceParallel(None, layout=layout, aligned=config.aligned).sequence(tokens)
    words = torch.randint(config.vocab_size, (2, 1, tokens))
    loss, count = model(seq.shard(words[0]), seq, labels=seq.shard(words[1]))
    assert count == tokens
    (loss / count).backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
