"""Kernels are compiled before they are needed: the dry run must launch what the call launches."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources

from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone, run
from lasp.kernels.segments import Segments
from lasp.kernels.triton import device, dispatch, launch
from lasp.kernels.triton.delta import op as delta
from lasp.kernels.triton.scalar import config as scalar_config
from lasp.kernels.triton.scalar import gates
from lasp.kernels.triton.shared import tiles
from tests.kernels.boundary import Asked
from tests.kernels.log_linear import log_linear_inputs_of
from tests.parallel.inputs import inputs_of

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
    for module in (tiles, delta):
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
    x = inputs_of(q, k, v, g, beta, 32**-0.5, Segments(1, 100, offsets))
    state = torch.zeros(x.state_shape) if asked else None
    boundary = Asked() if asked else Alone()
    o, final = run_op(x, boundary, initial_state=state, output_final_state=True, backend="triton")
    torch.autograd.backward([o, final][: 1 + asked], [torch.ones_like(o), torch.ones_like(final)][: 1 + asked])
    real = launched.copy()
    assert len(real) > 4

    launched.clear()
    op, _ = dispatch.triton_op(x, asked=True, wants_summary=asked)
    assert op is not None
    launch.run_dry(lambda: dispatch.dry_run(op, x, wants_summary=asked, backward=True))
    assert launched == real


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
def test_a_dry_run_of_log_linear_attention(launched: set[tuple], delta: bool, asked: bool):
    q, k, v = (torch.rand(1, 100, 2, 32, requires_grad=True) for _ in range(3))
    g, scales = -torch.rand(1, 100, 2).requires_grad_(), torch.rand(1, 100, 2, 9, requires_grad=True)
    tensors = {"q": q, "k": k, "v": v, "decay": g, "level_scales": scales}
    if delta:
        tensors["beta"] = torch.rand(1, 100, 2, requires_grad=True)
    x = log_linear_inputs_of(tensors, scale=1.0, segments=Segments(1, 100, torch.tensor([0, 30, 100])), seen=(70, 5))
    op, _ = dispatch.triton_log_linear_op(x, True, asked)
    state = torch.zeros(x.state_shape) if asked else None
    o, final = run(op, Asked() if asked else Alone(), x, state, True)
    torch.autograd.backward([o, final][: 1 + asked], [torch.ones_like(o), torch.ones_like(final)][: 1 + asked])
    real = launched.copy()
    assert len(real) > 4

    launched.clear()
    launch.run_dry(lambda: dispatch.dry_run(op, x, wants_summary=asked, backward=True))
    assert launched == real


class Large:
    """A kernel that needs so much memory for each of its stages."""

    def __init__(self, memory: int, error: str = "shared memory"):
        self.memory, self.error = memory, error

    def __getitem__(self, grid):
        def run(*args, STAGES=None, num_stages=3, **constants):
            stages = num_stages if STAGES is None else STAGES
            if stages * self.memory > 100:
                raise OutOfResources(stages * self.memory, 100, self.error)
            return args, stages

        return run


@pytest.mark.parametrize(("constants", "fitting"), [
    ({"STAGES": 4, "K": 1}, {"STAGES": 2, "K": 1}),
    ({"STAGES": 1, "num_stages": 3}, {"STAGES": 1, "num_stages": 3}),
    ({"num_stages": 3}, {"num_stages": 2}),
    ({}, {"num_stages": 2}),
])  # fmt: skip
def test_as_many_stages_are_taken_as_fit(constants, fitting):
    compiled, found = launch.launch_first(Large(50), (1,), ("x",), constants)
    assert found == fitting and compiled == (("x",), fitting.get("STAGES", fitting.get("num_stages")))


def test_errors_that_are_kept_hold_no_frames():
    kept = OutOfResources(200, 100, "shared memory")

    class Keeps:
        def __getitem__(self, grid):
            return lambda num_stages=3: self.run(num_stages)

        def run(self, stages):
            if stages > 1:
                raise kept

    launch.launch_first(Keeps(), (1,), (), {})
    assert kept.__traceback__ is None


@pytest.mark.parametrize(("memory", "size", "dtype", "serves"), [
    (99, 256, torch.bfloat16, False), (99, 128, torch.float16, True), (99, 128, torch.float32, False),
    (227, 256, torch.float16, True), (227, 128, torch.float16, True), (227, 256, torch.float32, False),
    (227, 128, torch.float32, True),
])  # fmt: skip
def test_auto_takes_what_fits_into_the_gpu(monkeypatch, memory, size, dtype, serves):
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": memory * 1024})
    monkeypatch.setattr(device, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (dispatch, scalar_config):
        monkeypatch.setattr(module, "is_roomy", device.is_roomy.__wrapped__)
    v = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 1, size), device=torch.device("cuda", 0))
    assert dispatch._checked(SimpleNamespace(k=v, v=v)) == serves
    if dtype == torch.float16 and size == 128:  # whose states are fp32
        assert scalar_config.scalar_config(v, v, gated=False).chunk == (64 if memory < 160 else 128)


@pytest.mark.parametrize("blocks", range(1, 5))
def test_the_gradient_of_gates_fetches_64_kibibytes_ahead_at_most(monkeypatch, blocks):
    launched = {}
    monkeypatch.setattr(gates, "launch", lambda kernel, grid, *args, **constants: launched.update(constants))
    partial = torch.empty(blocks, 1, 100, 4, device="meta")
    cut = Segments(1, 100).tiles(64, torch.device("cpu"))
    gates.gate_grads(cut, partial[0], partial, partial, partial[:, :, 0])
    assert (3 * blocks + 1) * launched["C"] * launched["BH"] * 4 <= 2**16
    assert launched["STAGES"] > 1


class Loaded:
    """A kernel compiled with so many stages of some memory, which the GPU is asked for."""

    def __init__(self, memory: int, stages: int):
        self.memory, self.stages = memory, stages

    @property
    def run(self) -> None:
        if self.memory * self.stages > 100:
            raise OutOfResources(self.memory * self.stages, 100, "shared memory")


@pytest.mark.parametrize(("memory", "lacks"), [(30, None), (50, None), (101, "Required: 101, Hardware limit: 100")])
def test_the_gpu_is_asked_for_memory_before_kernels_are_launched(monkeypatch, memory, lacks):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    class Kernel:
        @staticmethod
        def warmup(*args, grid, STAGES):
            return Loaded(memory, STAGES)

    found = launch.compile_ahead(lambda: launch.launch(Kernel, (1,), STAGES=3))
    assert (lacks is None and found is None) or lacks in str(found)


def test_what_fits_into_no_memory_is_left_to_the_reference_with_one_warning(monkeypatch):
    x = SimpleNamespace(
        k=torch.zeros(1, 4, 2, 32), v=torch.zeros(1, 4, 2, 32), causal=True, decay_class=0, tensors={},
        segments=SimpleNamespace(cu_seqlens=None),
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "_ready", {})
    monkeypatch.setattr(dispatch, "compile_ahead", lambda work: OutOfResources(101, 100, "shared memory"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.warns(UserWarning, match="K = 32, V = 32 in torch.float32: .* Required: 101"):
        first = dispatch._make_ready(None, x, False)
    with warnings.catch_warnings(action="error"):
        assert dispatch._make_ready(None, x, False) == first
    assert "Required: 101" in first


@pytest.mark.parametrize("kernel", [Large(101), Large(50, "threads")])
def test_what_does_not_fit_at_all_says_what_it_needs(kernel):
    with pytest.raises(OutOfResources, match="Hardware limit: 100"):
        launch.launch_first(kernel, (1,), (), {"STAGES": 3})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """How KERNEL is launched from here on, as if on a Hopper GPU: "first" or "again", and whether it overlaps."""
    seen: list[tuple[str, bool]] = []
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def first(*args, K, launch_pdl=False):
        seen.append(("first", launch_pdl))
        run = lambda *_: seen.append(("again", launch_pdl))  # noqa: E731
        return SimpleNamespace(function=None, packed_metadata=None, run=run)

    monkeypatch.setattr(Kernel, "first", staticmethod(first), raising=False)
    return seen


class Kernel:
    arg_names = ("x", "K")

    def __getitem__(self, grid):
        return self.first


KERNEL = Kernel()


def test_a_kernel_that_may_overlap_is_another_one_than_the_same_that_may_not(ran: list[tuple[str, bool]]):
    """Even if all else is the same, as for the parts of a walk over heads."""
    for pdl in (True, False, False, True):
        launch.launch(KERNEL, (1,), 16, K=1, pdl=pdl)
    assert ran == [("first", True), ("first", False), ("again", False), ("again", True)]


def test_a_kernel_is_compiled_for_each_kind_of_argument_once(ran: list[tuple[str, bool]]):
    """Those that Triton tells apart: what code has been made for one would be wrong for another."""
    line = torch.zeros(64)
    kinds = [
        (1,), (2, 3, 1023), (16, 32), (2**31 + 1, 2**40 + 3), (2**31, 2**40), (True, False), (1.0, 2.0), (None,),
        (line, line[4:]), (line[1:], line[2:]), (line.half(),), (line.half()[1:],),
    ]  # fmt: skip
    for kind in kinds:
        for arg in kind:
            launch.launch(KERNEL, (1,), arg, K=1)
    assert [how for how, _ in ran] == [how for kind in kinds for how in ("first", *("again",) * (len(kind) - 1))]
    launch.launch(KERNEL, (1,), 1, K=2)
    assert ran[-1] == ("first", False)
