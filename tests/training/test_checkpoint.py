import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.models import Decoder
from lasp.training import checkpoint
from lasp.training.optimizer import build_optimizer


@pytest.fixture
def parts(config):
    """A model and an optimiser with moments, as after a step."""
    model = Decoder(config.model).double()
    optimizer = build_optimizer(model, config.optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(config, parts, step):
    checkpoint.save(config.run_dir, step, *parts, config)


def fresh(config):
    model = Decoder(config.model).double()
    return model, build_optimizer(model, config.optimizer)


def test_what_was_saved_comes_back_bit_for_bit(config, parts):
    save(config, parts, 7)
    expected = torch.get_rng_state()
    model, optimizer = fresh(config)
    torch.rand(3)
    assert checkpoint.restore(config.run_dir, model, optimizer, config) == 7
    assert torch.equal(torch.get_rng_state(), expected)
    for p, q in zip(parts[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(parts[1].state[p][name], optimizer.state[q][name])


def test_no_checkpoint_is_step_zero(config):
    assert checkpoint.restore(config.run_dir, *fresh(config), config) == 0
    assert checkpoint.latest(config.run_dir) is None
    with pytest.raises(ValueError, match=r"run_dir: got .* expected a directory with a checkpoint"):
        checkpoint.require_latest(config.run_dir)


def test_only_the_newest_are_kept(config, parts):
    for step in (2, 9, 10, 30):
        save(config, parts, step)
    root = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000010", "step-00000030"]
    assert checkpoint.latest(config.run_dir).name == "step-00000030"


def test_a_save_that_dies_leaves_the_one_before(config, parts, monkeypatch):
    save(config, parts, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(config, parts, 2)
    assert checkpoint.latest(config.run_dir).name == "step-00000001"
    assert checkpoint.restore(config.run_dir, *fresh(config), config) == 1
    assert not list((Path(config.run_dir) / "checkpoints").glob("unfinished-*"))
    save(config, parts, 2)
    assert checkpoint.restore(config.run_dir, *fresh(config), config) == 2


def test_a_step_can_be_saved_again(config, parts):
    save(config, parts, 3)
    with torch.no_grad():
        next(parts[0].parameters()).fill_(5.0)
    save(config, parts, 3)
    model, optimizer = fresh(config)
    checkpoint.restore(config.run_dir, model, optimizer, config)
    assert (next(model.parameters()) == 5.0).all()


def test_another_model_is_refused_by_its_fields(config, parts):
    save(config, parts, 1)
    other = replace(config, model=replace(config.model, intermediate_size=128, rope_theta=1e4))
    with pytest.raises(ValueError, match="another model") as error:
        checkpoint.restore(config.run_dir, *fresh(other), other)
    assert "model.intermediate_size 64 (this run: 128)" in str(error.value)
    assert "model.rope_theta 500000.0 (this run: 10000.0)" in str(error.value)
    assert "hidden_size" not in str(error.value)


def test_other_settings_may_change(config, parts):
    save(config, parts, 1)
    assert checkpoint.restore(config.run_dir, *fresh(config), replace(config, steps=9, seed=4)) == 1


def test_weights_alone_load_into_a_model(config, parts):
    save(config, parts, 1)
    model = Decoder(config.model)
    checkpoint.load_model(checkpoint.require_latest(config.run_dir), model)
    for p, q in zip(parts[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(p.float(), q)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("__0_0.distcp", truncate),
        ("__0_0.distcp", Path.unlink),
        (".metadata", truncate),
        (".metadata", Path.unlink),
        ("config.json", truncate),
        ("config.json", Path.unlink),
    ],
)
def test_damage_is_refused_by_name(config, parts, file, damage):
    save(config, parts, 1)
    path = checkpoint.require_latest(config.run_dir)
    damage(path / file)
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000001: got"):
        checkpoint.restore(config.run_dir, *fresh(config), config)


def test_a_pointer_to_nothing_is_refused(config, parts):
    save(config, parts, 1)
    (Path(config.run_dir) / "checkpoints" / "latest").write_text("step-00000009")
    with pytest.raises(ValueError, match=r"latest: got 'step-00000009'"):
        checkpoint.restore(config.run_dir, *fresh(config), config)


def test_config_is_readable_json(config, parts):
    save(config, parts, 1)
    saved = json.loads((checkpoint.require_latest(config.run_dir) / "config.json").read_text())
    assert saved["model"]["hidden_size"] == config.model.hidden_size
    assert saved["optimizer"]["betas"] == [0.9, 0.95]
