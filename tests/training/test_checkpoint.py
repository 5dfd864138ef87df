import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.models import Decoder
from lasp.training import checkpoint, files
from lasp.training.optimizer import build_optimizer
from tests.patience import PATIENCE


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


def save(config, parts, *steps, keep=2):
    for step in steps:
        checkpoint.save(config.run_dir, step, *parts, replace(config, checkpoint_keep=keep))


def root(config):
    return Path(config.run_dir) / "checkpoints"


def names(config):
    """What lies beside `latest`."""
    return sorted(p.name for p in root(config).iterdir() if p.name != "latest")


def resume(config):
    return checkpoint.restore(config.run_dir, *fresh(config), config)


def flip(file):
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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
    assert names(config) == ["step-00000010", "step-00000030"]
    assert checkpoint.latest(config.run_dir).name == "step-00000030"


@pytest.mark.parametrize(("keep", "left"), [(1, []), (2, ["step-00000100"]), (9, ["step-00000090", "step-00000100"])])
def test_after_a_step_back_later_checkpoints_neither_count_nor_go(config, parts, keep, left, capsys):
    save(config, parts, 90, 100, 200, 300, keep=9)
    (root(config) / "latest").write_text("step-00000100\n")
    assert resume(config) == 100
    assert "step-00000200, step-00000300 will be replaced when the run gets there" in capsys.readouterr().out
    save(config, parts, 150, keep=keep)
    assert names(config) == [*left, "step-00000150", "step-00000200", "step-00000300"]
    assert resume(config) == 150
    save(config, parts, 200, keep=keep)
    assert "step-00000200 was there: replaced" in capsys.readouterr().out
    assert resume(config) == 200
    assert "step-00000300" in names(config)


def test_only_names_that_lasp_gives_are_removed(config, parts):
    others = ["step-00000001-good", "step-1", "step-000000002", "my-step-00000001", "unfinished-step-00000001-mine"]
    for name in others:
        (root(config) / name).mkdir(parents=True)
    (root(config) / "step-00000001").write_text("a file")
    (root(config) / "step-00000002").symlink_to("step-1")
    save(config, parts, 3, 4, 5, keep=1)
    assert resume(config) == 5
    assert names(config) == sorted([*others, "step-00000001", "step-00000002", "step-00000005"])


def test_a_copy_may_be_gone_on_from(config, parts):
    save(config, parts, 3)
    (root(config) / "step-00000003").rename(root(config) / "before-the-spike")
    (root(config) / "latest").write_text("before-the-spike")
    assert resume(config) == 3
    save(config, parts, 4, keep=1)
    assert names(config) == ["before-the-spike", "step-00000004"]


def test_a_lost_pointer_is_refused_with_what_to_do(config, parts):
    save(config, parts, 3, 4)
    (root(config) / "latest").unlink()
    for read in (resume, lambda config: checkpoint.require_latest(config.run_dir)):
        with pytest.raises(ValueError, match=r"latest: got no such file beside step-00000003, step-00000004") as error:
            read(config)
    subprocess.run(str(error.value).split("run: ")[1].split(" (or")[0], shell=True, check=True)
    assert resume(config) == 4


@pytest.mark.parametrize("before", [[], [1]])
def test_a_crash_between_rename_and_pointer_loses_nothing(config, parts, before, monkeypatch):
    save(config, parts, *before)
    with monkeypatch.context() as patch:
        patch.setattr(files, "move_latest", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(config, parts, 2)
    assert checkpoint.latest(config.run_dir).name == "step-00000002"
    assert resume(config) == 2
    assert (root(config) / "latest").read_text() == "step-00000002"
    assert not (root(config) / "latest.new").exists()


def test_a_crash_before_the_rename_leaves_the_one_before(config, parts, monkeypatch):
    save(config, parts, 1, 9)
    (root(config) / "latest").write_text("step-00000001")
    rename = Path.rename

    def die(path, target):
        if path.is_dir():
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        for step in (8, 9):  # 9 replaces one that is there
            with pytest.raises(KeyboardInterrupt):
                save(config, parts, step)
            assert checkpoint.latest(config.run_dir).name == "step-00000001"
    assert resume(config) == 1
    assert names(config) == ["step-00000001", "step-00000009"]


def test_a_damaged_one_is_passed_over_for_the_newest_intact(config, parts, capsys):
    save(config, parts, 1, 2, 3, 4, keep=4)
    flip(root(config) / "step-00000004" / "__0_0.distcp")
    (root(config) / "step-00000003" / ".metadata").unlink()
    flip(root(config) / "step-00000001" / "config.json")
    assert resume(config) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Going on from" in line]
    assert "step-00000004: got a damaged __0_0.distcp" in line
    assert "step-00000003/.metadata" in line
    assert checkpoint.latest(config.run_dir).name == "step-00000002"
    flip(root(config) / "step-00000002" / "SHA256SUMS")
    with pytest.raises(ValueError, match=r"step-00000002: got .*; checkpoint .*step-00000001: got a damaged config"):
        resume(config)


def test_multiples_stay_besides_the_newest(config, parts):
    config = replace(config, checkpoint_keep_every=4)
    save(config, parts, *range(1, 11))
    assert names(config) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


def test_beside_the_steps_what_was_there_at_the_call_is_saved(config, parts, monkeypatch):
    may_write = threading.Event()
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (may_write.wait(PATIENCE), write(*args)))
    config = replace(config, checkpoint_async=True)
    model, optimizer = parts
    wanted = [p.clone() for p in model.parameters()]
    saving = checkpoint.save(config.run_dir, 3, model, optimizer, config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            optimizer.state[p]["exp_avg"].zero_()
    assert checkpoint.latest(config.run_dir) is None
    may_write.set()
    saving.wait()
    model, optimizer = fresh(config)
    assert checkpoint.restore(config.run_dir, model, optimizer, config) == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted, strict=True))
    assert all(optimizer.state[p]["exp_avg"].any() for p in model.parameters())


def test_an_error_beside_the_steps_is_raised_by_the_wait(config, parts, monkeypatch):
    monkeypatch.setattr(checkpoint, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    saving = checkpoint.save(config.run_dir, 3, *parts, replace(config, checkpoint_async=True))
    with pytest.raises(OSError, match="disk full"):
        saving.wait()
    assert checkpoint.latest(config.run_dir) is None


def test_weights_with_nan_replace_nothing(config, parts):
    save(config, parts, 1)
    model, optimizer = parts
    name = "layers.1.mixer_norm.weight"
    weight = dict(model.named_parameters())[name]
    state = optimizer.state[weight]["exp_avg_sq"]
    for tensor, field in ((weight.data, f"model.{name}"), (state, f"optimizer.state.{name}.exp_avg_sq")):
        for value in (float("nan"), float("-inf")):
            kept = tensor[2].item()
            tensor[2] = value
            with pytest.raises(FloatingPointError, match=f"{field}: got values from {value}"):
                save(config, parts, 2)
            tensor[2] = kept
    assert names(config) == ["step-00000001"]
    save(config, parts, 2)


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


def test_weights_alone_are_written_whole_to_a_new_place(config, parts, tmp_path):
    model = parts[0]
    checkpoint.save_weights(tmp_path / "weights", model)
    loaded = fresh(config)[0]
    checkpoint.load_model(tmp_path / "weights", loaded)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="output: got .* expected a new or empty directory"):
        checkpoint.save_weights(tmp_path / "weights", model)
    flip(tmp_path / "weights" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"weights: got a damaged __0_0\.distcp"):
        checkpoint.load_model(tmp_path / "weights", loaded)
    next(model.parameters()).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"model\.embedding\.weight: got values from inf"):
        checkpoint.save_weights(tmp_path / "more", model)


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
        ("SHA256SUMS", truncate),
        ("SHA256SUMS", Path.unlink),
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
