"""What the public ops accept. A failure is a ValueError that names the argument, what was got and what was expected.

Every call is checked, so what is written of tensors is put into words only when something is wrong.
"""

import math
from collections.abc import Collection
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(name: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, expected {expected}")


def require(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        fail(name, got, expected)


def choice(name: str, value: object, choices: Collection[str]) -> None:
    if not (isinstance(value, str) and value in choices):
        fail(name, repr(value), f"one of {', '.join(choices)}")


def number(name: str, x: object, kind: type, expected: str) -> None:
    """kind: numbers.Real or numbers.Integral."""
    require(isinstance(x, kind) and not isinstance(x, bool), name, repr(x), expected)


def flag(name: str, x: object) -> None:
    require(isinstance(x, bool), name, repr(x), "True or False")


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        fail(name, "None" if x is None else f"a {type(x).__name__}", "a tensor")
    if x.layout != torch.strided:
        fail(name, f"layout {x.layout}", "a dense tensor")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if x.shape != expected:
        fail(name, f"shape {list(x.shape)}", f"{meaning} = {list(expected)}")


def same_kind(required: dict[str, Tensor], **optional: Tensor | None) -> None:
    """Floating point tensors of these dtypes, all on the device of the first."""
    given = required | {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        tensor(name, x)
    first, reference = next(iter(required.items()))
    device = reference.device
    for name, x in given.items():
        if x.device != device:
            fail(name, f"device {x.device}", f"{device}, as {first}")
        if x.dtype not in DTYPES:
            fail(name, f"dtype {x.dtype}", "float64, float32, bfloat16 or float16")


def rows(**tensors: Tensor) -> None:
    """[B, T, heads, head size], of which B alone may be 0."""
    for name, x in tensors.items():
        if x.ndim != 4:
            fail(name, f"{x.ndim} dimensions", "4: [B, T, heads, head size]")
        if 0 in x.shape[1:]:
            fail(name, f"shape {list(x.shape)}", "at least one token, head and channel")


def heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, T, Hq, K] and v [B, T, H, V] with H a multiple of Hq."""
    rows(q=q, k=k, v=v)
    (batch, tokens, q_heads, _), (*_, heads, value_dim) = q.shape, v.shape
    shape("k", k, q.shape, "q's shape [B, T, Hq, K]")
    shape("v", v, (batch, tokens, heads, value_dim), "[B, T, H, V] with q's B and T")
    if heads % q_heads != 0:
        fail("v", f"{heads} heads", f"a multiple of q's {q_heads}")
    if not k.dtype == q.dtype == v.dtype:
        fail("dtype", f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "the same for all three")


def decay(g: Tensor | None, v: Tensor, key_dim: int, causal: bool) -> None:
    """None, [H], [B, T, H] or [B, T, H, K]; natural log, at most 0 (looked at on the CPU only: no synchronisation)."""
    if g is None:
        return
    if not causal:
        fail("decay", f"shape {list(g.shape)}", "None with causal=False")
    if g.ndim == 1:
        shape("decay", g, (v.shape[2],), "[H]")
        require(not g.requires_grad, "decay", "a constant decay [H] that requires grad", "[B, T, H] to learn a decay")
    elif g.ndim == 3:
        shape("decay", g, v.shape[:3], "[B, T, H]")
    else:
        shape("decay", g, (*v.shape[:3], key_dim), "[H], [B, T, H] or [B, T, H, K]")
    if g.device.type == "cpu" and g.numel() > 0:
        highest = g.detach().max().item()
        got = "NaN" if math.isnan(highest) else f"a maximum of {highest}"
        require(highest <= 0, "decay", got, "natural logarithms, at most 0")


def softmax_scale(value: float | None, key_dim: int) -> float:
    """`scale`, of softmax attention: above 0, which fused kernels take for granted."""
    factor = scale(value, key_dim)
    require(factor > 0, "scale", value, "a number above 0 for softmax attention")
    return factor


def scale(value: float | None, key_dim: int) -> float:
    """The factor of the scores: K ** -0.5 if None; it must be finite and not zero."""
    if value is None:
        return key_dim**-0.5
    number("scale", value, Real, "a number, or None")
    require(math.isfinite(value) and value != 0, "scale", value, "a finite number other than 0")
    return float(value)


def state(s: Tensor | None, expected: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """[N, H, K, V] in fp32 (fp64 for fp64 inputs), where the inputs are."""
    if s is None:
        return
    tensor("initial_state", s)
    shape("initial_state", s, expected, "[N, H, K, V]")
    if s.dtype != dtype:
        fail("initial_state", f"dtype {s.dtype}", f"{dtype} for such inputs")
    if s.device != device:
        fail("initial_state", f"device {s.device}", f"{device}, as the inputs")


def cu_seqlens(offsets: Tensor | None, batch: int, tokens: int, copy: bool = True) -> None:
    """[N + 1] int32 or int64 from 0 to `tokens`, not decreasing, with B = 1.

    copy=False: of offsets that are not on the CPU the shape alone is looked at.
    """
    if offsets is None:
        return
    tensor("cu_seqlens", offsets)
    require(offsets.dtype in (torch.int32, torch.int64), "cu_seqlens", f"dtype {offsets.dtype}", "int32 or int64")
    require(offsets.ndim == 1 and offsets.numel() >= 2, "cu_seqlens", f"shape {list(offsets.shape)}", "[N + 1], N >= 1")
    require(batch == 1, "cu_seqlens", f"a batch of {batch}", "B = 1 for packed documents")
    if copy or offsets.device.type == "cpu":
        offset_values(offsets, tokens)


def offset_values(offsets: Tensor, tokens: int) -> None:
    """From 0 to `tokens`, not decreasing. Copies offsets on a device to the host."""
    values = offsets.tolist()
    require(values[0] == 0, "cu_seqlens", f"a start at {values[0]}", "0")
    require(values[-1] == tokens, "cu_seqlens", f"an end at {values[-1]}", f"{tokens}, the number of tokens")
    require(values == sorted(values), "cu_seqlens", values, "offsets that do not decrease")
