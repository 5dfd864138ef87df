"""The native code of csrc/, loaded by ctypes: it knows neither Python nor PyTorch."""

import ctypes
from functools import cache

import torch

from lasp.parallel import build
from lasp.parallel.build import Unavailable

PARTS = 16  # of csrc/channel.h
Pair = ctypes.c_int32 * 2


class Shape(ctypes.Structure):
    """csrc/combine.h explains the fields."""

    _fields_ = [("H", ctypes.c_int64), *((name, ctypes.c_int32) for name in ("K", "V", "transition"))]

    def unit_bytes(self, itemsize: int) -> int:
        """What a unit takes in a slot: its state and its transition, each padded to 16 bytes."""
        transition = (0, 1, self.K, self.K * self.K)[self.transition]
        return sum(-(-self.H * numbers * itemsize // 16) * 16 for numbers in (self.K * self.V, transition))


class Layout(ctypes.Structure):
    """csrc/combine.h explains the fields."""

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


@cache
def load(device: torch.device) -> ctypes.CDLL:
    """The library for this device, with `lasp_publish` and `lasp_collect`. Raises Unavailable."""
    if device.type == "cpu":
        part = build.HOST
    else:
        part = build.device("{}{}".format(*torch.cuda.get_device_capability(device)))
    path = build.find(part)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(str(error)) from error
    library.lasp_publish.argtypes = [ctypes.POINTER(Channel), ctypes.c_int, *[ctypes.c_void_p] * 3]
    library.lasp_collect.argtypes = [ctypes.POINTER(Channel), ctypes.c_int, *[ctypes.c_void_p] * 2]
    return library
