"""Steps that are not finite, losses that leap: what a run says of them, and what it goes on with."""

import math
from dataclasses import replace

import pytest
import torch

from lasp.data import Mixture, Numbered
from lasp.models import Decoder
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.native import NativeEngine
from lasp.training.numerics import Spikes, name_contexts, require_same_replicas
from lasp.training.streaming import StreamedBatch
from lasp.training.train import train
from tests.training.test_train import saved_tensors

GRADIENT, LOSS = "layers.1.mixer_norm.weight", "embedding.weight"


@pytest.fixture
def spoil(monkeypatch):
    """Makes some contexts, counted from 0, give a gradient or a loss that is not finite."""

    def spoil(what, *numbers):
        class Contexts(Mixture):
            def take(self, turns, length):
                taken = super().take(turns, length)
                spoiled.extend(each.context.tokens(0, length) for each in taken if each.number in numbers)
                return taken

        def backward(self, loss):
            odd = any(torch.equal(tokens, now["tokens"]) for tokens in spoiled)
            loss.backward()
            if odd and what == "gradient":
                dict(self.model.named_parameters())[GRADIENT].grad[0] = math.inf

        def forward(model, tokens, seq, **options):
            now["tokens"] = tokens.flatten().cpu()  # one row, or the rows of equally long documents
            loss_sum, count = plain(model, tokens, seq, **options)
            odd = what == "loss" and any(torch.equal(tokens, now["tokens"]) for tokens in spoiled)
            return loss_sum * (math.inf if odd else 1), count

        spoiled, now, plain = [], {}, Decoder.forward
        monkeypatch.setattr("lasp.training.train.Mixture", Contexts)
        monkeypatch.setattr(NativeEngine, "backward", backward)
        monkeypatch.setattr(Decoder, "forward", forward)

    return spoil


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "gradient",
            r"step 3, contexts 4 to 5: gradient norm: got inf, expected a finite number; computed again, context 5 "
            rf"gave loss \d\.\d+ and a gradient that is first not finite in {GRADIENT}, on rank 0",
        ),
        (
            "loss",
            r"step 3, contexts 4 to 5: loss: got inf, expected a finite number; computed again, context 5 "
            rf"gave loss inf and a gradient that is first not finite in {LOSS}, on rank 0",
        ),
    ],
)
def test_what_is_not_finite_is_named(config, spoil, what, message):
    spoil(what, 5)
    with pytest.raises(FloatingPointError, match=f"^{message}"):
        train(config)


def test_streams_are_computed_again_as_streams(config, monkeypatch):
    plain = StreamedBatch.backward
    monkeypatch.setattr(StreamedBatch, "backward", lambda *args: plain(*args) * math.inf)
    with pytest.raises(FloatingPointError, match=r"computed again, context 0\b.* gave loss inf"):
        train(replace(config, segment_tokens=config.context_length // 2))


def test_what_does_not_come_again_is_told(config, monkeypatch):
    """As after a fault of a machine."""

    def overflow(model, mesh):
        next(model.parameters()).grad.fill_(math.inf)

    monkeypatch.setattr("lasp.training.native.reduce_gradients", overflow)
    with pytest.raises(FloatingPointError, match="step 1, .* got inf.*of each context were finite on every rank"):
        train(config)


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_steps_are_left_out_whole(config, spoil, what, tmp_path, capsys):
    spoil(what, 2, 3, 5)  # the second step and the third
    config = replace(config, skip_nonfinite=2, steps=4, eval_every=4, optimizer=replace(config.optimizer, lr=1e-9))
    train(replace(config, steps=1, run_dir=str(tmp_path / "one")))
    train(replace(config, steps=3, run_dir=str(tmp_path / "three")))
    one, three = (saved_tensors(tmp_path / name) for name in ("one", "three"))
    assert all(torch.equal(one[name], three[name]) for name in one if name != "step")
    assert train(config) > 0
    steps = [r for r in read_metrics(config.run_dir) if "lr" in r]
    assert [r.get("skipped", 0) for r in steps] == [0, 1, 2, 0]
    assert [("loss" in r, "grad_norm" in r) for r in steps] == [(skipped == 0,) * 2 for skipped in (0, 1, 2, 0)]
    said = " ".join(capsys.readouterr().out.split())
    assert "step 3 left out, 2 in a row: contexts 4 to 5:" in said
    assert "context 5 gave loss" in said


def test_no_more_steps_in_a_row_are_left_out_than_allowed(config, spoil):
    spoil("gradient", 1, 2, 6, 8, 10)
    with pytest.raises(FloatingPointError, match="^step 6, contexts 10 to 11: gradient norm: got inf"):
        train(replace(config, skip_nonfinite=2, eval_every=9))
    assert checkpoint.latest(config.run_dir).name == "step-00000003"


def test_a_mixtures_load_is_not_counted_twice(config, spoil):
    spoil("gradient", 2)
    model = replace(config.model, num_experts=4, expert_intermediate_size=16)
    train(replace(config, model=model, skip_nonfinite=1))
    assert [("skipped" in r, "expert_load" in r) for r in read_metrics(config.run_dir) if "lr" in r][:3] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_spikes_stand_out_of_the_last_losses():
    spikes = Spikes()
    noise = [3.0 + 0.01 * ((7 * i) % 11) for i in range(200)]
    assert [spikes.median_if_spike(x) for x in noise] == [None] * 200
    assert spikes.median_if_spike(3.5) == pytest.approx(3.05, abs=0.02)
    assert [spikes.median_if_spike(x) for x in (3.1, 2.0)] == [None, None]
    assert Spikes().median_if_spike(100.0) is None


def test_a_spike_is_logged_with_its_contexts(config, monkeypatch, capsys):
    monkeypatch.setattr("lasp.training.numerics.FEWEST", 2)
    forward, calls = Decoder.forward, []

    def leap(model, *arguments, **options):
        loss_sum, count = forward(model, *arguments, **options)
        calls.append(model.training)
        return loss_sum * (9 if sum(calls) == 9 and model.training else 1), count

    monkeypatch.setattr(Decoder, "forward", leap)
    train(config)
    (spike,) = [r for r in read_metrics(config.run_dir) if "spike" in r]
    assert spike["step"] == 5
    assert spike["contexts"] == [8, 9]
    assert spike["spike"] > 2 * spike["median"]
    assert "contexts 8 to 9" in " ".join(capsys.readouterr().out.split())


def test_one_rank_has_no_replicas(config):
    require_same_replicas(Decoder(config.model), None)


def test_contexts_are_named_with_their_corpora():
    some = [("a", 3), ("b", 7), ("a", 4), ("a", 5)]
    assert name_contexts([Numbered(*each, None) for each in some]) == "contexts 3 to 5 of a and context 7 of b"
