"""Log-linear attention as models have it on a GPU, with the kernels' own sizes, against the reference in float64."""

from functools import cache

import pytest
import torch

from lasp.kernels import log_linear_attention, log_linear_delta_rule
from lasp.kernels.log_linear import choose_op
from lasp.kernels.reference.log_linear import LogLinearOp
from tests.kernels.log_linear import Drawn, draw, inputs, made_ready, results
from tests.kernels.test_triton_linear import poisoned_memory  # noqa: F401  a fixture
from tests.parallel.inputs import error, generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="heads of these sizes take the interpreter long")
DTYPES = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 5e-6}  # with the largest error
SHAPES = {  # documents, the tokens that each has had before, if any, q/k heads and heads
    "documents behind initial slots": {"offsets": [0, 1, 1, 730, 1500], "seen": [300, 12, 1000, 64], "heads": (2, 4)},
    "odd length": {"tokens": 777, "batch": 2, "heads": (1, 2)},
    "one token": {"tokens": 1, "batch": 16, "heads": (1, 2), "levels": 1},
}
SIZES = {  # K and V, of which the first have all dtypes and shapes
    "gated": [(64, 64), (128, 128), (256, 256), (128, 64), (64, 256), (32, 32), (40, 24), (96, 80)],
    "delta": [(64, 64), (128, 128), (128, 256), (128, 64), (64, 128), (32, 32), (40, 24), (96, 80)],
}
CASES = [
    (family, size, shape, dtype)
    for family, sizes in SIZES.items()
    for size in sizes
    for shape in SHAPES
    for dtype in DTYPES
    if size in sizes[:2] or (shape == "documents behind initial slots" and dtype == torch.bfloat16)
]


@cache
def drawn(seed: int, family: str, size: tuple[int, int], shape: str) -> Drawn:
    options = {"tokens": 1500} | SHAPES[shape]
    return draw(generator(seed), delta=family == "delta", sizes=size, **options)


def rounded(seed: int, family: str, size: tuple[int, int], shape: str, dtype: torch.dtype) -> Drawn:
    return drawn(seed, family, size, shape).to(dtype, torch.float32, "cuda")


@cache
def ready(seed: int, family: str) -> None:
    made_ready(rounded(seed, *case) for case in CASES if case[0] == family)


of_all = pytest.mark.parametrize(
    ("family", "size", "shape", "dtype"), CASES, ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x)
)


@of_all
def test_equals_the_reference(gen, run_seed, family, size, shape, dtype):
    ready(run_seed, family)
    given, upstream = rounded(run_seed, family, size, shape, dtype), {}
    function = {"gated": log_linear_attention, "delta": log_linear_delta_rule}[family]
    asked = {"final": True, "output_final_state": True}
    got = results(gen, function, given, upstream, backend="triton", **asked)
    upstream = {name: x.to(got[name]) for name, x in upstream.items()}
    exact = given.to(torch.float64, torch.float64, "cuda")
    wanted = results(gen, function, exact, upstream, backend="reference", **asked)
    found = {name: error(got[name].double(), wanted[name]) for name in wanted}
    assert max(found.values()) < DTYPES[dtype], found


@of_all
def test_auto_is_triton(run_seed, family, size, shape, dtype):
    x = inputs(rounded(run_seed, family, size, shape, dtype))
    assert not isinstance(choose_op(x, "auto", wants_summary=False), LogLinearOp)
