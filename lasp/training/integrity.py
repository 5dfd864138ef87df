"""Whether a checkpoint is what was saved: a checksum of every file, and no number in it that is not finite.

SHA256SUMS has a line for every other file of its directory, in the format of `sha256sum`, which can check it as well.
"""

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.shards import local_part
from lasp.training.together import on_rank_0, together

CHECKSUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name, several files at a time."""
    paths = list(files)
    with ThreadPoolExecutor() as pool:
        return dict(zip([path.name for path in paths], pool.map(_checksum, paths), strict=True))


def format_checksums(sums: dict[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def seal(path: Path, group: Group) -> None:
    """Writes the checksums of all files of a directory, of which every rank reads its share. Collective."""

    def sum_share() -> dict[str, str]:
        found = sorted(file for file in path.iterdir() if file.name != CHECKSUMS_FILE)
        return checksums(found[comm.rank(group) :: comm.size(group)])

    sums: dict[str, str] = {}
    for share in together(group, sum_share):
        sums |= share
    on_rank_0(group, lambda: (path / CHECKSUMS_FILE).write_text(format_checksums(sums)))


def verify(path: Path, group: Group = None) -> None:
    """Raises ValueError, on every rank of the group, unless all files in a directory are as when they were saved.

    Every rank reads its share of them.
    """

    def verify_share() -> None:
        try:
            wanted = _read_checksums(path)
            unknown = sorted({file.name for file in path.iterdir()} - {*wanted, CHECKSUMS_FILE})
            if unknown:
                raise ValueError(f"checkpoint {path}: got {unknown[0]}, expected only files named in {CHECKSUMS_FILE}")
            share = sorted(wanted)[comm.rank(group) :: comm.size(group)]
            got = checksums(path / name for name in share)
        except OSError as error:
            raise ValueError(f"checkpoint {path}: got {error}, expected all of its files") from error
        for name in share:
            if got[name] != wanted[name]:
                raise ValueError(f"checkpoint {path}: got a damaged {name}, expected one of SHA-256 {wanted[name]}")

    together(group, verify_share)


def read_verified(path: Path, name: str) -> bytes:
    """The content of one of a directory's files. Raises ValueError unless it is as when it was saved."""
    wanted = _read_checksums(path).get(name)
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint {path}: got {error}, expected all of its files") from error
    if hashlib.sha256(content).hexdigest() != wanted:
        raise ValueError(f"checkpoint {path}: got a damaged {name}, expected one of SHA-256 {wanted}")
    return content


def require_finite(tensors: Iterable[tuple[str, Tensor]], group: Group) -> None:
    """Raises FloatingPointError on every rank if one holds NaN or an infinity in its part of a tensor, naming both."""

    def require_own() -> None:
        for name, tensor in tensors:
            own = local_part(tensor)
            if own.is_floating_point() and own.numel() > 0:
                extremes = [x.item() for x in own.aminmax()]  # NaN if there is one: a pass that needs no memory
                if not torch.tensor(extremes).isfinite().all():
                    raise FloatingPointError(f"{name}: got values from {extremes[0]} to {extremes[1]}, expected finite")

    together(group, require_own)


def pieces(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The weights that an optimiser updates, and its states of them, where they have no names."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(weights):
        yield f"piece {index} of the weights", weight
        for key, state in optimizer.state.get(weight, {}).items():
            if isinstance(state, Tensor):
                yield f"{key} of piece {index}", state


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checksums(path: Path) -> dict[str, str]:
    file = path / CHECKSUMS_FILE
    if not file.exists():
        raise ValueError(
            f"checkpoint {path}: got no {CHECKSUMS_FILE}, expected one; if you know these files to be whole (saved by "
            f"an earlier lasp, say), run: cd {shlex.quote(str(path))} && sha256sum $(ls -A) > {CHECKSUMS_FILE}"
        )
    text = file.read_bytes().decode(errors="replace")
    lines = _LINE.findall(text)
    if text != "".join(f"{digest}  {name}\n" for digest, name in lines) or not lines:
        raise ValueError(f"checkpoint {path}: got a damaged {CHECKSUMS_FILE}, expected lines of sha256sum")
    return {name: digest for digest, name in lines}
