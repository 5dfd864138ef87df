"""Directories of torch.distributed.checkpoint: written as ever, and read as data only, whoever may have written them.

A pickle can name any function and have it called. PyTorch keeps the table of contents as a pickle, and unpickles what
is not a tensor without a restriction, as DeepSpeed and Megatron do; here tensors and plain data are taken, and code is
refused.
"""

import os
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from lasp.kernels.pending import Pending
from lasp.parallel.comm import Group

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch's: torch.load takes data only, whatever its caller asks for
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA_CLASSES = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    planner.SavePlan,  # this and the following: Megatron keeps its plans
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    torch.serialization._get_layout,
)
_METADATA_NAMES: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in _METADATA_CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # its name in Python 3.13
    (_MEGATRON, "MCoreMetadata"): metadata.Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
}


def save(state_dict: dict[str, Any], path: str | Path, *, alone: bool = False, group: Group = None) -> None:
    """Writes a state dict, on all ranks together or on this one alone. Raises OSError on every rank if one fails."""
    with _quiet(), _naming(path):
        dcp.save(state_dict, checkpoint_id=path, no_dist=alone, process_group=group)


def start_saving(state_dict: dict[str, Any], path: str | Path, group: Group) -> Pending[None]:
    """As `save` on all ranks, from a copy: the state dict may change as soon as this returns."""
    written = dcp.async_save(state_dict, checkpoint_id=path, process_group=group)
    assert isinstance(written, Future)  # as long as the copy is made at once

    def finish() -> None:
        with _naming(path):
            written.result()

    return Pending(finish)


def load(state_dict: dict[str, Any], path: str | Path, *, alone: bool = False, group: Group = None) -> None:
    """Fills a state dict. Raises ValueError, on all ranks together or on this one alone, unless all is there.

    What is wrong with messages between ranks is a RuntimeError, as elsewhere, and tells nothing of the checkpoint.
    """
    try:
        with _quiet(), only_data(path):
            dcp.load(state_dict, storage_reader=_Reader(path), no_dist=alone, process_group=group)
    except (Exception, CheckpointException) as error:  # the latter is no Exception, and holds what ranks met alone
        if isinstance(error, RuntimeError) and not alone:
            raise
        raise ValueError(f"checkpoint {path}: got {_reasons(error)}, expected a complete one of this model") from error


def read_metadata(path: str | Path) -> Metadata:
    """What a directory of torch.distributed.checkpoint holds. Raises ValueError if that cannot be read, or is code."""
    try:
        return _Reader(path).read_metadata()
    except Exception as error:
        raise ValueError(f"checkpoint {path}: got {error!r}, expected readable metadata") from error


@contextmanager
def only_data(path: str | Path, *classes: type) -> Iterator[None]:
    """Inside it every `torch.load` of this process takes tensors, plain data and instances of `classes`, no more.

    What else is in the checkpoint that is loaded from `path` raises ValueError.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {path}: got a pickle of more than data, expected tensors and numbers") from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # no Exception
        raise OSError(f"checkpoint {path}: got {_reasons(error)}, expected to write it") from error


def _reasons(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return repr(error)
    return "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items())


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for, where it is
        yield


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            contents = _MetadataUnpickler(file).load()
        if not isinstance(contents, Metadata):
            raise pickle.UnpicklingError(f"a pickled {type(contents).__name__}")
        contents.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return contents


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _METADATA_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}, which no checkpoint's metadata names") from None
