"""Gates that are shut, or nearly so, against the token-by-token form in float64: values and every gradient."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lasp.kernels import delta_rule, linear_attention
from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels.boundary import Asked
from tests.parallel.inputs import error, inputs_of

F32, F64 = torch.float32, torch.float64
HEADS, K, V, TOKENS, OFFSETS = 2, 32, 16, 92, (0, 3, 3, 7, 92)
TRITON = find_spec("triton") is not None
DEVICE = "cuda" if TRITON and torch.cuda.is_available() else "cpu"
SHUT = -104.0  # in fp32
CLASSES = [(shape, delta) for shape in ("scalar", "diagonal") for delta in (False, True)]
NAMES = [f"{shape}{' delta' if delta else ''}" for shape, delta in CLASSES]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of scores that are masked


def gates(gen: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """[1, T, H, ...]: of one head all are shut, of the other some: at the borders of the last document's chunks, first,
    last, side by side, at random places. The others are mild, but many are nearly shut, with mild ones after them."""
    g = -0.05 * torch.rand(shape, generator=gen)
    shut = torch.rand(shape, generator=gen) < 0.03
    shut[:, [0, 3, 7, *(OFFSETS[-2] + i for i in (15, 16, 31, 32, 33, 63, 64)), TOKENS - 2, TOKENS - 1]] = True
    g[:, 42:60] = -100.0
    shut &= torch.rand((1, *shape[1:]), generator=gen) < 0.7
    shut[:, :, 1] = True
    values = torch.tensor([-torch.inf, -1e9, -1e4])[torch.randint(3, shape, generator=gen)]
    return g.where(~shut, values)


def draw(gen, shape: str, delta: bool, dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs, and the gradients of what comes out."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=F64)

    k = normal(1, TOKENS, 1, K)
    rows = 1, TOKENS, HEADS
    tensors = {
        "q": normal(1, TOKENS, 1, K),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": normal(*rows, V),
        "decay": gates(gen, (*rows, K) if shape == "diagonal" else rows),
        "initial_state": normal(len(OFFSETS) - 1, HEADS, K, V),
    }
    if delta:
        tensors["beta"] = torch.rand(rows, generator=gen, dtype=F64)
    upstream = [normal(*rows, V), normal(len(OFFSETS) - 1, HEADS, K, V)]
    return {n: x.to(DEVICE, dtype) for n, x in tensors.items()}, [x.to(DEVICE, dtype) for x in upstream]


def results(call, tensors: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items() if x.ndim > 1}
    found = call(**(tensors | leaves), cu_seqlens=torch.tensor(OFFSETS, device=DEVICE))
    grads = torch.autograd.grad(found, list(leaves.values()), upstream)
    return dict(zip(["o", "final_state", *leaves], [*(x.detach() for x in found), *grads], strict=True))


def by(backend: str, boundary=Alone):
    def call(q, k, v, decay, initial_state, cu_seqlens, beta=None):
        x = inputs_of(q, k, v, decay, beta, K**-0.5, Segments(*v.shape[:2], cu_seqlens))
        return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend=backend)

    return call


def check(call, tensors: dict[str, Tensor], upstream: list[Tensor], tolerance: float) -> None:
    got = results(call, tensors, upstream)
    wanted = results(recurrent, {n: x.double() for n, x in tensors.items()}, [x.double() for x in upstream])
    found = {name: error(got[name].double(), wanted[name]) for name in wanted}
    assert max(found.values()) < tolerance, found
    if "decay" in got:
        assert bool((got["decay"][tensors["decay"] <= SHUT] == 0).all())


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(("shape", "delta"), CLASSES, ids=NAMES)
def test_the_reference(gen, shape, delta, dtype):
    check(by("reference"), *draw(gen, shape, delta, dtype), 1e-10 if dtype == F64 else 2e-6)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("shape", "delta", "boundary"), [*((*c, Asked) for c in CLASSES), *(("scalar", d, Alone) for d in (False, True))]
)
def test_the_kernels(gen, monkeypatch, shape, delta, boundary):
    from lasp.kernels.triton.delta import op as delta_kernels
    from lasp.kernels.triton.shared import tiles

    monkeypatch.setattr(tiles, "LONGEST_TILE", 64)
    monkeypatch.setattr(delta_kernels, "SHORTEST_TILE", 64)
    monkeypatch.setattr(delta_kernels, "multiprocessors", lambda device: 64)
    check(by("triton", boundary), *draw(gen, shape, delta, F32), 5e-6)


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if TRITON else [])])
@pytest.mark.parametrize("delta", [False, True], ids=["", "delta"])
def test_a_constant_decay(gen, backend, delta):
    """One head forgets everything at once, the other little."""
    tensors, upstream = draw(gen, "scalar", delta, F32)
    tensors["decay"] = torch.tensor([-torch.inf, -1e-3], device=DEVICE)
    check(by(backend), tensors, upstream, 5e-6)


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if TRITON else [])])
@pytest.mark.parametrize(("shape", "delta"), CLASSES, ids=NAMES)
def test_a_token_of_its_own_and_the_same_in_a_sequence_agree(gen, backend, shape, delta):
    """Prefill and decoding."""
    tensors, _ = draw(gen, shape, delta, F32)
    state = tensors.pop("initial_state")[:1]
    op = delta_rule if delta else linear_attention
    options = {"output_final_state": True, "backend": backend}
    tensors["decay"][:, 20:22, 0] = -torch.inf
    tensors["q"] += 3 * tensors["k"]  # where q·k all but vanishes, so do digits: a shut gate leaves nothing beside it
    whole, _ = op(**{n: x[:, :23] for n, x in tensors.items()}, initial_state=state, **options)
    _, state = op(**{n: x[:, :20] for n, x in tensors.items()}, initial_state=state, **options)
    for t in (20, 21, 22):
        o, state = op(**{n: x[:, t : t + 1] for n, x in tensors.items()}, initial_state=state, **options)
        assert error(o, whole[:, t : t + 1]) < 5e-6
