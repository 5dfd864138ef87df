"""Kernels are compiled before they are needed: the dry run must launch what the call launches."""

import pytest
import torch
from triton.runtime import interpreter

from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone, Inputs
from lasp.kernels.segments import Segments
from lasp.kernels.triton import config, delta, dispatch, launch
from tests.kernels.boundary import Asked

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="looks at calls of Triton's interpreter")
DECAYS = {"none": None, "constant": (2,), "scalar": (1, 100, 2), "diagonal": (1, 100, 2, 32)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple]:
    """What is launched from here on: kernels, kinds of arguments and constants. None of it runs."""
    seen: set[tuple] = set()

    def record(self, *args, grid, warmup, **constants) -> None:
        kinds = tuple(arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args)
        seen.add((self.fn.__qualname__, kinds, tuple(constants.items())))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    for module in (config, delta):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8)
    return seen


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", list(DECAYS))
@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_a_dry_run_launches_what_the_call_launches(
    launched: set[tuple], kind: str, decay: str, packed: bool, asked: bool
):
    shape = DECAYS[decay]
    q, k, v = (torch.rand(1, 100, 2, 32, requires_grad=True) for _ in range(3))
    g = None if shape is None else -torch.rand(shape).requires_grad_(len(shape) > 1)
    beta = torch.rand(1, 100, 2, requires_grad=True) if kind == "delta" else None
    offsets = torch.tensor([0, 30, 100]) if packed else None
    x = Inputs(q, k, v, g, beta, 32**-0.5, Segments(1, 100, offsets))
    state = torch.zeros(x.state_shape) if asked else None
    boundary = Asked() if asked else Alone()
    o, final = run_op(x, boundary, initial_state=state, output_final_state=True, backend="triton")
    torch.autograd.backward([o, final][: 1 + asked], [torch.ones_like(o), torch.ones_like(final)][: 1 + asked])
    real = launched.copy()
    assert len(real) > 4

    launched.clear()
    op, _ = dispatch.triton_op(x, causal=True, asked=True, wants_summary=asked)
    assert op is not None
    launch.run_dry(lambda: dispatch.dry_run(op, x, wants_summary=asked, backward=True))
    assert launched == real
