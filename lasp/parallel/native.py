"""The native code of csrc/, compiled when first needed and loaded by ctypes: it knows neither Python nor PyTorch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

LASP = Path(__file__).parents[1]
SOURCES = LASP / "csrc" if (LASP / "csrc").is_dir() else LASP.parent / "csrc"  # installed, or in a checkout
BUILDS = Path.home() / ".cache" / "lasp"
PARTS = 16  # of csrc/channel.h
NONE = 0  # of csrc/combine.h; the others follow
Pair = ctypes.c_int32 * 2


class Unavailable(RuntimeError):
    """There is no compiler, or it failed."""


class Shape(ctypes.Structure):
    """csrc/combine.h explains the fields."""

    _fields_ = [("H", ctypes.c_int64), *((name, ctypes.c_int32) for name in ("K", "V", "transition"))]

    def unit_bytes(self, itemsize: int) -> int:
        """What a unit takes in a slot: its state and its transition, each padded to 16 bytes."""
        transition = (0, 1, self.K, self.K * self.K)[self.transition]
        return sum(-(-self.H * numbers * itemsize // 16) * 16 for numbers in (self.K * self.V, transition))


class Layout(ctypes.Structure):
    _fields_ = [("ranks", ctypes.c_int32), ("units_per_rank", ctypes.c_int32)]


class Channel(ctypes.Structure):
    """csrc/channel.h explains the fields."""

    _fields_ = [
        ("buffers", ctypes.c_void_p),
        ("local", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("patience_ns", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("layout", Layout),
        ("shape", Shape),
        ("backward", ctypes.c_int32),
        ("reach", Pair),
        ("spread", Pair),
        ("passes", Pair),
    ]


def compiler(device: torch.device) -> list[str]:
    """The command that makes a library for this kind of device, but for its input and output."""
    if device.type == "cpu":
        return ["c++", "-O2", "-std=c++17", "-Wall", "-shared", "-fPIC"]
    major, minor = torch.cuda.get_device_capability(device)
    return nvcc(f"{major}{minor}")


def nvcc(architecture: str) -> list[str]:
    gencode = f"arch=compute_{architecture},code=sm_{architecture}"
    return ["nvcc", "-O3", "-std=c++17", "-gencode", gencode, "-shared", "-Xcompiler", "-fPIC"]


def build(source: str, command: list[str]) -> Path:
    """The library of csrc/`source`, compiled unless that has been done before.

    Raises:
        Unavailable: no compiler, or what it said.
    """
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no {command[0]}")
    if not (SOURCES / source).is_file():
        raise Unavailable(f"{SOURCES / source} is missing")
    texts = [path.read_bytes() for path in [*sorted(SOURCES.glob("*.h")), SOURCES / source]]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(command).encode()])).hexdigest()[:16]
    library = BUILDS / f"{Path(source).stem}-{key}.so"
    if library.exists():
        return library
    BUILDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILDS) as folder:  # other ranks may do the same at the same time
        made = Path(folder) / library.name
        done = subprocess.run([*command, str(SOURCES / source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{command[0]} failed: {done.stderr.strip()}")
        os.replace(made, library)
    return library


@cache
def load(device: torch.device) -> ctypes.CDLL:
    """The library for this device, with `lasp_publish` and `lasp_collect`. Raises Unavailable."""
    library = ctypes.CDLL(str(build("host.cpp" if device.type == "cpu" else "device.cu", compiler(device))))
    library.lasp_publish.argtypes = [ctypes.POINTER(Channel), ctypes.c_int, *[ctypes.c_void_p] * 3]
    library.lasp_collect.argtypes = [ctypes.POINTER(Channel), ctypes.c_int, *[ctypes.c_void_p] * 2]
    return library
