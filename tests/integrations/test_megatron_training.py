"""What lasp.integrations.megatron.train makes of Megatron's parts: the loss, bf16, optimizers, checkpoints."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from lasp.integrations.megatron import gpt_layer_specs
from lasp.integrations.megatron.loss import summing
from lasp.integrations.megatron.run import Run
from lasp.integrations.megatron.train import Training
from lasp.models.loss import IGNORE
from tests.integrations import megatron_models as models
from tests.integrations.megatron_models import Mesh


@pytest.fixture
def four(ranks):
    if ranks.size != 4:
        pytest.skip("wants 4 ranks")


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(tp=2)], ids=str)
def test_sum_without_logits_is_that_of_megatrons_losses(gen, four, mesh, shared):
    mesh.enter()
    config = models.config(mesh, params_dtype=torch.float64)
    make = {"share_embeddings_and_output_weights": shared, "position_embedding_type": "rope"}
    plain, ours = (
        model(config, gpt_layer_specs(config, "LLLN"), models.VOCABULARY, models.LENGTH, **make)
        for model in (GPTModel, summing(GPTModel))
    )
    ours.load_state_dict(plain.state_dict())
    batch = models.row(models.draw_batches(gen)[0], 0)
    batch = models.shard_batch(batch, parallel_state.get_context_parallel_group())
    tokens, positions, mask = batch["tokens"], batch["position_ids"], batch["loss_mask"]
    wanted = (plain(tokens, positions, None, labels=batch["labels"]) * mask).sum()
    got = ours(tokens, positions, None, labels=batch["labels"].where(mask > 0, IGNORE))
    wanted.backward()
    got.backward()
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-5, atol=0)  # Megatron's are float32
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * theirs.grad.norm(), msg=name)
    assert torch.equal(ours(tokens, positions, None), plain(tokens, positions, None))


class Sequences:
    """As many sequences of 64 bytes as anybody asks for, of which there are two."""

    def __init__(self, gen: torch.Generator):
        self.rows = torch.randint(256, (2, 65), generator=gen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % 2]
        positions = torch.arange(64)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(64), "position_ids": positions}


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("preset", ["tiny", "tiny_moe"])
def test_training_in_bf16(gen, four, shared_tmp_path, preset):
    """Both optimizers take the same steps, and one goes on from its checkpoint as if nothing had been."""
    Mesh(cp=2).enter()
    run = Run(
        preset=preset,
        data="none",
        run_dir=str(shared_tmp_path),
        steps=10,
        sequence_length=64,
        global_batch=4,
        context_parallel=2,
        recompute=True,
        lr=1e-2,
        warmup_steps=0,
    )
    data = Sequences(gen)

    def start(**changes) -> Training:
        torch.manual_seed(7)
        config = run.transformer_config(cpu=False)
        config.use_cpu_initialization = True
        config.bias_activation_fusion = False  # it would be compiled
        return Training(replace(run, **changes), config, 256)

    whole, spread = start(), start(distributed_optimizer=True)
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    losses = [whole.step(data, step) for step in range(5)]
    assert losses[-1] < losses[0] - 0.3
    assert [spread.step(data, step) for step in range(5)] == pytest.approx(losses, abs=0.02)
    whole.save(5)
    again = start()
    for field, other in (("mixer", "gla"), ("rope_theta", 1e4), ("seed", 7)):
        again.run = replace(run, **{field: other})
        with pytest.raises(ValueError, match=f"{field}: got {other!r}, expected {getattr(run, field)!r}, as in"):
            again.restore()
    again.run = replace(run, seed=7, allow_changed=("seed",))
    assert again.restore() == 5
    assert again.step(data, 5) == whole.step(data, 5)
    assert again.step(data, 6) == whole.step(data, 6)
    again.model.module.module.decoder.final_layernorm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="^step 8, samples 28 to 31: gradient norm: got nan"):
        again.step(data, 7)
