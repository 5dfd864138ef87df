"""What was not saved so is noticed, and what is not finite is not saved."""

import os
import subprocess
from dataclasses import replace

import pytest
import torch

from lasp.models import Decoder
from lasp.training import checkpoint
from lasp.training.integrity import CHECKSUMS_FILE, verify
from lasp.training.native import NativeEngine
from lasp.training.optimizer import build_optimizer
from lasp.training.train import train


@pytest.fixture
def saved(config):
    model = Decoder(config.model).double()
    checkpoint.save(config.run_dir, 1, model, build_optimizer(model, config.optimizer), config)
    return checkpoint.require_latest(config.run_dir)


@pytest.fixture
def small(tmp_path):
    """A sealed directory of small files, under names that differ in one bit."""
    for name in ("a", "c", "config.json"):
        (tmp_path / name).write_bytes(os.urandom(40))
    checkpoint._seal(tmp_path, [])
    verify(tmp_path)
    return tmp_path


def test_one_flipped_bit_anywhere_is_noticed(small, gen):
    for file in small.iterdir():
        content = file.read_bytes()
        for at in range(len(content)):
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(torch.randint(8, (), generator=gen))
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match="got"):
                verify(small)
        file.write_bytes(content)
    verify(small)


def test_every_file_of_a_checkpoint_is_covered(saved):
    assert sorted(file.name for file in saved.iterdir()) == [".metadata", "SHA256SUMS", "__0_0.distcp", "config.json"]
    for file in list(saved.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
        with pytest.raises(ValueError, match=f"got a damaged {file.name}"):
            verify(saved)
        file.write_bytes(content)


def test_lines_that_are_gone_are_noticed(small):
    lines = (small / CHECKSUMS_FILE).read_text().splitlines(keepends=True)
    (small / CHECKSUMS_FILE).write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=f"got a, expected only files named in {CHECKSUMS_FILE}"):
        verify(small)
    (small / CHECKSUMS_FILE).write_text("")
    with pytest.raises(ValueError, match=f"got a damaged {CHECKSUMS_FILE}"):
        verify(small)


def test_sha256sum_reads_and_writes_the_same(saved):
    """So an older checkpoint, without checksums, is refused until somebody runs the command that they are told."""
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS_FILE], cwd=saved, check=True, capture_output=True)
    (saved / CHECKSUMS_FILE).unlink()
    with pytest.raises(ValueError, match="got no SHA256SUMS, expected one") as error:
        verify(saved)
    subprocess.run(str(error.value).split("run: ")[1], shell=True, check=True)
    verify(saved)


@pytest.mark.parametrize(
    ("eval_every", "message"), [(2, "held-out loss: got nan"), (6, "model.norm.weight: got values from nan")]
)
def test_a_run_that_went_nan_keeps_its_last_good_checkpoint(config, eval_every, message, monkeypatch):
    step = NativeEngine.step
    taken = []

    def overflow(self, lr, loss):
        norm = step(self, lr, loss)
        taken.append(lr)
        if len(taken) == 2:
            self.model.norm.weight.data[0] = float("nan")
        return norm

    monkeypatch.setattr(NativeEngine, "step", overflow)
    config = replace(config, checkpoint_every=1, checkpoint_keep=1, eval_every=eval_every)
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    assert checkpoint.require_latest(config.run_dir).name == "step-00000001"
    train(config)
