"""Log-linear attention token by token against all tokens at once."""

from itertools import accumulate, pairwise

import pytest
import torch

from lasp.kernels.fenwick import FenwickState
from lasp.kernels.log_linear_step import FenwickMemory, go_on
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from tests.kernels.log_linear import draw
from tests.kernels.test_triton_linear import DEVICE
from tests.parallel.inputs import error

SEEN = [5, 7, 64]  # rows of unequal length
FAMILIES = pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])


def run(tensors, memory, step, tokens):
    """Outputs of all tokens, one by one."""
    parts = []
    for t in range(tokens):
        parts.append(step(memory, {name: x[:, t : t + 1] for name, x in tensors.items()}))
    return torch.cat(parts, 1)


@FAMILIES
def test_steps_equal_the_whole(gen, delta):
    drawn = draw(gen, 70, delta=delta, batch=3, seen=SEEN)
    wanted, final = log_linear_recurrent(**drawn.tensors, initial_state=drawn.state)
    memory = FenwickMemory(drawn.state)
    given = drawn.state.slots.clone()
    o = run(drawn.tensors, memory, lambda memory, token: memory.step(**token), 70)
    assert error(o, wanted) < 1e-10 and error(memory.state.slots, final.slots) < 1e-10
    assert memory.tokens.tolist() == final.tokens.tolist()
    assert torch.equal(drawn.state.slots, given), "the state that it started from has changed"


def test_queries_are_rounded_no_more_than_they_came(gen):
    """Their product with a scale is a number of the state's dtype."""
    drawn = draw(gen, 4, batch=3, seen=SEEN)
    lower = {name: x.bfloat16() if name in ("q", "k", "v") else x.float() for name, x in drawn.tensors.items()}
    state = drawn.state._replace(slots=drawn.state.slots.float())
    exact = {name: x.double() for name, x in lower.items()}
    wanted, _ = log_linear_recurrent(**exact, scale=0.3, initial_state=state._replace(slots=state.slots.double()))
    o = run(lower, FenwickMemory(state), lambda memory, token: memory.step(**token, scale=0.3), 4)
    assert error(o, wanted) < 1.01 * error(wanted.bfloat16(), wanted)


def test_a_token_writes_one_slot_of_each_row(gen):
    drawn = draw(gen, 16, batch=3, seen=SEEN)
    memory = FenwickMemory(drawn.state)
    written = 0
    for t in range(16):
        memory._make_room(int(memory.tokens.max()) + 1)
        before, slots = memory.slots.clone(), memory.slots
        memory.step(**{name: x[:, t : t + 1] for name, x in drawn.tensors.items()})
        assert memory.slots is slots
        written += int((before != slots).any(dim=(2, 3, 4)).sum())
    assert written == 16 * 3


def test_no_more_slots_than_bits(gen):
    drawn = draw(gen, 9)
    memory = FenwickMemory(FenwickState(torch.zeros(1, 0, 2, 6, 4).double(), torch.tensor([0])))
    for t in range(9):
        memory.step(**{name: x[:, t : t + 1] for name, x in drawn.tensors.items()})
        assert memory.slots.shape[1] == (t + 1).bit_length()


def test_rows_are_selected(gen):
    drawn = draw(gen, 3, batch=3, seen=SEEN)
    chosen = torch.tensor([2, 0, 2])
    memory = FenwickMemory(drawn.state).select(chosen)
    o = run({n: x[chosen] for n, x in drawn.tensors.items()}, memory, lambda memory, token: memory.step(**token), 3)
    wanted, _ = log_linear_recurrent(**drawn.tensors, initial_state=drawn.state)
    assert error(o, wanted[chosen]) < 1e-10


@FAMILIES
def test_pieces_of_any_length_equal_the_whole(gen, delta):
    """Prompts, single tokens with and without gradient, rows of unequal length, and other rows in their places."""
    drawn = draw(gen, 40, delta=delta, batch=2)
    whole, final = log_linear_recurrent(**drawn.tensors)
    past, parts = None, []
    for start, stop in pairwise([0, 17, 18, 19, 30, 31, 40]):
        with torch.set_grad_enabled(start == 18):
            piece = {name: x[:, start:stop] for name, x in drawn.tensors.items()}
            part, past = go_on(past, **piece)
        parts.append(part)
    assert error(torch.cat(parts, 1), whole) < 1e-10
    assert error(past.slots, final.slots) < 1e-10

    lengths = [3, 0, 5]
    packed = {
        n: torch.cat([x[:1, :3], x[1:, :5]], 1) for n, x in draw(gen, 5, delta=delta, batch=2, levels=7).tensors.items()
    }
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    past = past.select(torch.tensor([0, 1, 1]))
    o, after = go_on(past, **packed, cu_seqlens=cu_seqlens)
    wanted, _ = log_linear_recurrent(**packed, initial_state=past, cu_seqlens=cu_seqlens)
    assert error(o, wanted) < 1e-10
    assert after.tokens.tolist() == [43, 40, 45]


@FAMILIES
def test_the_kernel_equals_the_whole(gen, delta, monkeypatch):
    kernel = pytest.importorskip("lasp.kernels.triton.log_linear.step")
    monkeypatch.setattr(kernel, "COLUMNS", 16)
    exact = draw(gen, 4, delta=delta, batch=3, seen=SEEN, heads=(1, 2), sizes=(24, 20))
    wanted, final = log_linear_recurrent(**exact.tensors, initial_state=exact.state, scale=0.3)
    drawn = exact.to(torch.float32, torch.float32, DEVICE)

    def step(memory, token):
        memory._make_room(int(memory.tokens.max()) + 1)
        token = {"decay": None, "beta": None} | token
        o, memory.since = kernel.step(**token, slots=memory.slots, since=memory.since, tokens=memory.tokens, scale=0.3)
        memory.tokens = memory.tokens + 1
        return o

    memory = FenwickMemory(drawn.state)
    o = run(drawn.tensors, memory, step, 4)
    assert error(o.double().cpu(), wanted) < 2e-6
    assert error(memory.state.slots.double().cpu(), final.slots) < 2e-6


def test_bad_input_is_named(gen):
    drawn = draw(gen, 2)
    empty = FenwickState(torch.zeros(1, 0, 2, 6, 4).double(), torch.tensor([0]))
    with pytest.raises(ValueError, match="v: got 2 tokens, expected 1"):
        FenwickMemory(empty).step(**drawn.tensors)
    token = {name: x[:, :1] for name, x in drawn.tensors.items()}
    with pytest.raises(ValueError, match="2 levels, expected at least 3 for 4 tokens"):
        FenwickMemory(FenwickState(torch.zeros(1, 2, 2, 6, 4).double(), torch.tensor([3]))).step(**token)
