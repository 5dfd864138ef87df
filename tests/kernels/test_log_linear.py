"""Log-linear attention on one device: the chunk form and the token-by-token form against the dense definition."""

import pytest
import torch

from lasp.kernels import log_linear_attention, log_linear_delta_rule
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from tests.kernels.log_linear import F64, Drawn, dense, draw, inputs, results
from tests.parallel.inputs import error

FAMILIES = pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])


def call(q, k, v, decay, level_scales, beta=None, **options):
    if beta is not None:
        return log_linear_delta_rule(q, k, v, beta, decay, level_scales, **options)
    return log_linear_attention(q, k, v, decay, level_scales, **options)


def errors(gen, drawn: Drawn, definition, *, final: bool, **options) -> dict[str, float]:
    upstream: dict = {}
    wanted = results(gen, definition, drawn, upstream, final=final, **options)
    asked = {"output_final_state": True} if final else {}
    got = results(gen, call, drawn, upstream, final=final, **asked, **options)
    return {name: error(got[name], wanted[name]) for name in wanted}


def test_forms_equal_the_dense_definition(gen):
    for tokens, delta in ((1, False), (2, True), (37, False), (64, True), (128, False), (130, True), (300, False)):
        drawn = draw(gen, tokens, delta=delta, batch=2 if tokens < 100 else 1)
        found = errors(gen, drawn, dense, final=False)
        assert max(found.values()) < 1e-10, (tokens, delta, found)
        upstream: dict = {}
        recurrent = results(gen, log_linear_recurrent, drawn, upstream, final=False)
        wanted = results(gen, dense, drawn, upstream, final=False)
        assert max(error(recurrent[name], wanted[name]) for name in wanted) < 1e-10


@FAMILIES
def test_packed_documents(gen, delta):
    offsets = [0, 1, 1, 70, 134, 163, 300]
    drawn = draw(gen, 300, delta=delta, offsets=offsets, levels=9)
    found = errors(gen, drawn, dense, final=False, scale=0.7)
    assert max(found.values()) < 1e-10, found


@FAMILIES
def test_initial_and_final_states(gen, delta):
    """From any number of tokens on, also within a chunk, and documents of which nothing comes."""
    cases = [
        (70, 2, None, [0, 5]),
        (3, 1, None, [61]),
        (64, 1, None, [64]),
        (90, 1, [0, 1, 1, 70, 90], [7, 12, 130, 64]),
    ]
    for tokens, batch, offsets, seen in cases:
        drawn = draw(gen, tokens, delta=delta, batch=batch, offsets=offsets, seen=seen)
        found = errors(gen, drawn, log_linear_recurrent, final=True)
        assert max(found.values()) < 1e-10, (tokens, seen, found)


@FAMILIES
def test_final_state_continues_the_sequence(gen, delta):
    drawn = draw(gen, 150, delta=delta)
    whole, final = call(**drawn.tensors, output_final_state=True)
    state, parts = None, []
    for rows in (slice(0, 33), slice(33, 34), slice(34, 35), slice(35, 150)):
        part, state = call(
            **{name: x[:, rows] for name, x in drawn.tensors.items()}, initial_state=state, output_final_state=True
        )
        parts.append(part)
    assert error(torch.cat(parts, 1), whole) < 1e-10
    assert error(state.slots, final.slots) < 1e-10
    assert state.tokens.tolist() == final.tokens.tolist() == [150]


def test_no_more_slots_than_bits(gen):
    drawn = draw(gen, 100)
    state = call(**drawn.tensors, output_final_state=True)[1]
    assert state.slots.shape[1] == 7
    zero = [bool((slot == 0).all()) for slot in state.slots[0]]
    assert zero == [True, True, False, True, True, False, False]  # 100 = 64 + 32 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FAMILIES
def test_lower_precision_loses_no_more_than_rounding_its_inputs(gen, dtype, delta):
    exact = {name: x.to(dtype).double() for name, x in draw(gen, 130, delta=delta).tensors.items()}
    o, state = call(**{name: x.to(dtype) for name, x in exact.items()}, output_final_state=True)
    wanted, wanted_state = log_linear_recurrent(**exact)
    assert o.dtype == dtype and state.slots.dtype == torch.float32
    assert error(o.double(), wanted) < 2 * torch.finfo(dtype).eps + 2e-6
    assert error(state.slots.double(), wanted_state.slots) < 2e-6


@FAMILIES
@pytest.mark.parametrize("decay", [0.0, -100.0, -torch.inf], ids=["open", "closing", "shut"])
def test_gates_that_do_nothing_or_close(gen, delta, decay):
    drawn = draw(gen, 90, delta=delta)
    drawn.tensors["decay"] = torch.where(torch.rand(1, 90, 2, generator=gen) < 0.3, decay, drawn.tensors["decay"])
    found = errors(gen, drawn, log_linear_recurrent, final=True)
    assert max(found.values()) < 1e-10, found


def refusals():
    drawn = draw(torch.Generator().manual_seed(0), 5, seen=[3]).tensors  # 8 tokens, 4 levels
    tokens = torch.tensor([3])

    def state(slots=2, dtype=F64, seen=tokens):
        return FenwickState(torch.zeros(1, slots, 2, 6, 4, dtype=dtype), seen)

    def attend(state=None, **changed):
        return lambda: log_linear_attention(**(drawn | changed), initial_state=state)

    yield "4 levels, expected at least 5 for 9 tokens.*address 8", attend(state(3, seen=tokens + 1))
    yield "3 levels, expected at least 4 for 5 tokens", attend(level_scales=drawn["level_scales"][..., :3])
    yield "0 levels", attend(level_scales=drawn["level_scales"][..., :0])
    yield "level_scales: got shape", attend(level_scales=drawn["level_scales"][:, :, :1])
    yield "level_scales: got shape", attend(level_scales=drawn["decay"])
    yield "level_scales: got None", attend(level_scales=None)
    yield "decay: got None", attend(decay=None)
    yield "decay: got a maximum of 0.5", attend(decay=drawn["decay"] * 0 + 0.5)
    yield "decay: got shape", attend(decay=drawn["k"])
    yield "beta: got shape", lambda: log_linear_delta_rule(**drawn, beta=drawn["k"])
    yield "beta: got None", lambda: log_linear_delta_rule(**drawn, beta=None)
    yield "initial_state: got a Tensor, expected a FenwickState", attend(torch.zeros(1))
    yield "initial_state.slots: got 1 slots, expected 2 for 3 tokens", attend(state(1))
    yield "initial_state.slots: got dtype torch.float32", attend(state(dtype=torch.float32))
    yield "initial_state.slots: got shape", attend(FenwickState(torch.zeros(1, 2, 2, 4, 6, dtype=F64), tokens))
    yield "initial_state.tokens: got shape", attend(state(seen=torch.tensor([3, 3])))
    yield "initial_state.tokens: got torch.int32", attend(state(seen=tokens.int()))
    yield "initial_state.tokens: got -3", attend(state(seen=-tokens))
    yield "backend", lambda: log_linear_attention(**drawn, backend="cuda")


@pytest.mark.parametrize(("message", "refused"), list(refusals()))
def test_bad_input_is_named(message, refused):
    with pytest.raises(ValueError, match=message):
        refused()


def test_what_is_cached_is_no_input(gen):
    x = inputs(draw(gen, 20, seen=[5]))
    names = list(x.tensors)
    assert x.tokens_after.tolist() == [25]
    assert list(x.tensors) == names
    assert x.cut({}, x.segments, (7,)).tokens_after.tolist() == [27]
