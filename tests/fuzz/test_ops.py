"""Every public op, on arguments that fit or of which one does not: the definition's numbers, or ValueError."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lasp.kernels import (
    causal_conv1d,
    delta_product,
    delta_rule,
    linear_attention,
    log_linear_attention,
    log_linear_delta_rule,
    short_conv,
    softmax_attention,
)
from lasp.kernels.parts import Part, Parts
from tests.fuzz.arguments import (
    BOUNDS,
    Arguments,
    Break,
    boundaries,
    breaks_of,
    changed,
    check,
    drawn,
    longer,
    sequences,
    spoilt,
)


def recurrence(
    draw: st.DrawFn, gen: torch.Generator, *, delta: bool, longest: int = 70
) -> tuple[Arguments, list[Break]]:
    dtype = draw(st.sampled_from(list(BOUNDS)))
    wide = torch.promote_types(dtype, torch.float32)
    tokens, q_heads, group = draw(st.integers(1, longest)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    key_dim, value_dim, heads = draw(st.integers(1, 5)), draw(st.integers(1, 5)), q_heads * group
    batch, cu_seqlens = boundaries(draw, tokens)
    count = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    q, k = (normal(batch, tokens, q_heads, key_dim).to(dtype) for _ in range(2))
    arguments: Arguments = {"q": q, "k": torch.nn.functional.normalize(k.double(), dim=-1).to(dtype)}
    arguments["v"] = normal(batch, tokens, heads, value_dim).to(dtype)
    if delta:
        arguments["beta"] = torch.rand(batch, tokens, heads, generator=gen).to(wide)
    kinds = {"none": None, "scalar": (batch, tokens, heads), "diagonal": (batch, tokens, heads, key_dim)}
    shape = (kinds if delta else kinds | {"constant": (heads,)})[
        draw(st.sampled_from(["none", "scalar", "diagonal"] if delta else ["none", "constant", "scalar", "diagonal"]))
    ]
    steep = draw(st.sampled_from([0.1, 3.0, 60.0]))
    arguments["decay"] = None if shape is None else -steep * torch.rand(shape, generator=gen).to(wide)
    arguments["scale"] = draw(st.sampled_from([None, 0.5, -1.0]))
    state = normal(count, heads, key_dim, value_dim).to(wide)
    arguments["initial_state"] = state if draw(st.booleans()) else None
    arguments["output_final_state"] = draw(st.booleans())
    arguments["cu_seqlens"] = cu_seqlens
    if not delta:
        arguments["causal"] = arguments["decay"] is not None or draw(st.booleans())
    breaks = breaks_of(
        arguments,
        {"q": (0, 1, 3), "k": (0, 1, 2, 3), "v": (0, 1), "decay": (0, -1), "initial_state": (0, 1, 2, 3)}
        | ({"beta": (0, 1, 2)} if delta else {}),
    )
    other = torch.float32 if dtype == torch.float64 else torch.float64
    breaks += [changed(name, lambda x: x.to(other)) for name in ("q", "k", "v")]
    breaks.append(lambda a: a.update(backend="fast"))
    if q_heads > 1:
        breaks.append(changed("v", longer(2)))
    if arguments["decay"] is not None:
        breaks += [changed("decay", spoilt(number)) for number in (0.5, math.nan, math.inf)]
        if not delta:
            breaks.append(lambda a: a.update(causal=False))
        if arguments["decay"].ndim == 1:
            breaks.append(changed("decay", lambda x: x.clone().requires_grad_()))
    if arguments["initial_state"] is not None:
        breaks.append(changed("initial_state", lambda x: x.to(torch.float16)))
    return arguments, breaks


def define_recurrence(q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens, beta=None, causal=True):
    """Token by token, as the docstrings have it."""
    batch, tokens, heads, value_dim = v.shape
    group, key_dim = heads // q.shape[2], q.shape[3]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    scale = key_dim**-0.5 if scale is None else scale
    o, finals = torch.zeros_like(v), []
    for n, (row, begin, end) in enumerate(sequences(batch, cu_seqlens, tokens)):
        state = v.new_zeros(heads, key_dim, value_dim) if initial_state is None else initial_state[n]
        for t in range(begin, end):
            if decay is not None:
                g = decay if decay.ndim == 1 else decay[row, t]
                state = g.exp().view(heads, -1, 1) * state
            here_k, here_v = k[row, t], v[row, t]
            if beta is not None:
                here_v = beta[row, t, :, None] * (here_v - torch.einsum("hk,hkv->hv", here_k, state))
            state = state + here_k[..., None] * here_v[:, None]
            if causal:
                read = scale * torch.einsum("hk,hkv->hv", q[row, t], state)
                o = o.index_put((torch.tensor(row), torch.tensor(t)), read)
        if not causal:
            read = scale * torch.einsum("thk,hkv->thv", q[row, begin:end], state)
            o = o.index_put((torch.tensor(row), torch.arange(begin, end)), read)
        finals.append(state)
    return [o, torch.stack(finals)] if output_final_state else [o]


@given(drawn(lambda draw, gen: recurrence(draw, gen, delta=False)))
def test_linear_attention(case):
    check(linear_attention, define_recurrence, case, ("v", "q", "k", "initial_state"))


@given(drawn(lambda draw, gen: recurrence(draw, gen, delta=True)))
def test_delta_rule(case):
    check(delta_rule, define_recurrence, case, ("v", "q", "k", "beta", "initial_state"))


@given(st.integers(1, 3), drawn(lambda draw, gen: recurrence(draw, gen, delta=True)))
def test_equal_steps_are_the_delta_rule_on_repeated_tokens(steps, case):
    """Of arguments that fit or do not, all steps the same."""

    def repeated(op):
        def call(k, v, beta, **others):
            k, v, beta = (
                torch.stack([x] * steps, 2) if isinstance(x, Tensor) and x.ndim > 2 else x for x in (k, v, beta)
            )
            return op(k=k, v=v, beta=beta, **others)

        return call

    def define(q, k, v, beta, decay, cu_seqlens, **others):
        q, k, v, beta, decay = (
            None if x is None else x.repeat_interleave(steps, dim=1)
            for x in (q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], decay)
        )
        if decay is not None:
            first = (torch.arange(decay.shape[1]) % steps == 0).view(-1, *(1,) * (decay.ndim - 2))
            decay = decay.where(first, 0.0)
        offsets = None if cu_seqlens is None else cu_seqlens * steps
        o, *final = define_recurrence(q, k, v, decay, beta=beta, cu_seqlens=offsets, **others)
        return [o[:, steps - 1 :: steps], *final]

    check(repeated(delta_product), repeated(define), case, ("v", "q", "k", "beta", "initial_state"))


def log_linear(draw: st.DrawFn, gen: torch.Generator, *, delta: bool) -> tuple[Arguments, list[Break]]:
    arguments, _ = recurrence(draw, gen, delta=delta, longest=20)
    batch, tokens, heads, _ = arguments["v"].shape
    wide = torch.promote_types(arguments["v"].dtype, torch.float32)
    needed = (tokens - 1).bit_length() + 1
    levels = needed + draw(st.integers(0, 2))
    arguments["decay"] = -0.2 * torch.rand(batch, tokens, heads, generator=gen).to(wide)
    arguments["level_scales"] = torch.rand(batch, tokens, heads, levels, generator=gen).to(wide)
    for name in ("initial_state", "output_final_state", "causal"):
        arguments.pop(name, None)
    breaks = breaks_of(
        arguments,
        {"q": (0, 1, 3), "k": (0, 1, 2, 3), "v": (0, 1), "level_scales": (0, 1, 2)}
        | ({"beta": (0, 1)} if delta else {}),
    )
    breaks += [changed("decay", spoilt(number)) for number in (0.5, math.nan)]
    if not delta:
        breaks.append(changed("decay", lambda _: None))
    if arguments["cu_seqlens"] is None:
        breaks.append(changed("level_scales", lambda x: x[..., : needed - 1]))
    return arguments, breaks


def define_log_linear(q, k, v, decay, level_scales, scale, cu_seqlens, beta=None):
    """As a sum over pairs of tokens, through the matrix that each token's step multiplies the state by."""
    batch, tokens, heads, _ = v.shape
    group, key_dim = heads // q.shape[2], q.shape[3]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    scale = key_dim**-0.5 if scale is None else scale
    o = torch.zeros_like(v)
    eye = torch.eye(key_dim, dtype=v.dtype)
    for row, begin, end in sequences(batch, cu_seqlens, tokens):
        for t in range(begin, end):
            reading = q[row, t]  # [H, K], carried back from token to token
            total = torch.zeros_like(v[row, t])
            for s in range(t, begin - 1, -1):
                written = k[row, s] if beta is None else beta[row, s, :, None] * k[row, s]
                level = 0 if s == t else ((t - begin) ^ (s - begin)).bit_length()
                weight = (reading * written).sum(-1) * level_scales[row, t, :, level]
                total = total + weight[:, None] * v[row, s]
                step = decay[row, s].exp()[:, None, None] * eye
                if beta is not None:
                    kk = k[row, s][:, :, None] * k[row, s][:, None, :]
                    step = step @ (eye - beta[row, s, :, None, None] * kk)
                reading = torch.einsum("hk,hkj->hj", reading, step)
            o = o.index_put((torch.tensor(row), torch.tensor(t)), scale * total)
    return [o]


def first(op: Callable) -> Callable:
    return lambda **arguments: op(**arguments)[:1]


@given(drawn(lambda draw, gen: log_linear(draw, gen, delta=False)))
def test_log_linear_attention(case):
    check(first(log_linear_attention), define_log_linear, case, ("v", "q", "k", "level_scales"))


@given(drawn(lambda draw, gen: log_linear(draw, gen, delta=True)))
def test_log_linear_delta_rule(case):
    check(first(log_linear_delta_rule), define_log_linear, case, ("v", "q", "k", "beta", "level_scales"))


@given(st.data(), st.integers(2, 70), st.booleans())
def test_log_linear_states_go_on_anywhere(data, tokens, delta):
    """Cut in parts, each of which goes on with the state that the one before has left."""
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(1, tokens - 1), max_size=3))})
    op = log_linear_delta_rule if delta else log_linear_attention
    levels = (tokens - 1).bit_length() + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, tokens, *shape, generator=gen, dtype=torch.float64)

    given = {"q": normal(1, 3), "k": torch.nn.functional.normalize(normal(1, 3), dim=-1), "v": normal(2, 2)}
    given |= {"decay": -normal(2).abs(), "level_scales": normal(2, levels)} | (
        {"beta": normal(2).sigmoid()} if delta else {}
    )
    leaves = [x.requires_grad_() for x in given.values()]
    upstream, state, parts = normal(2, 2), None, []
    for start, stop in pairwise(cuts):
        part = {name: x[:, start:stop] for name, x in given.items()}
        o, state = op(**part, initial_state=state, output_final_state=True)
        parts.append(o)
    whole, final = op(**given, output_final_state=True)
    assert torch.equal(state.tokens, final.tokens)
    for x, y in ((torch.cat(parts, 1), whole), (state.slots, final.slots)):
        assert x.shape == y.shape
        assert (x - y).norm() <= 1e-10 * y.norm().clamp(min=1e-3)
    found, wanted = (torch.autograd.grad(o, leaves, upstream) for o in (torch.cat(parts, 1), whole))
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-10 * y.norm().clamp(min=1e-3)


def attention(draw: st.DrawFn, gen: torch.Generator) -> tuple[Arguments, list[Break]]:
    dtype = draw(st.sampled_from(list(BOUNDS)))
    tokens, kv_heads, group = draw(st.integers(1, 40)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    key_dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    batch, cu_seqlens = boundaries(draw, tokens)
    keys = tokens if cu_seqlens is not None else tokens + draw(st.integers(0, 9))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    arguments: Arguments = {
        "q": normal(batch, tokens, kv_heads * group, key_dim),
        "k": normal(batch, keys, kv_heads, key_dim),
        "v": normal(batch, keys, kv_heads, value_dim),
        "scale": draw(st.sampled_from([None, 0.5])),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 50)),
        "cu_seqlens": cu_seqlens,
    }
    breaks = breaks_of(arguments, {"q": (0, 3), "k": (0, 1, 3), "v": (0, 1)})
    breaks += [changed("window", lambda _, x=x: x) for x in (0, -1, 1.5, "one", True)]
    breaks.append(changed("scale", lambda _: -1.0))
    breaks.append(lambda a: a.update(backend="triton"))
    if group > 1 or kv_heads > 1:
        breaks.append(changed("k", longer(2)))
    return arguments, breaks


def define_attention(q, k, v, scale, causal, window, cu_seqlens):
    """With the whole matrix of scores."""
    _, tokens, heads, key_dim = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scale, keys = key_dim**-0.5 if scale is None else scale, k.shape[1]
    i, j = torch.arange(tokens)[:, None] + keys - tokens, torch.arange(keys)[None, :]
    seen = torch.ones(tokens, keys, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (i - j).abs() < window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.long(), torch.arange(tokens), right=True)
        seen &= document[:, None] == document[None, :]
    scores = (scale * torch.einsum("bihk,bjhk->bhij", q, k)).masked_fill(~seen, -math.inf)
    return [torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)]


@given(drawn(attention))
def test_softmax_attention(case):
    check(softmax_attention, define_attention, case, ("q", "k", "v"))


def convolution(draw: st.DrawFn, gen: torch.Generator) -> tuple[Arguments, list[Break]]:
    dtype = draw(st.sampled_from(list(BOUNDS)))
    tokens, channels, width = draw(st.integers(1, 30)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    batch, cu_seqlens = boundaries(draw, tokens)
    count = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    arguments: Arguments = {
        "x": normal(batch, tokens, channels),
        "weight": normal(channels, width),
        "bias": normal(channels) if draw(st.booleans()) else None,
        "initial_tail": normal(count, width - 1, channels) if draw(st.booleans()) else None,
        "cu_seqlens": cu_seqlens,
    }
    tensors = {"x": (2,), "weight": (0,), "bias": (0,), "initial_tail": (0, 1, 2)}
    return arguments, breaks_of(arguments, tensors)


def define_convolution(x, weight, bias, initial_tail, cu_seqlens):
    batch, tokens, channels = x.shape
    width, y = weight.shape[1], torch.zeros_like(x)
    for n, (row, begin, end) in enumerate(sequences(batch, cu_seqlens, tokens)):
        tail = x.new_zeros(width - 1, channels) if initial_tail is None else initial_tail[n]
        padded = torch.cat([tail, x[row, begin:end]])
        for t in range(end - begin):
            value = (padded[t : t + width] * weight.mT).sum(0)
            value = value if bias is None else value + bias
            y = y.index_put((torch.tensor(row), torch.tensor(begin + t)), value)
    return [y]


@given(drawn(convolution))
def test_causal_conv1d(case):
    check(lambda **a: [causal_conv1d(**a)], define_convolution, case, ("x", "weight", "bias", "initial_tail"))


@given(drawn(convolution), st.booleans())
def test_short_conv(case, unit_length):
    """Its channels as two parts of one head, if there are two."""
    arguments, _ = case
    channels = arguments["weight"].shape[0] if isinstance(arguments["weight"], Tensor) else 2
    sizes = (channels - channels // 2, channels // 2) if channels > 1 else (channels,)
    unit_length &= channels > 2  # of a single number nothing but its sign is left
    parts = Parts(1, tuple(Part(size, unit_length and place == 0) for place, size in enumerate(sizes)))

    def definition(**given: Any) -> list[Tensor]:
        (z,) = define_convolution(**given)
        pieces = torch.nn.functional.silu(z).split(sizes, dim=-1)
        units = (
            [x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in pieces[:1]] if unit_length else pieces[:1]
        )
        return [x[:, :, None] for x in (*units, *pieces[1:])]

    check(lambda **a: short_conv(parts=parts, **a), definition, case, ("x", "weight", "bias", "initial_tail"))
