"""What cannot be built or read is refused with a ValueError."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

megatron = pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.data import TokenFileWriter, load_tokenizer
from lasp.integrations.megatron import LinearSelfAttention, SoftmaxCoreAttention, gpt_layer_specs
from lasp.integrations.megatron.data import build_dataset, micro_batches, order
from lasp.integrations.megatron.experts import GroupedExperts
from lasp.integrations.megatron.run import Run
from lasp.integrations.megatron_weights import shape_of
from tests.training.test_config import fields_of, require_checked

RUN = Run(preset="tiny", data="d", run_dir="r", steps=1, sequence_length=64)


def config(**changes) -> TransformerConfig:
    options = {
        "num_layers": 8,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }
    return TransformerConfig(**(options | changes))


def build(pattern: str = "LLLN", mixer: str = "gla", **changes):
    return gpt_layer_specs(config(**changes), pattern, mixer=mixer, pp_rank=0)


MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8}
KIND = {"pattern": "LLLN", "mixer": "gla", "vocab_size": 8, "rope_theta": 1e4}


def test_pattern_and_experts_choose_the_layers():
    shape = config(**MOE, moe_layer_freq=[0, 1] * 4, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    for stage in (0, 1):
        specs = gpt_layer_specs(shape, "LLN" + "N" * 5, mixer="gla", pp_rank=stage).layer_specs
        linear = [spec.submodules.self_attention.module is LinearSelfAttention for spec in specs]
        assert linear == [[True, True, False, False], [False] * 4][stage]
        softmax = specs[2].submodules.self_attention.submodules
        assert softmax.core_attention is SoftmaxCoreAttention
        assert ["MoE" in str(spec.submodules.mlp) for spec in specs] == [False, True, False, True]
        assert not any(GroupedExperts.__name__ in str(spec.submodules.mlp) for spec in specs)
    assert shape.hetereogenous_dist_checkpoint
    shape = config(**MOE, moe_layer_freq=[0, 1] * 4, moe_grouped_gemm=True)
    specs = gpt_layer_specs(shape, "L", mixer="gla", pp_rank=0).layer_specs
    assert [GroupedExperts.__name__ in str(spec.submodules.mlp) for spec in specs] == [False, True] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "LLX"}, "pattern: got 'LLX', expected letters L and N"),
        ({"pattern": "LLN"}, "num_layers: got 8, expected a multiple of the length of the pattern"),
        ({"mixer": "rwkv"}, "mixer: got 'rwkv', expected one of"),
        ({"tensor_model_parallel_size": 8}, r"num_attention_heads \(4\) must be a multiple of"),
        ({"num_attention_heads": 6, "num_query_groups": 3, "tensor_model_parallel_size": 2}, "num_query_groups"),
        (MOE | {"tensor_model_parallel_size": 2}, "sequence_parallel: got False, expected True"),
        (MOE | {"moe_layer_freq": [1, 0]}, "moe_layer_freq"),
        (MOE | {"moe_layer_freq": 0}, "moe_layer_freq: got 0, expected a positive number, or 8 numbers 0 or 1"),
        (MOE | {"moe_layer_freq": None}, "moe_layer_freq: got None, expected a positive number"),
        (
            MOE | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
            "expert_tensor_parallel_size: got 1, expected tensor_model_parallel_size=2",
        ),
        (
            MOE | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_grouped_gemm": True},
            "expert_tensor_parallel_size: got 2, expected 1 with moe_grouped_gemm",
        ),
        (
            MOE | {"moe_grouped_gemm": True, "activation_func": F.gelu},
            "moe_grouped_gemm: got True, expected False unless experts are SwiGLU",
        ),
        (
            MOE | {"moe_grouped_gemm": True, "moe_expert_capacity_factor": 1.0},
            "moe_expert_capacity_factor: got 1.0, expected None with moe_grouped_gemm",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_options_that_a_mixer_does_not_have():
    specs = gpt_layer_specs(config(), "L", mixer="gla", pp_rank=0, conv_width=3).layer_specs
    assert specs[0].submodules.self_attention.params == {"mixer": "gla", "conv_width": 3}
    with pytest.raises(ValueError, match=r"mixer_options: got \['conv_widht'\], expected only value_head_dim"):
        gpt_layer_specs(config(), "L", mixer="gla", pp_rank=0, conv_widht=3)


def test_pipeline_that_does_not_divide():
    shape = config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    shape.pipeline_model_parallel_size = 3  # Megatron's own check is an assertion
    with pytest.raises(ValueError, match="num_layers: got 8, expected a multiple of the 3 pipeline stages"):
        gpt_layer_specs(shape, "L", mixer="gla", pp_rank=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization: got 'LayerNorm', expected RMSNorm"),
        ({"qk_layernorm": True}, "qk_layernorm: got True, expected False"),
        ({"add_qkv_bias": True}, "add_qkv_bias: got True"),
        ({"activation_func": F.gelu}, "activation_func: got"),
        ({"rotary_interleaved": True}, "rotary_interleaved: got True"),
        (MOE | {"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor: got 2.5, expected None"),
        (MOE | {"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size: got 8, expected None"),
    ],
)
def test_what_is_no_decoder_of_lasps(changes, message):
    with pytest.raises(ValueError, match=message):
        shape_of(config(**changes), **KIND)


@pytest.mark.parametrize(
    ("chosen", "router", "normalized"),
    [
        (2, {}, True),
        (2, {"moe_router_pre_softmax": True}, False),
        (1, {"moe_router_pre_softmax": True}, False),
        (2, {"moe_router_score_function": "sigmoid"}, True),
        (1, {"moe_router_score_function": "sigmoid"}, False),
    ],
)
def test_weights_of_experts_as_megatrons_routers_have_them(chosen, router, normalized):
    shape = shape_of(config(**MOE, **router, moe_router_topk=chosen), **KIND)
    assert shape.normalize_expert_weights == normalized


@pytest.mark.parametrize("version", ["0.16.0", "0.15.3", "0.20.0", "1.0.0"])
def test_version_that_is_not_known(monkeypatch, version):
    monkeypatch.setattr(megatron, "__version__", version)
    with pytest.raises(ValueError, match=f"megatron-core: got '{version}', expected at least 0.16.1 and below 0.20"):
        build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout: got 0.1, expected 0"),
        ({"window_size": (4, 0)}, "window_size"),
        ({"attn_mask_type": AttnMaskType.no_mask}, "attn_mask_type"),
        ({"attention_type": "cross"}, "attention_type: got 'cross', expected 'self'"),
    ],
)
def test_bad_core_attention(changes, message):
    own = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    arguments = {name: changes.get(name, default) for name, default in own.items()}
    shape = config(**{name: value for name, value in changes.items() if name not in own})
    with pytest.raises(ValueError, match=message):
        SoftmaxCoreAttention(config=shape, layer_number=1, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "giant"}, "preset: got 'giant', expected one of"),
        ({"context_parallel": 4, "sequence_length": 68}, "sequence_length: got 68, expected a multiple of 8"),
        ({"pipeline_parallel": 3}, "pipeline_parallel: got 3, expected a divisor of the 4 layers"),
        ({"pattern": "LLN"}, "num_layers"),
        ({"model": "bert"}, "model: got 'bert', expected one of gpt, hybrid"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
    ],
)
def test_bad_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)


@pytest.mark.parametrize(("config", "field"), fields_of(RUN))
def test_every_field_of_a_run_is_checked(config, field):
    require_checked(config, field)


def test_runs_that_do_not_fit_the_ranks():
    assert replace(RUN, context_parallel=2).data_parallel(4) == 2
    with pytest.raises(ValueError, match="ranks: got 6, expected a multiple of"):
        replace(RUN, context_parallel=2, tensor_parallel=2).data_parallel(6)
    with pytest.raises(ValueError, match="global_batch: got 8, expected a multiple of 3"):
        RUN.data_parallel(3)
    with pytest.raises(ValueError, match="expert_parallel: got 3, expected a divisor of the 2 ranks"):
        replace(RUN, expert_parallel=3).data_parallel(2)
    with pytest.raises(ValueError, match=r"num_attention_heads \(4\) must be a multiple of"):
        replace(RUN, tensor_parallel=8).transformer_config(cpu=True)


@pytest.mark.parametrize("preset", ["llama3_1b", "llama3_8b", "moe_a0_3b_2b", "moe_a1b_7b"])
def test_presets_fit_clusters(preset):
    sizes = {"tensor_parallel": 2, "context_parallel": 8, "pipeline_parallel": 2}
    experts = {"expert_parallel": 8} if "moe" in preset else {}
    run = replace(RUN, preset=preset, sequence_length=131072, **sizes, **experts)
    assert run.data_parallel(64) == 2
    shape = run.transformer_config(cpu=False)
    assert len(gpt_layer_specs(shape, "LLLN", pp_rank=1).layer_specs) == shape.num_layers // 2


def test_more_epochs_are_another_order(tmp_path):
    """Megatron shuffles all epochs at once, so that a run of more steps may not be the one that was begun."""
    write(tmp_path, np.arange(1600) % 256)
    run = replace(RUN, data=str(tmp_path / "data"), run_dir=str(tmp_path / "run"), global_batch=4)
    first, same, other = (order(build_dataset(replace(run, steps=n), load_tokenizer("byte"))) for n in (2, 3, 30))
    assert first == same != other


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    tokens = np.arange(1600) % 256
    tokens[100] = 300
    write(tmp_path, tokens)
    run = replace(RUN, data=str(tmp_path / "data"), run_dir=str(tmp_path / "run"), global_batch=24)
    dataset = build_dataset(run, load_tokenizer("byte"))
    with pytest.raises(ValueError, match=r"tokens of .*data in sequences \d+ to \d+: got 300, expected 0 to 256"):
        list(micro_batches(dataset, run, 0, 0, 1, vocab_size=257))
    assert len(list(micro_batches(dataset, run, 0, 0, 1, vocab_size=301))) == 24


def test_a_loss_mask_is_refused(tmp_path):
    write(tmp_path, np.arange(1600) % 256)
    (tmp_path / "data.mask").write_bytes(b"\1" * 1600)
    run = replace(RUN, data=str(tmp_path / "data"), run_dir=str(tmp_path / "run"), global_batch=4)
    with pytest.raises(ValueError, match=r"data: got .* expected token files without a loss mask \(data\.mask\)"):
        build_dataset(run, load_tokenizer("byte"))


def write(folder, tokens):
    with TokenFileWriter(folder / "data", np.uint16) as writer:
        writer.add_document(tokens)
