"""Summaries of tiles scan what their decays leave something of, and that is enough."""

import pytest
import torch

from lasp.kernels.pending import Pending
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.parallel.inputs import error, inputs_of

tiles = pytest.importorskip("lasp.kernels.triton.shared.tiles")
delta = pytest.importorskip("lasp.kernels.triton.delta.op")
diagonal = pytest.importorskip("lasp.kernels.triton.diagonal.op")
scalar = pytest.importorskip("lasp.kernels.triton.scalar.op")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {
    "constant": scalar.TritonLinear(),
    "scalar": scalar.TritonLinear(),
    "diagonal": diagonal.TritonDiagonal(),
    "gated delta": delta.TritonDelta(),
}
TOKENS, HEADS, SIZE = 450, 2, 16

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


@pytest.fixture(autouse=True)
def one_tile_a_document(monkeypatch):
    for module in (tiles, delta):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)


def draw(gen, kind, decay, length=1.0, offsets=None):
    """Log decays near `decay`; keys of this length."""
    shape = {"constant": (HEADS,), "diagonal": (1, TOKENS, HEADS, SIZE)}.get(kind, (1, TOKENS, HEADS))
    rows = 1, TOKENS, HEADS
    q, k, v, do = (torch.randn(*rows, SIZE, generator=gen) for _ in range(4))
    k = length * torch.nn.functional.normalize(k, dim=-1)
    gates = decay * (0.9 + 0.2 * torch.rand(shape, generator=gen))
    beta = torch.rand(rows, generator=gen) if kind == "gated delta" else None
    moved = [None if x is None else x.to(DEVICE) for x in (q, k, v, gates, beta, do)]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    return inputs_of(*moved[:5], 1.0, Segments(1, TOKENS, cu_seqlens)), moved[5]


def summaries(op, x, do):
    """S and A of every document, and D."""
    summary, partial = op.summarize(x, True)
    _, _, kept = op.finish(x, partial, Pending(lambda: None))
    d_state, _ = op.summarize_grad(x, kept, do, True)
    return summary.state, summary.transition, d_state


def definition(x, do):
    """The same, token by token in float64: what leaves documents that nothing enters, and the gradient of what does."""
    known = {name: None if y is None else y.double() for name, y in x.tensors.items()}
    zero = torch.zeros(x.state_shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    o, state = recurrent(**known, scale=1.0, initial_state=zero, cu_seqlens=x.segments.cu_seqlens)
    (d_state,) = torch.autograd.grad(o, zero, do.double())
    return state.detach(), d_state


@pytest.mark.parametrize("offsets", [None, (0, 7, 7, 430, TOKENS)], ids=["one", "documents"])
@pytest.mark.parametrize("decay", [-0.1, -0.4, -5.0])
@pytest.mark.parametrize("kind", OPS)
def test_what_has_decayed_does_not_count(gen, kind, decay, offsets):
    x, do = draw(gen, kind, decay, offsets=offsets)
    state, _, d_state = summaries(OPS[kind], x, do)
    wanted, d_wanted = definition(x, do)
    assert error(state.double(), wanted) < 1e-6
    assert error(d_state.double(), d_wanted) < 1e-6


def test_keys_that_are_too_long_for_their_beta_reach_farther(gen):
    """Every eighth token doubles what came before in its direction, for which the decays hardly make up."""
    x, do = draw(gen, "gated delta", -0.085)
    x.k.copy_(3**0.5 * x.k[:, :1])
    x.beta.copy_(torch.arange(TOKENS, device=DEVICE)[:, None] % 8 == 0)
    state, _, d_state = summaries(OPS["gated delta"], x, do)
    wanted, d_wanted = definition(x, do)
    assert error(state.double(), wanted) < 2e-5
    assert error(d_state.double(), d_wanted) < 2e-5


@pytest.mark.parametrize("kind", OPS)
def test_what_has_decayed_is_not_read(gen, kind):
    """Else a number that is none would come through."""
    x, do = draw(gen, kind, -1.0)
    op, far = OPS[kind], TOKENS - 200
    x.v[:, :far] = torch.nan
    summary, _ = op.summarize(x, True)
    assert summary.state.isfinite().all()
    x.v.zero_()
    do[:, 200:] = torch.nan
    assert summaries(op, x, do)[2].isfinite().all()


@pytest.mark.parametrize("kind", OPS)
def test_transitions_are_those_of_whole_tiles_or_as_good_as_nothing(gen, kind):
    for decay in (-0.02, -0.2):
        x, do = draw(gen, kind, decay)
        transition = summaries(OPS[kind], x, do)[1]
        if kind == "gated delta":
            assert transition.abs().max() < (1.0 if decay == -0.02 else 2e-12)
        else:
            total = x.decay.double().sum(1) if kind != "constant" else x.decay.double() * TOKENS
            assert error(transition.double(), total.expand(transition.shape)) < 1e-6


@pytest.mark.parametrize(
    ("ahead", "offsets"), [(False, None), (True, (0, 7, 7, 230, TOKENS))], ids=["one", "documents"]
)
@pytest.mark.parametrize("decay", [-0.02, -0.6, -0.7])
def test_states_pass_over_tiles_that_erase_them_or_do_not(gen, monkeypatch, decay, ahead, offsets):
    """Tiles of 64 tokens: of 8 of a head, none, some, or all erase what enters them."""
    monkeypatch.setattr(delta, "SHORTEST_TILE", 64)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 128)
    x, do = draw(gen, "gated delta", decay, offsets=offsets)
    if decay == -0.6:
        x.decay[:, :200] *= 0.1
    came, d_came = (torch.randn(x.state_shape, generator=gen).to(DEVICE) for _ in range(2))
    _, partial = OPS["gated delta"].summarize(x, ahead)
    o, state, kept = OPS["gated delta"].finish(x, partial, Pending(lambda: came))
    _, partial = OPS["gated delta"].summarize_grad(x, kept, do, ahead)
    grads = OPS["gated delta"].finish_grad(x, kept, partial, Pending(lambda: d_came))
    known = {name: y.double().requires_grad_() for name, y in x.tensors.items()}
    start = came.double().requires_grad_()
    wanted, wanted_state = recurrent(**known, scale=1.0, initial_state=start, cu_seqlens=x.segments.cu_seqlens)
    d_wanted = torch.autograd.grad((wanted, wanted_state), (*known.values(), start), (do.double(), d_came.double()))
    found = (o, state.wait(), *(grads.of[name] for name in known), grads.incoming.wait())
    for one, other in zip(found, (wanted, wanted_state, *d_wanted), strict=True):
        assert error(one.double(), other) < 1e-5
