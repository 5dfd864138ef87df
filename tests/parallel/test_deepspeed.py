"""A run with DeepSpeed is the run of one process, for ZeRO 0 to 3 and every split into data and sequence parallel.

SGD takes AdamW's place, because Adam's update hides a gradient of the wrong scale. What one process does is computed
plainly, in float64.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lasp.config import DeepSpeedConfig, ParallelConfig
from lasp.models import Decoder
from lasp.parallel import comm
from lasp.training import checkpoint
from lasp.training.deepspeed import DeepSpeedEngine
from lasp.training.initial import build_model
from lasp.training.metrics import read_metrics
from lasp.training.stop import Stopped
from lasp.training.train import train
from lasp.training.zero_files import load_weights
from tests.parallel import test_stopping, test_training
from tests.parallel.test_training import alone, splits
from tests.patience import PATIENCE
from tests.training.test_unpickling import Payload, seal

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed reads it when imported
deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.mpi, pytest.mark.cpu_only("it trains on CPUs")]

native_config, tell_one_rank = test_training.config, test_stopping.tell_one_rank


@pytest.fixture(autouse=True)
def clean_deepspeed(monkeypatch):
    """DeepSpeed would keep to the world's group of its first run, which is renewed when a test has failed; and compile
    collectives in shared memory for a minute."""
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    monkeypatch.setattr("deepspeed.utils.groups._WORLD_GROUP", None)
    monkeypatch.setattr("deepspeed.comm.comm.cdb", None)


@pytest.fixture
def config(native_config):
    """Not clipped; every group accumulates at least two contexts."""
    config = native_config
    optimizer = replace(config.optimizer, lr=0.3, warmup_steps=0, clip_norm=float("inf"))
    contexts = 2 * config.batch_contexts
    return replace(config, batch_contexts=contexts, dtype="float32", optimizer=optimizer, engine="deepspeed")


@pytest.fixture
def sgd(monkeypatch):
    def build(model, config):
        return torch.optim.SGD(model.parameters(), lr=config.lr)

    monkeypatch.setattr("lasp.training.deepspeed.build_optimizer", build)
    monkeypatch.setattr(test_training, "build_optimizer", build)


def variant(config, name, **changes):
    return replace(config, run_dir=f"{config.run_dir}-{name}", **changes)


def final_weights(config):
    model = Decoder(config.model)
    checkpoint.load_model(checkpoint.require_latest(config.run_dir), model)
    return model.state_dict()


@pytest.mark.parametrize(
    ("zero", "changes"),
    [
        ({"stage": 0}, {}),
        pytest.param({"stage": 1}, {}, marks=pytest.mark.ranks(2)),
        pytest.param({"stage": 2, "offload": True}, {}, marks=pytest.mark.ranks(2)),
        pytest.param({"stage": 3}, {"recompute": True}, marks=pytest.mark.ranks(2)),
        pytest.param({"stage": 0}, {"clip_norm": 0.1}, marks=pytest.mark.ranks(2)),
        ({"stage": 3}, {"clip_norm": 0.1}),
    ],
    ids=["0", "1", "2 offloaded", "3 recomputed", "0 clipped", "3 clipped"],
)
def test_every_stage_and_split_gives_the_run_of_one(zero, changes, ranks, config, pytestconfig, sgd):
    changes = dict(changes)
    config = replace(config, optimizer=replace(config.optimizer, clip_norm=changes.pop("clip_norm", float("inf"))))
    losses, norms, valid_loss, model = alone(replace(config, engine="native"))
    assert config.optimizer.clip_norm == float("inf") or max(norms) > config.optimizer.clip_norm
    for sequence in splits(ranks.size, pytestconfig.getoption("full")):
        parallel = ParallelConfig(sequence_parallel=sequence, layout="zigzag", fsdp=False, timeout=PATIENCE)
        run = variant(config, f"sp{sequence}", deepspeed=DeepSpeedConfig(**zero), parallel=parallel, **changes)
        got_loss = train(run)
        ranks.barrier(f"{run.run_dir} is finished")
        assert got_loss == pytest.approx(valid_loss, rel=1e-5)
        assert comm.timeout(deepspeed.utils.groups._WORLD_GROUP) == comm.timeout(dist.group.WORLD)
        rows = [row for row in read_metrics(run.run_dir) if "loss" in row]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
        got = final_weights(run)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(got[name].double(), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks(2)
def test_bfloat16_keeps_buffers(ranks, config, sgd):
    def build(config, device):
        model = build_model(config, device)
        model.register_buffer("own", torch.tensor(0.1))
        return model

    config = replace(config, model=replace(config.model, mixer="retention"))
    losses, *_ = alone(replace(config, engine="native"))
    parallel = ParallelConfig(sequence_parallel=ranks.size, fsdp=False, timeout=PATIENCE)
    train(replace(config, dtype="bfloat16", parallel=parallel, deepspeed=DeepSpeedConfig(stage=3)), build)
    ranks.barrier(f"{config.run_dir} is finished")
    assert load_weights(checkpoint.require_latest(config.run_dir), 3)["own"] == torch.tensor(0.1)
    rows = [row for row in read_metrics(config.run_dir) if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=0.02)


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch):
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.no_exchange
@pytest.mark.ranks(3)  # does not divide the weights: ZeRO 3 pads them with memory that nobody has written
def test_padding_is_not_taken_for_weights(ranks, config, unwritten_memory_is_nan):
    parallel = ParallelConfig(sequence_parallel=ranks.size, fsdp=False, timeout=PATIENCE)
    assert train(replace(config, parallel=parallel, deepspeed=DeepSpeedConfig(stage=3))) > 0


@pytest.mark.no_exchange
@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_bit_for_bit(stage, ranks, config):
    """With AdamW and its states. Another stage, another engine and another number of ranks are refused."""
    parallel = ParallelConfig(sequence_parallel=ranks.size, fsdp=False, timeout=PATIENCE)
    config = replace(config, parallel=parallel, deepspeed=DeepSpeedConfig(stage=stage), checkpoint_every=2)
    optimizer = replace(config.optimizer, lr=1e-2, schedule="wsd", decay_fraction=1e-3)  # as if it had no end
    straight, again = (variant(config, name, optimizer=optimizer) for name in ("straight", "again"))
    loss = train(straight)
    train(replace(again, steps=2))
    ranks.barrier(f"{again.run_dir} is interrupted")
    assert train(again) == loss
    ranks.barrier(f"{again.run_dir} is finished")
    got = final_weights(again)
    for name, weight in final_weights(straight).items():
        assert torch.equal(got[name], weight), name

    with pytest.raises(ValueError, match=f"got 'ZeRO stage {stage}', expected deepspeed.stage 2"):
        train(replace(again, deepspeed=DeepSpeedConfig(stage=2)))
    with pytest.raises(ValueError, match="got \"one of engine 'deepspeed'\", expected 'native'"):
        train(replace(again, engine="native", deepspeed=DeepSpeedConfig()))
    ranks.barrier(f"{again.run_dir} was refused")
    last = checkpoint.require_latest(again.run_dir)
    (file,) = last.glob(f"*pp_rank_{ranks.size - 1}_*_optim_states.pt")
    if ranks.rank == 0:
        torch.save(Payload(last / "it ran"), file)
        seal(last)
    ranks.barrier(f"{again.run_dir} holds code")
    with pytest.raises(ValueError, match="got a pickle of more than data"):
        train(again)
    with pytest.raises(ValueError, match="got a pickle of more than data"):
        final_weights(again)
    ranks.barrier(f"{again.run_dir} was refused again")
    if ranks.rank == 0:
        file.unlink()
        seal(last)
    ranks.barrier(f"{again.run_dir} is of fewer ranks")
    with pytest.raises(ValueError, match=f"got 'one of {ranks.size - 1} ranks', expected one of {ranks.size}"):
        train(again)
    ranks.barrier(f"{again.run_dir} was refused once more")
    if ranks.rank == 0:
        (last / "SHA256SUMS").write_text("")
    ranks.barrier(f"{last} is damaged")
    assert train(replace(again, steps=2)) > 0  # the one before it
    assert checkpoint.require_latest(again.run_dir).name == "step-00000002"


@pytest.mark.no_exchange
@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_not_finite_is_not_saved(stage, ranks, config, monkeypatch):
    step = DeepSpeedEngine.step

    def overflow(self, lr, loss):
        norm = step(self, lr, loss)
        weight = self.model.module.norm.weight
        if ranks.rank == ranks.size - 1:
            getattr(weight, "ds_tensor", weight).data[0] = float("nan")
        return norm

    monkeypatch.setattr(DeepSpeedEngine, "step", overflow)
    monkeypatch.setattr("lasp.training.train.evaluate", lambda *_: 0.0)
    parallel = ParallelConfig(sequence_parallel=ranks.size, fsdp=False, timeout=60)
    config = replace(config, parallel=parallel, deepspeed=DeepSpeedConfig(stage=stage), steps=1)
    with pytest.raises(FloatingPointError, match=rf"^rank {ranks.size - 1}: norm\.weight: got values from nan"):
        train(config)
    assert checkpoint.latest(config.run_dir) is None


@pytest.mark.no_exchange
@pytest.mark.ranks(2)
def test_a_run_that_one_rank_is_told_to_stop_goes_on(ranks, native_config, tell_one_rank):
    parallel, zero = replace(native_config.parallel, sequence_parallel=ranks.size), DeepSpeedConfig(stage=1)
    config = replace(native_config, engine="deepspeed", deepspeed=zero, dtype="float32", parallel=parallel)
    tell_one_rank(2)
    with pytest.raises(Stopped):
        train(config)
    ranks.barrier("it has stopped")
    assert train(config) > 0
    ranks.barrier("it is finished")
    assert [row["step"] for row in read_metrics(config.run_dir) if "loss" in row] == [1, 2, 3]
