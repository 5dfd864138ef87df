"""A payload in every place of a checkpoint that is a pickle: it is refused, and does not run."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lasp.config import DeepSpeedConfig
from lasp.integrations import megatron_weights
from lasp.models import Decoder
from lasp.training import checkpoint
from lasp.training.integrity import CHECKSUMS_FILE, checksums, format_checksums
from lasp.training.optimizer import build_optimizer
from lasp.training.storage import only_data, read_metadata


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that a payload makes when it runs."""
    mark = tmp_path / "it ran"
    yield mark
    assert not mark.exists()


@pytest.fixture
def saved(config):
    model = Decoder(config.model).double()
    checkpoint.save(config.run_dir, 1, model, build_optimizer(model, config.optimizer), config)
    return checkpoint.require_latest(config.run_dir)


def seal(folder):
    """As a stranger would: the checksums are right."""
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    (folder / CHECKSUMS_FILE).write_text(format_checksums(checksums(folder.iterdir())))


def in_place_of_metadata(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))


def inside_metadata(folder, mark):
    metadata = read_metadata(folder)
    metadata.planner_data = Payload(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_old_pickle_protocol(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark), protocol=0))


def by_an_attribute_of_a_class(folder, mark):
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93.")


def in_metadata_of_a_rank(folder, mark):
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Payload(mark)))


def in_place_of_a_tensor(folder, mark):
    entry = next(info for at, info in read_metadata(folder).storage_data.items() if at.fqn == "model.embedding.weight")
    torch.save(Payload(mark), folder / "tensor")
    content = (folder / "tensor").read_bytes()
    (folder / "tensor").unlink()
    file = folder / entry.relative_path
    whole = bytearray(file.read_bytes())
    whole[entry.offset : entry.offset + entry.length] = content.ljust(entry.length, b"\0")
    file.write_bytes(whole[: entry.offset] + content)
    metadata = read_metadata(folder)
    for at, info in metadata.storage_data.items():
        if at.fqn == "model.embedding.weight":
            info.length = len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


IN_METADATA = [
    in_place_of_metadata,
    inside_metadata,
    in_old_pickle_protocol,
    by_an_attribute_of_a_class,
    in_metadata_of_a_rank,
]


@pytest.mark.parametrize("hide", [*IN_METADATA, in_place_of_a_tensor])
def test_nothing_runs_when_weights_or_a_run_are_loaded(config, saved, mark, hide):
    hide(saved, mark)
    seal(saved)
    model = Decoder(config.model).double()
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000001: got"):
        checkpoint.load_model(saved, model)  # what --initial-weights, generate and export do
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000001: got"):
        checkpoint.restore(config.run_dir, model, build_optimizer(model, config.optimizer), config)


def test_nothing_runs_in_an_entry_that_is_no_tensor(config, saved, mark):
    model = Decoder(config.model).double()
    optimizer = build_optimizer(model, config.optimizer)
    state = {**checkpoint._training_state(model, optimizer), "step": Payload(mark)}
    dcp.save(state, checkpoint_id=saved, no_dist=True)
    seal(saved)
    with pytest.raises(ValueError, match="expected a complete one of this model"):
        checkpoint.restore(config.run_dir, model, optimizer, config)


def test_nothing_runs_in_a_checkpoint_of_deepspeed(config, tmp_path, mark):
    pytest.importorskip("deepspeed")
    config = replace(config, dtype="float32", engine="deepspeed")
    for stage, file in ((0, "mp_rank_00_model_states.pt"), (1, "mp_rank_00_model_states.pt"),
                        (1, "zero_pp_rank_0_mp_rank_00_optim_states.pt")):  # fmt: skip
        folder = tmp_path / f"{stage}-{file}"
        folder.mkdir()
        saved = replace(config, deepspeed=DeepSpeedConfig(stage=stage))
        checkpoint._write(folder / "config.json", json.dumps(checkpoint.dataclasses.asdict(saved)))
        whole = {"module": {}, "buffer_names": [], "param_shapes": [], "shared_params": {}, "ds_version": "0"}
        torch.save(whole, folder / "mp_rank_00_model_states.pt")
        torch.save(Payload(mark), folder / file)
        seal(folder)
        with pytest.raises(ValueError, match="got a pickle of more than data"):
            checkpoint.load_model(folder, Decoder(config.model))


@pytest.mark.parametrize("hide", IN_METADATA)
def test_nothing_runs_in_a_checkpoint_of_megatron(config, tmp_path, mark, hide):
    model = replace(config.model, tie_embeddings=False)
    megatron_weights.save(Decoder(model), tmp_path / "megatron")
    hide(tmp_path / "megatron", mark)
    with pytest.raises(ValueError, match="megatron: got"):
        megatron_weights.load(tmp_path / "megatron")


def test_only_data_holds_inside_alone(tmp_path):
    mark = tmp_path / "it ran"
    torch.save(Payload(mark), tmp_path / "payload.pt")
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}: got a pickle"), only_data(tmp_path):
        torch.load(tmp_path / "payload.pt", weights_only=False)
    assert not mark.exists()
    torch.load(tmp_path / "payload.pt", weights_only=False)
    assert mark.exists()  # or this file would prove nothing
