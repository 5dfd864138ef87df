"""Weights go from lasp's decoders to Megatron's models and back without a bit changed, and compute the same there."""

import json
from dataclasses import replace

import pytest
import torch

from lasp import cli
from lasp.config import ModelConfig
from lasp.integrations import megatron_weights
from lasp.models import Decoder
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.train import train
from tests.training import conftest

config, data = conftest.config, conftest.data

SHAPE = ModelConfig(
    vocab_size=100,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
)
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 12, "moe_every": 2}
BY_BIAS = {"router_scores": "sigmoid", "expert_bias_rate": 1e-3}
SHAPES = {
    "dense": SHAPE,
    "pure": replace(SHAPE, pattern="L", mixer="mamba2"),
    "levels": replace(SHAPE, pattern="LN", mixer="log_linear_mamba2"),
    "softmax": replace(SHAPE, pattern="N", num_kv_heads=4),
    "tied": replace(SHAPE, tie_embeddings=True, mixer="retention"),
    "experts": replace(SHAPE, mixer="kda", **EXPERTS),
    "experts by bias": replace(SHAPE, **EXPERTS, **BY_BIAS),
}


def draw(shape: ModelConfig, gen: torch.Generator) -> Decoder:
    """A decoder of which no weight is a round number."""
    decoder = Decoder(shape)
    decoder.init_weights(gen)
    with torch.no_grad():
        for weight in decoder.state_dict().values():
            weight += 0.1 * torch.randn(weight.shape, generator=gen)
    return decoder


def assert_same(got: Decoder, expected: Decoder) -> None:
    weights = got.state_dict()
    if expected.head is None:
        assert torch.equal(weights.pop("head.weight"), expected.embedding.weight)
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_for_bit(name, tmp_path, gen):
    decoder = draw(SHAPES[name], gen)
    megatron_weights.save(decoder, tmp_path / "megatron")
    assert_same(megatron_weights.load(tmp_path / "megatron"), decoder)


def test_a_run_goes_to_megatron_and_back(config, tmp_path, capsys):
    config = replace(config, dtype="float32", steps=1)
    train(config)
    cli.main(["export", config.run_dir, str(tmp_path / "megatron"), "--to", "megatron"])
    cli.main(["import", str(tmp_path / "megatron"), str(tmp_path / "weights")])
    assert f"--initial-weights {tmp_path}/weights" in capsys.readouterr().out
    trained, back = Decoder(config.model), Decoder(replace(config.model, tie_embeddings=False))
    checkpoint.load_model(checkpoint.require_latest(config.run_dir), trained)
    checkpoint.load_model(tmp_path / "weights", back)
    assert_same(back, trained)


def test_what_does_not_fit_is_refused(tmp_path, gen):
    folder = tmp_path / "megatron"
    megatron_weights.save(draw(SHAPE, gen), folder)
    with pytest.raises(ValueError, match="output: got .*, expected a new or empty directory"):
        megatron_weights.save(draw(SHAPE, gen), folder)
    megatron_weights.require_same_shape(folder, replace(SHAPE, init_std=1.0, value_head_dim=8))
    with pytest.raises(ValueError, match="got 'a model with mixer gated_delta_net, not gla', expected this run's"):
        megatron_weights.require_same_shape(folder, replace(SHAPE, mixer="gla"))
    megatron_weights.save(draw(mixture := replace(SHAPE, **EXPERTS), gen), tmp_path / "mixture")
    with pytest.raises(ValueError, match="got 'a model with normalize_expert_weights True, not False'"):
        megatron_weights.require_same_shape(tmp_path / "mixture", replace(mixture, normalize_expert_weights=False))
    shared = replace(SHAPE, **EXPERTS, num_shared_experts=1)
    with pytest.raises(ValueError, match="num_shared_experts: got 1, expected 0"):
        megatron_weights.save(Decoder(shared), tmp_path / "shared")
    for changes, message in (
        ({"window": 4}, "window: got 4, expected None: Megatron's layers have none"),
        ({"negative_eigenvalues": True}, "negative_eigenvalues: got True, expected None"),
        ({"mixer": "gated_delta_product", "num_householder": 3}, "num_householder: got 3, expected 2"),
        ({"mixer": "gla", "feature_map": "relu"}, "feature_map: got 'relu', expected None"),
        ({"mixer": "gla", "short_conv": True}, "short_conv: got True, expected False"),
        ({"pattern": "N", "rope_theta": None}, "rope_theta: got None, expected a number"),
        (
            {**EXPERTS, **BY_BIAS, "normalize_expert_weights": False},
            "normalize_expert_weights: got False, expected True",
        ),
        ({**EXPERTS, "experts_per_token": 1}, "normalize_expert_weights: got True, expected False"),
        ({"mixer": "lasp.models.mixers:SoftmaxMixer"}, "model: got .*:SoftmaxMixer', expected one of lasp's"),
    ):
        with pytest.raises(ValueError, match=message):
            megatron_weights.save(Decoder(replace(SHAPE, **changes)), tmp_path / "other")
    shape = json.loads((folder / "lasp.json").read_text())
    (folder / "lasp.json").write_text(json.dumps(shape | {"pattern": "LLN", "num_layers": 3}))
    with pytest.raises(
        ValueError, match=r"got \['decoder.layers.2.input_layernorm.*expected only weights of the decoder"
    ):
        megatron_weights.load(folder)
    (folder / "lasp.json").write_text(json.dumps(shape | {"num_layers": 8}))
    with pytest.raises(ValueError, match="expected a complete one of this model"):
        megatron_weights.load(folder)
    (folder / "lasp.json").unlink()
    with pytest.raises(ValueError, match=r"expected a directory with a lasp\.json"):
        megatron_weights.load(folder)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("name", ["dense", "pure", "experts", "experts by bias"])
def test_any_mesh_computes_what_the_decoder_does(name, ranks, run_seed, shared_tmp_path):
    pytest.importorskip("megatron.core")
    from lasp.integrations.megatron.train import load_weights
    from tests.integrations import megatron_models as models

    if ranks.size != 4:
        pytest.skip("wants 4 ranks")
    shape, gen = replace(SHAPES[name], vocab_size=128), torch.Generator().manual_seed(run_seed)
    decoder, batches = draw(shape, gen).eval(), models.draw_batches(gen)
    folder, again = shared_tmp_path / "megatron", shared_tmp_path / "again"
    if ranks.rank == 0:
        megatron_weights.save(decoder, folder)
    ranks.barrier(f"{folder} is written")
    mesh, changes = models.Mesh(tp=2, pp=2), {}
    if shape.num_experts:
        mesh, changes = models.Mesh(tp=2, cp=2, ep=2), {"moe_router_score_function": shape.router_scores}
        changes |= {"moe_layer_freq": [0, 1, 0, 1], "moe_router_enable_expert_bias": shape.expert_bias_rate > 0}
    mesh.enter()
    layers = {"pattern": shape.pattern, "mixer": shape.mixer}
    model = models.gpt(mesh, moe=bool(shape.num_experts), vocabulary=shape.vocab_size, **layers, **changes)
    kind = {**layers, "rope_theta": shape.rope_theta}
    own = megatron_weights.shape_of(model.config, vocab_size=shape.vocab_size, **kind)
    load_weights(model, str(folder), own)
    models.save(model, again)
    if ranks.rank == 0:
        megatron_weights.write_shape(again, own)
    ranks.barrier(f"{again} is written")
    assert_same(megatron_weights.load(again), decoder)

    labels = batches[0]["labels"].where(batches[0]["loss_mask"] > 0, -100)
    with torch.no_grad():
        total, count = decoder(batches[0]["tokens"], SequenceParallel(None).sequence(models.LENGTH), labels=labels)
    assert models.train_on_mesh(model, batches)[0] == pytest.approx((total / count).item(), rel=1e-5)
