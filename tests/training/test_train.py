import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lasp.config import ParallelConfig
from lasp.data import IGNORED, PackedContexts
from lasp.models import Decoder
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.optimizer import build_optimizer
from lasp.training.train import train


class Interrupted(Exception):
    pass


def interrupt_after(step, monkeypatch):
    """Makes the next run die when it has saved the checkpoint of that step."""
    save = checkpoint.save

    def save_and_die(run_dir, taken, *args):
        saving = save(run_dir, taken, *args)
        if taken == step:
            if saving is not None:
                saving.wait()
            raise Interrupted

    monkeypatch.setattr(checkpoint, "save", save_and_die)


def saved_tensors(run_dir):
    """Every tensor of a run's last checkpoint, by name."""
    path = checkpoint.require_latest(run_dir)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in entries.items() if hasattr(m, "size")}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("dtype", "fsdp", "beside"),
    [
        ("float32", False, False),
        ("float64", False, True),
        ("float32", True, False),
        ("bfloat16", True, True),
    ],
)
def test_resuming_is_bitwise_the_run_that_was_never_stopped(config, tmp_path, monkeypatch, dtype, fsdp, beside):
    config = replace(config, dtype=dtype, parallel=replace(config.parallel, fsdp=fsdp), checkpoint_async=beside)
    straight = replace(config, run_dir=str(tmp_path / "straight"))
    loss = train(straight)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(Interrupted):
            train(config)
    assert checkpoint.require_latest(config.run_dir).name == "step-00000003"
    assert train(config) == loss

    expected, got = saved_tensors(straight.run_dir), saved_tensors(config.run_dir)
    assert expected.keys() == got.keys()
    assert any(name.startswith("optimizer") for name in got)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name

    def results(run):
        of_machines = ("tokens_per_second", "memory")
        records = [record for record in read_metrics(run.run_dir) if "memory_by_part" not in record]  # of each start
        return [{k: v for k, v in record.items() if k not in of_machines} for record in records]

    assert results(config) == results(straight)


def test_a_finished_run_is_only_evaluated(config):
    loss = train(config)
    written = len(read_metrics(config.run_dir))
    assert train(config) == loss
    assert len(read_metrics(config.run_dir)) == written


def test_metrics_hold_every_step_and_evaluation(config):
    loss = train(config)
    records = read_metrics(config.run_dir)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["tokens"] for r in steps] == [2 * 96 * (i + 1) for i in range(6)]
    for record in steps:
        assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= record.keys()
        assert all(math.isfinite(value) for value in record.values())
        assert "mfu" not in record  # no peak is known for a CPU
    evaluations = [r for r in records if "valid_loss" in r]
    assert [r["step"] for r in evaluations] == [3, 6]
    assert evaluations[-1]["valid_loss"] == loss < steps[0]["loss"]
    assert any((config_dir := checkpoint.require_latest(config.run_dir)).iterdir())
    assert json.loads((config_dir / "config.json").read_text())["steps"] == 6
    assert list((config_dir.parent.parent / "tensorboard").glob("events*"))


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_step_is_that_of_the_mean_over_all_labels(config, at_once):
    """Loss and gradient norm of contexts, however many at once, are those of one plain sum over their labels."""
    config = replace(config, steps=1, batch_contexts=10, contexts_at_once=at_once, eval_every=1)
    train(config)
    record = read_metrics(config.run_dir)[0]

    torch.manual_seed(config.seed)
    model = Decoder(config.model).double()
    contexts = PackedContexts(config.data.train, config.context_length, seed=config.seed)
    total, count = 0, 0
    for context in (contexts[i] for i in range(10)):
        seq = SequenceParallel(None).sequence(context.length, context.cu_seqlens)
        labels = context.labels(0, context.length)
        logits = model(context.tokens(0, context.length)[None], seq)[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    loss = total / count
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert count < 10 * config.context_length  # some labels are missing, or the denominator would prove nothing
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-10)


@pytest.fixture
def masked(data):
    """The training files with the last token alone as a label."""
    path = Path(f"{data.train}.mask")
    path.write_bytes(b"\0" * (PackedContexts(data.train, 96, seed=0).file.num_tokens - 1) + b"\1")
    yield data
    path.unlink()


def test_a_step_without_labels_is_refused(config, masked):
    with pytest.raises(
        ValueError, match=r"data\.train: got \"no label in this step's contexts\".*raise batch_contexts"
    ):
        train(replace(config, steps=50, batch_contexts=1, context_length=10))


def test_an_evaluation_without_labels_is_refused(config, masked):
    data = replace(masked, train=masked.valid, valid=masked.train)
    with pytest.raises(ValueError, match=r"eval_contexts: got 2, expected more: the first 2 contexts of .* have no la"):
        train(replace(config, data=data))


@pytest.mark.parametrize("policy", ["selective", "full", True])
def test_recomputation_changes_nothing(config, tmp_path, policy):
    config = replace(config, steps=2)
    again = replace(config, recompute=policy, run_dir=str(tmp_path / "recomputed"))
    offloaded = replace(again, offload_activations=True, run_dir=str(tmp_path / "offloaded"))
    assert train(config) == pytest.approx(train(again), rel=1e-14)
    assert train(offloaded) == train(replace(again, run_dir=str(tmp_path / "again")))


def test_gradients_that_overflow_stop_the_run(config, monkeypatch):
    def overflow(model, mesh):
        next(model.parameters()).grad.fill_(float("inf"))

    monkeypatch.setattr("lasp.training.native.reduce_gradients", overflow)
    with pytest.raises(FloatingPointError, match="gradient norm: got inf"):
        train(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: replace(c, model=replace(c.model, vocab_size=256)),
            ValueError,
            "vocab_size: got 256, expected at least the tokenizer's 257",
        ),
        (
            lambda c: replace(c, data=replace(c.data, eval_contexts=10**6)),
            ValueError,
            "eval_contexts: got 1000000, expected at most",
        ),
        (lambda c: replace(c, context_length=10**9), ValueError, "context_length: got 1000000000"),
        (lambda c: replace(c, data=replace(c.data, train="no/such")), FileNotFoundError, "no/such"),
        (
            lambda c: replace(c, data=replace(c.data, tokenizer="no/tokenizer.json")),
            FileNotFoundError,
            "no/tokenizer.json",
        ),
        (lambda c: replace(c, parallel=ParallelConfig(sequence_parallel=2)), ValueError, "world size 1"),
        (lambda c: replace(c, parallel=ParallelConfig(data_parallel=2)), ValueError, "data_parallel: got 2"),
    ],
)
def test_a_run_that_cannot_work_is_refused(config, change, error, message):
    with pytest.raises(error, match=message):
        train(change(config))
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_missing_gpu_is_refused(config):
    with pytest.raises(
        ValueError, match="device: got 'cuda', expected a GPU for each of this machine's 1 ranks; it has 0"
    ):
        train(replace(config, device="cuda"))


def test_optimizer_state_covers_every_parameter(config):
    train(config)
    names = {name for name, _ in Decoder(config.model).named_parameters()}
    saved = saved_tensors(config.run_dir)
    for name in names:
        assert f"model.{name}" in saved
        assert saved[f"optimizer.state.{name}.exp_avg"].abs().sum() > 0
    assert len(build_optimizer(Decoder(config.model), config.optimizer).param_groups) == 2
