"""A run goes on as the run it was, and is the same one on all of its ranks."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.config import DeepSpeedConfig, ParallelConfig
from lasp.data import Mixture, TokenFile, TokenFileWriter
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.same_run import MAY_CHANGE, require_same_on_ranks, settings, tokens_seen
from lasp.training.train import train

FINGERPRINTS = {"data.train": "a", "data.valid": "b", "data.tokenizer": "byte"}


@pytest.fixture
def seen(monkeypatch):
    """The numbers of the training contexts that were read, in order."""
    numbers = []

    class Recording(Mixture):
        def take(self, turns, length):
            taken = super().take(turns, length)
            numbers.extend(
                each.number if each.corpus is None else (Path(each.corpus).name, each.number) for each in taken
            )
            return taken

    monkeypatch.setattr("lasp.training.train.Mixture", Recording)
    return numbers


def go_on(config, saved=None, **changes):
    """What the run has seen whose configuration was `saved`, when it goes on with changes."""
    trained = {"tokens": 42, "fingerprints": FINGERPRINTS}
    saved = json.loads(json.dumps(dataclasses.asdict(saved or config) | {"trained": trained}))
    fingerprints = FINGERPRINTS | changes.pop("fingerprints", {})
    return tokens_seen(Path("run/step-1"), saved, replace(config, **changes), fingerprints)


OTHERS = {
    "seed": 5,
    "context_length": 48,
    "batch_contexts": 4,
    "dtype": "float32",
    "optimizer.lr": 0.5,
    "optimizer.schedule": "wsd",
    "optimizer.clip_norm": 0.5,
    "optimizer.betas": (0.8, 0.9),
    "data.eval_contexts": 1,
    "model.rope_theta": 1e4,
}


def changed(config, name, value):
    first, _, rest = name.partition(".")
    return {first: replace(getattr(config, first), **{rest: value}) if rest else value}


@pytest.mark.parametrize("name", OTHERS)
def test_what_determines_the_losses_may_not_change(config, name):
    other = changed(config, name, OTHERS[name])
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected .*, as in checkpoint run/step-1"):
        go_on(config, **other)


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_other_data_are_refused(config, name):
    with pytest.raises(ValueError, match=f"^{name}: got 'x', expected '{FINGERPRINTS[name]}'"):
        go_on(config, fingerprints={name: "x"})
    assert go_on(config, fingerprints={name: "x"}, allow_changed=("data",)) == 42


def test_every_change_is_named_at_once(config):
    with pytest.raises(ValueError, match=r"optimizer\.lr: got 0.5, expected 0.01; seed: got 5, expected 0, as in"):
        go_on(config, seed=5, optimizer=replace(config.optimizer, lr=0.5))


def test_what_does_not_determine_them_may_change(config):
    others = {
        "run_dir": "elsewhere",
        "steps": 99,
        "parallel": ParallelConfig(timeout=5, sequence_parallel=2, layout="zigzag", fsdp=True),
        "engine": "native",
        "deepspeed": DeepSpeedConfig(),
        "contexts_at_once": 1,  # others without segments
        "initial_weights": "weights",
        "device": "auto",
        "recompute": "full",
        "recompute_layers": 1,
        "offload_activations": True,
        "segment_tokens": 8,
        "segment_offload": True,
        "segment_graphs": 2,
        "eval_every": 1,
        "checkpoint_every": 1,
        "checkpoint_keep": 1,
        "checkpoint_keep_every": 5,
        "checkpoint_async": True,
        "checkpoint_timeout": 5.0,
        "skip_nonfinite": 3,
        "compare_replicas_every": 1,
        "allow_changed": ("seed",),
        "log_every": 1,
        "profile": True,
        "wandb": "project",
        "data": replace(config.data, train="moved", valid="moved"),  # to where the same files are
    }
    assert others.keys() == {*MAY_CHANGE, "data"}
    assert go_on(config, **others) == go_on(config, contexts_at_once=2) == 42


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_named_may_change_unless_it_is_part_of_the_checkpoint(config, name):
    other = changed(config, name, OTHERS[name]) | {"allow_changed": (name,)}
    if name in ("optimizer.betas", "model.rope_theta"):
        with pytest.raises(ValueError, match=f"{name}: got .*except model, optimizer.betas"):
            go_on(config, **other)
    else:
        assert go_on(config, **other) == 42
        another = replace(config, model=replace(config.model, init_std=1.0))
        with pytest.raises(ValueError, match="^model.init_std: got"):
            go_on(config, saved=another, **other)


def test_a_field_that_an_earlier_version_had_not_has_its_default(config, monkeypatch):
    config = replace(config, data=replace(config.data, eval_contexts=8))
    train(config)
    read_config = checkpoint.read_config

    def as_earlier(*args, **options):
        saved = read_config(*args, **options)
        del saved["model"]["num_householder"], saved["optimizer"]["betas"], saved["data"]["eval_contexts"]
        return saved

    monkeypatch.setattr(checkpoint, "read_config", as_earlier)
    train(replace(config, steps=config.steps + 1))
    assert checkpoint.latest(config.run_dir).name == f"step-{config.steps + 1:08d}"
    with pytest.raises(ValueError, match=r"got another model.* model\.num_householder 2 \(this run: 3\)\n"):
        train(replace(config, model=replace(config.model, num_householder=3)))
    with pytest.raises(ValueError, match=r"^data\.eval_contexts: got 1, expected 8, as in"):
        train(replace(config, data=replace(config.data, eval_contexts=1)))


def test_only_fields_can_be_named(config):
    with pytest.raises(ValueError, match="allow_changed: got 'sed', expected the name of a field"):
        train(replace(config, allow_changed=("seed", "sed")))


def test_a_checkpoint_without_a_record_is_refused(config):
    with pytest.raises(ValueError, match="checkpoint c: got 'no record of what it was trained on'"):
        tokens_seen(Path("c"), dataclasses.asdict(config), config, FINGERPRINTS)


@pytest.mark.parametrize(
    ("changes", "contexts", "tokens"),
    [
        ({}, [4, 5], 6 * 96),
        ({"batch_contexts": 4}, [4, 5, 6, 7], 8 * 96),
        ({"context_length": 60}, [7, 8], 9 * 60),  # 384 tokens were seen: context 6 begins at 360
    ],
)
def test_the_position_in_the_data_is_the_checkpoints(config, seen, changes, contexts, tokens):
    config = replace(config, steps=2)
    train(config)
    del seen[:]
    train(replace(config, steps=3, **changes, allow_changed=tuple(changes)))
    assert seen == contexts
    assert [r["tokens"] for r in read_metrics(config.run_dir) if "tokens" in r] == [192, 384, tokens]


def test_a_mixture_goes_on_as_it_was(config, seen, tmp_path):
    with TokenFileWriter(tmp_path / "other", "uint16") as writer:
        for number in range(20):
            writer.add_document([number] * 20 + [256])
    mixed = replace(config.data, train=(f"{config.data.train}:0.5", f"{tmp_path}/other:0.5"))
    config = replace(config, data=mixed, curriculum=("48:2",), steps=4)
    train(config)
    expected = list(seen)
    assert [name for name, _ in expected] == ["other"] * 2 + ["train"] * 2 + ["other"] * 2 + ["train"] * 2 + [
        "other",
        "train",
    ] * 2
    assert [each[1] for each in expected if each[0] == "train"] == [0, 1, 2, 3, 2, 3]
    records = [r for r in read_metrics(config.run_dir) if "loss" in r]
    assert [(r["context_length"], r["tokens"]) for r in records] == [(48, 192), (48, 384), (96, 576), (96, 768)]

    again = replace(config, run_dir=f"{config.run_dir}_2")
    del seen[:]
    for steps in (1, 3, 4):
        train(replace(again, steps=steps))
    assert seen == expected
    other_weights = replace(mixed, train=(f"{mixed.train[0][:-4]}:0.8", f"{tmp_path}/other:0.2"))
    with pytest.raises(ValueError, match=r"data\.train: got '4/5 of .*; 1/5 of .*, expected '1/2 of "):
        train(replace(again, steps=5, data=other_weights))
    del seen[:]
    train(replace(again, steps=5, data=other_weights, allow_changed=("data",)))
    assert seen == [("train", 4), ("train", 5)]


def test_a_run_is_known_by_its_data_not_by_their_path(config, tmp_path):
    config = replace(config, steps=1)
    train(config)
    for split in ("train", "valid"):
        for ending in ("bin", "idx"):
            shutil.copy(f"{getattr(config.data, split)}.{ending}", tmp_path / f"{split}.{ending}")
    moved = replace(config.data, train=str(tmp_path / "train"), valid=str(tmp_path / "valid"))
    train(replace(config, steps=2, data=moved))
    tokens = TokenFile(moved.train).tokens.copy()
    tokens[0] ^= 1
    with open(tmp_path / "train.bin", "wb") as file:
        file.write(tokens.tobytes())
    with pytest.raises(ValueError, match=r"data\.train: got '.* uint16 tokens in 40 documents, hash"):
        train(replace(config, steps=3, data=moved))
    assert not torch.distributed.is_initialized()


def test_a_finished_run_says_what_it_came_to(config, capsys):
    config = replace(config, steps=1)
    for _ in range(2):
        loss = train(config)
        last = capsys.readouterr().out.splitlines()[-1]
        path = checkpoint.require_latest(config.run_dir)
        assert last == f"finished 1 of 1 steps: held-out loss {loss:.4f}, checkpoint {path}"


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("early", [True, False])
def test_tokens_outside_the_vocabulary_are_refused_by_place(config, tmp_path, monkeypatch, split, early):
    with TokenFileWriter(tmp_path / "bad", "uint16") as writer:
        for number in range(20):
            writer.add_document([1] * 7 + [300 if number == 9 else 1] + [1] * 3)
    if not early:  # as with files that are too large to be looked at as a whole
        monkeypatch.setattr(TokenFile, "fingerprint", lambda file, vocab_size: "any")
    bad = replace(config, data=replace(config.data, **{split: str(tmp_path / "bad")}))
    place = r"bad\.bin: got token id 300 at position 7 of document 9, expected 0 to 256 \(vocab_size=257\)"
    with pytest.raises(ValueError, match=place):
        train(bad)


def test_ranks_that_differ_are_named_with_their_values(config):
    ranks = [settings(replace(config, seed=seed)) for seed in (0, 7, 0, 7, 7, 7, 7)]
    expected = "seed: got 0 on ranks 0, 2, 7 on ranks 1, 3, 4, 5 and 1 more; expected the same on every rank"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        require_same_on_ranks(ranks)
    require_same_on_ranks(ranks[:1])
    require_same_on_ranks([ranks[0], ranks[2]])
