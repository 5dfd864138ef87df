"""A run of `lasp train` on many ranks is the run of one: losses, gradient norms and weights, in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from lasp.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.data import IGNORED, PackedContexts, TokenFile, TokenFileWriter
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from lasp.training.train import train
from tests.patience import PATIENCE

pytestmark = [pytest.mark.mpi, pytest.mark.cpu_only("it trains on CPUs")]
VOCAB, STEPS = 257, 3


@pytest.fixture
def config(ranks, shared_tmp_path, gen):
    """Packed documents of 1 to 120 tokens in contexts of 101, which no number of units divides; a third of the tokens
    that are trained on are labels."""
    if ranks.rank == 0:
        for split, masked in (("train", True), ("valid", False)):
            with TokenFileWriter(shared_tmp_path / split, "uint16", masked=masked) as writer:
                for length in torch.randint(1, 120, (40,), generator=gen).tolist():
                    mask = (torch.rand(length, generator=gen) < 0.3).numpy()
                    tokens = torch.randint(0, VOCAB, (length,), generator=gen).numpy()
                    writer.add_document(tokens, mask if masked else None)
    ranks.barrier(f"{shared_tmp_path} is written")
    return TrainConfig(
        model=replace(tiny(), vocab_size=VOCAB),
        data=DataConfig(
            train=str(shared_tmp_path / "train"), valid=str(shared_tmp_path / "valid"), eval_contexts=ranks.size
        ),
        run_dir=str(shared_tmp_path / "run"),
        steps=STEPS,
        context_length=101,
        batch_contexts=ranks.size,
        dtype="float64",
        device="cpu",
        parallel=ParallelConfig(timeout=PATIENCE, fsdp=False),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, clip_norm=0.1),
        eval_every=STEPS,
        checkpoint_every=STEPS,
    )


def splits(size, full):
    """Sizes of the groups that ranks form: several groups of several ranks where that can be, else one or all.

    full: every size that divides the world."""
    every = [n for n in range(1, size + 1) if size % n == 0]
    return every if full else every[1:-1] or every


def ways_to_share(size, full):
    """(sequence_parallel, layout) of meshes that fill the world; one layout will do where sequences are not split."""
    layouts = ("contiguous", "zigzag")
    return [(n, layout) for n in splits(size, full) for layout in layouts[n == 1 and not full :]]


def alone(config):
    """The same run written plainly, without ranks, accumulation or the loop: (losses, norms, held-out loss, model)."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model).double()
    optimizer = build_optimizer(model, config.optimizer)
    training = PackedContexts(config.data.train, config.context_length, seed=config.seed)
    held_out = PackedContexts(config.data.valid, config.context_length, seed=config.seed, shuffle=False)

    def mean_loss(contexts):
        total, count = 0, 0
        for context in contexts:
            seq = SequenceParallel(None).sequence(context.length, context.cu_seqlens)
            logits = model(context.tokens(0, context.length)[None], seq)[0]
            labels = context.labels(0, context.length)
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
        return total / count

    losses, norms = [], []
    for step in range(config.steps):
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, config.steps))
        optimizer.zero_grad()
        loss = mean_loss(training[step * config.batch_contexts + i] for i in range(config.batch_contexts))
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, config.optimizer.clip_norm / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    with torch.no_grad():
        return losses, norms, mean_loss(held_out[i] for i in range(config.data.eval_contexts)).item(), model


def saved_weights(config):
    model = Decoder(config.model).double()
    checkpoint.load_model(checkpoint.require_latest(config.run_dir), model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("fsdp", "segment_tokens", "at_once"),
    [
        pytest.param(False, None, 2, marks=pytest.mark.ranks(2)),
        pytest.param(True, None, 1, marks=pytest.mark.ranks(2, 4)),
        pytest.param(True, 23, 1, marks=pytest.mark.ranks(2)),
    ],
)
def test_any_mesh_trains_as_one_rank(ranks, config, pytestconfig, fsdp, segment_tokens, at_once):
    losses, norms, valid_loss, model = alone(config)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert min(norms) > config.optimizer.clip_norm  # or clipping would prove nothing
    for sequence_parallel, layout in ways_to_share(ranks.size, pytestconfig.getoption("full")):
        parallel = replace(config.parallel, sequence_parallel=sequence_parallel, layout=layout, fsdp=fsdp)
        run = replace(config, parallel=parallel, run_dir=f"{config.run_dir}-{sequence_parallel}-{layout}")
        run = replace(run, segment_tokens=segment_tokens, segment_offload=segment_tokens is not None)
        run = replace(run, contexts_at_once=at_once)
        assert train(run) == pytest.approx(valid_loss, rel=1e-9)
        ranks.barrier(f"{run.run_dir} is saved")  # rank 0 renames the checkpoint after the others have gone on
        steps = [record for record in read_metrics(run.run_dir) if "loss" in record]
        assert [record["loss"] for record in steps] == pytest.approx(losses, rel=1e-9)
        assert [record["grad_norm"] for record in steps] == pytest.approx(norms, rel=1e-9)
        torch.testing.assert_close(saved_weights(run), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.ranks(3)
def test_mixtures_train_alike_however_they_are_spread(ranks, config):
    """test_experts.py compares such models with one rank; here it is the loop, its reports and its checkpoints."""
    experts = {"num_experts": 12, "expert_intermediate_size": 24, "expert_bias_rate": 0.01}
    config = replace(config, model=replace(config.model, **experts), optimizer=OptimizerConfig(warmup_steps=1))

    def run(sequence_parallel, expert_parallel, fsdp, segment_tokens=None):
        split = {"sequence_parallel": sequence_parallel, "expert_parallel": expert_parallel, "fsdp": fsdp}
        parallel = replace(config.parallel, **split, layout="zigzag")
        directory = f"{config.run_dir}-{sequence_parallel}-{expert_parallel}-{fsdp}"
        spread = replace(config, run_dir=directory, parallel=parallel, segment_tokens=segment_tokens)
        valid_loss = train(spread)
        ranks.barrier(f"{directory} is saved")
        names = ("loss", "grad_norm", "balance_loss", "expert_load")
        steps = [record[name] for record in read_metrics(directory) if "loss" in record for name in names]
        return [*steps, valid_loss], saved_weights(spread)

    wanted, weights = run(1, 1, False)
    for way in ((ranks.size, ranks.size, False, 50), (ranks.size, 1, True)):
        got, got_weights = run(*way)
        assert got == pytest.approx(wanted, rel=1e-9)
        torch.testing.assert_close(got_weights, weights, rtol=1e-9, atol=1e-9)


class Interrupted(Exception):
    pass


@pytest.mark.no_exchange
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("dtype", "fsdp", "beside"), [("float32", False, False), ("bfloat16", True, True)])
def test_resuming_on_the_same_ranks_is_bitwise(ranks, config, monkeypatch, dtype, fsdp, beside):
    parallel = replace(config.parallel, sequence_parallel=ranks.size, layout="zigzag", fsdp=fsdp)
    config = replace(config, parallel=parallel, dtype=dtype, steps=4, eval_every=2, checkpoint_every=2)
    config = replace(config, checkpoint_async=beside)
    straight = replace(config, run_dir=f"{config.run_dir}-straight")
    loss = train(straight)

    save = checkpoint.save

    def save_and_die(run_dir, step, *args):
        saving = save(run_dir, step, *args)
        if step == 2:
            if saving is not None:
                saving.wait()
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Interrupted):
            train(config)
    ranks.barrier(f"{config.run_dir} is interrupted")
    assert checkpoint.require_latest(config.run_dir).name == "step-00000002"
    assert train(config) == loss
    ranks.barrier(f"{config.run_dir} is finished")

    states = []
    for run in (straight, config):
        path = checkpoint.require_latest(run.run_dir)
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in entries.items() if hasattr(m, "size")}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        states.append(state)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.no_exchange
def test_a_mesh_that_does_not_fill_the_world_is_refused_everywhere(ranks, config):
    parallel = replace(config.parallel, sequence_parallel=ranks.size + 1)
    with pytest.raises(ValueError, match=f"expected a divisor of the world size {ranks.size}"):
        train(replace(config, parallel=parallel))


@pytest.mark.no_exchange
def test_another_models_checkpoint_is_refused_everywhere(ranks, config):
    config = replace(config, steps=1)
    train(config)
    ranks.barrier(f"{config.run_dir} is saved")
    with pytest.raises(ValueError, match="another model"):
        train(replace(config, model=replace(config.model, rope_theta=1e4)))


@pytest.mark.no_exchange
def test_ranks_that_see_different_checkpoints_are_refused_everywhere(ranks, config, monkeypatch):
    config = replace(config, steps=1)
    train(config)
    ranks.barrier(f"{config.run_dir} is saved")
    if ranks.rank == 1:
        monkeypatch.setattr(checkpoint, "latest", lambda run_dir: None)
    with pytest.raises(ValueError, match="different arguments on different ranks"):
        train(config)


OTHERS = {
    "seed": lambda c: replace(c, seed=7),
    "optimizer.lr": lambda c: replace(c, optimizer=replace(c.optimizer, lr=0.5)),
    "parallel.sequence_parallel": lambda c: replace(c, parallel=replace(c.parallel, sequence_parallel=3)),
}


@pytest.mark.no_exchange
@pytest.mark.parametrize("field", OTHERS)
def test_ranks_with_other_settings_are_refused_everywhere(ranks, config, field):
    last = ranks.size - 1
    with pytest.raises(ValueError, match=f"^{field}: got .* on rank.* on rank {last}; expected the same on every rank"):
        train(OTHERS[field](config) if ranks.rank == last else config)


@pytest.mark.no_exchange
def test_ranks_with_other_data_under_one_path_are_refused_everywhere(ranks, config, monkeypatch):
    if ranks.rank == 0:
        monkeypatch.setattr(TokenFile, "fingerprint", lambda file, vocab_size: "other")
    with pytest.raises(ValueError, match=r"^data\.train: got 'other' on rank 0, '.* tokens in .*' on rank"):
        train(config)


@pytest.mark.no_exchange
@pytest.mark.ranks(2)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_token_outside_the_vocabulary_that_one_rank_reads_is_refused_everywhere(ranks, config, monkeypatch, split):
    path = Path(f"{getattr(config.data, split)}.bin")
    if ranks.rank == 0:
        tokens = np.fromfile(path, np.uint16)
        tokens[3] = 300
        tokens.tofile(path)
    ranks.barrier(f"{path} is written")
    monkeypatch.setattr(TokenFile, "fingerprint", lambda file, vocab_size: "as of a file that is too large")
    parallel = replace(config.parallel, sequence_parallel=ranks.size)
    with pytest.raises(ValueError, match=rf"{path.name}: got token id 300 at position \d+ of document"):
        train(replace(config, parallel=parallel, steps=50))
