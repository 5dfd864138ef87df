"""Every mixer against its paper's recurrence, token by token, written from the layer's parameters alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.config import MIXERS
from lasp.models import tiny
from lasp.models.mixers import make_mixer
from tests.models.helpers import decoder, sequence

H, K, V, T = 2, 8, 16, 11  # of the tiny preset
EPS = 0.01  # of the norms

Parameters = dict[str, Tensor]


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """q, k [T, H, K], v [T, H, V], decay [T, H, K], beta [T, H] or None (nothing is erased), scales [T, H, levels] or
    None (all levels weigh 1) -> [T, H, V]."""
    states, outputs = [], []  # a state of every token
    for t in range(T):
        states = [state * decay[t].exp()[..., None] for state in states]
        write = v[t]
        if beta is not None:
            erase = torch.einsum("hk,hl,h->hkl", k[t], k[t], beta[t])
            states = [state - erase @ state for state in states]
            write = beta[t, :, None] * v[t]
        states.append(torch.einsum("hk,hv->hkv", k[t], write))
        read = torch.zeros(H, k.shape[-1], V, dtype=torch.float64)
        for s, state in enumerate(states):
            read += state if scales is None else scales[t, :, (t ^ s).bit_length(), None, None] * state
        outputs.append(torch.einsum("hkv,hk->hv", read, q[t]))
    return torch.stack(outputs)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def _heads(x: Tensor, *sizes: int) -> list[Tensor]:
    return list(x.unflatten(-1, (H, -1)).split(sizes, dim=-1))


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[1]
    padded = torch.cat([torch.zeros(width - 1, x.shape[1], dtype=x.dtype), x])
    return torch.stack([(padded[t : t + width] * weight.mT).sum(0) for t in range(T)])


def _rotate(x: Tensor) -> Tensor:
    angles = torch.arange(T)[:, None, None] * 500_000.0 ** -(torch.arange(K // 2, dtype=torch.float64) / (K // 2))
    turned = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _finish(o: Tensor, p: Parameters, gate: Tensor | float = 1.0) -> Tensor:
    return (_norm(o, p["output.norm.weight"]).flatten(1) * gate) @ p["output.out_proj.weight"].mT


def _softplus_gate(x: Tensor, p: Parameters) -> Tensor:
    return (1 + (x + p["decay.dt_bias"]).exp()).log()


def linear(x: Tensor, p: Parameters) -> Tensor:
    q, k, v = _heads(x @ p["qkv_proj.weight"].mT, K, K, V)
    q, k = (y.exp().where(y < 0, 1 + y) for y in (q, k))
    return _finish(_recurrence(q * K**-0.5, k, v, torch.zeros_like(k)), p)


def lightning(x: Tensor, p: Parameters) -> Tensor:
    q, k, v = _heads(x @ p["qkv_proj.weight"].mT, K, K, V)
    decay = torch.tensor([-(2.0**-4), -(2.0**-8)]).double() * (1 - 1 / 4)  # layer 1 of 4
    o = _recurrence(F.silu(q) * K**-0.5, F.silu(k), v, decay[:, None].expand_as(k))
    return _finish(o, p, (x @ p["output.gate_proj.weight"].mT).sigmoid())


def retention(x: Tensor, p: Parameters) -> Tensor:
    q, k, v = _heads(x @ p["qkv_proj.weight"].mT, K, K, V)
    decay = torch.tensor([31 / 32, 63 / 64], dtype=torch.float64).log()
    o = _recurrence(_rotate(q) * K**-0.5, _rotate(k), v, decay[:, None].expand_as(k))
    return _finish(o, p, F.silu(x @ p["output.gate_proj.weight"].mT))


def gla(x: Tensor, p: Parameters) -> Tensor:
    q, k, v = _heads(x @ p["qkv_proj.weight"].mT, K, K, V)
    gate = x @ p["decay.proj.0.weight"].mT @ p["decay.proj.1.weight"].mT + p["decay.proj.1.bias"]
    decay = gate.sigmoid().log().unflatten(-1, (H, K)) / 16
    return _finish(_recurrence(q * K**-0.5, k, v, decay), p, F.silu(x @ p["output.gate_proj.weight"].mT))


def hgrn2(x: Tensor, p: Parameters) -> Tensor:
    q, forget, v = _heads(x @ p["qkv_proj.weight"].mT, K, K, V)
    o = _recurrence(F.silu(q) * K**-0.5, 1 - forget.sigmoid(), v, forget.sigmoid().log())
    return _finish(o, p)


def _scales(x: Tensor, p: Parameters) -> Tensor:
    return (1 + (x @ p["level_scales.proj.weight"].mT + p["level_scales.bias"]).exp()).log().unflatten(-1, (H, -1))


def mamba2(x: Tensor, p: Parameters, scales: Tensor | None = None) -> Tensor:
    xbc = F.silu(_conv(x @ p["xbc_proj.weight"].mT, p["conv.weight"]) + p["conv.bias"])
    inner, b, c = xbc.split([H * V, K, K], dim=-1)
    inner = inner.unflatten(-1, (H, V))
    dt = _softplus_gate(x @ p["decay.proj.weight"].mT, p)
    decay = (-p["decay.A_log"].exp() * dt)[..., None].expand(T, H, K)
    b, c = (y[:, None].expand(T, H, K) for y in (b, c))
    o = _recurrence(c, b, inner * dt[..., None], decay, scales=scales)
    o = (o + p["D"][:, None] * inner).flatten(1) * F.silu(x @ p["gate_proj.weight"].mT)
    return _norm(o, p["norm.weight"]) @ p["out_proj.weight"].mT


def log_linear_mamba2(x: Tensor, p: Parameters) -> Tensor:
    return mamba2(x, p, _scales(x, p))


def _delta(x: Tensor, p: Parameters, decay: Tensor, scales: Tensor | None = None) -> Tensor:
    q, k, v = _heads(F.silu(_conv(x @ p["qkv_proj.weight"].mT, p["conv.weight"])), K, K, V)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    return _recurrence(q * K**-0.5, k, v, decay, (x @ p["beta_proj.weight"].mT).sigmoid(), scales)


def delta_net(x: Tensor, p: Parameters) -> Tensor:
    o = _delta(x, p, torch.zeros(T, H, K, dtype=torch.float64))
    return _finish(o, p, F.silu(x @ p["output.gate_proj.weight"].mT))


def gated_delta_net(x: Tensor, p: Parameters, scales: Tensor | None = None) -> Tensor:
    decay = -p["decay.A_log"].exp() * _softplus_gate(x @ p["decay.proj.weight"].mT, p)
    o = _delta(x, p, decay[..., None].expand(T, H, K), scales)
    return _finish(o, p, F.silu(x @ p["output.gate_proj.weight"].mT))


def gated_delta_product(x: Tensor, p: Parameters) -> Tensor:
    """Two steps a token: between them nothing decays, and after the first nobody reads."""
    parts = _heads(F.silu(_conv(x @ p["qkv_proj.weight"].mT, p["conv.weight"])), K, K, K, V, V)
    q, *k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in parts[:3])
    beta = 2 * (x @ p["beta_proj.weight"].mT).sigmoid().unflatten(-1, (H, 2))
    gate = (-p["decay.A_log"].exp() * _softplus_gate(x @ p["decay.proj.weight"].mT, p)).exp()
    state, outputs = torch.zeros(H, K, V, dtype=torch.float64), []
    for t in range(T):
        state = state * gate[t, :, None, None]
        for j in range(2):
            write = beta[t, :, j, None] * (parts[3 + j][t] - torch.einsum("hk,hkv->hv", k[j][t], state))
            state = state + k[j][t][..., None] * write[:, None]
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t] * K**-0.5))
    return _finish(torch.stack(outputs), p, F.silu(x @ p["output.gate_proj.weight"].mT))


def log_linear_gated_delta_net(x: Tensor, p: Parameters) -> Tensor:
    return gated_delta_net(x, p, _scales(x, p))


def kda(x: Tensor, p: Parameters) -> Tensor:
    gate = _softplus_gate(x @ p["decay.proj.0.weight"].mT @ p["decay.proj.1.weight"].mT, p).unflatten(-1, (H, K))
    o = _delta(x, p, -p["decay.A_log"].exp()[:, None] * gate)
    return _finish(o, p, (x @ p["output.gate_proj.weight"].mT).sigmoid())


def _attention(x: Tensor, p: Parameters, window: int = T) -> Tensor:
    q, k, v = (x @ p["qkv_proj.weight"].mT).unflatten(-1, (H + 2, K)).split([H, 1, 1], dim=1)  # one head of k and v
    scores = torch.einsum("thk,sk->hts", _rotate(q), _rotate(k)[:, 0]) * K**-0.5
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    return torch.einsum("hts,sk->thk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[:, 0])


def softmax(x: Tensor, p: Parameters) -> Tensor:
    return _attention(x, p).flatten(1) @ p["out_proj.weight"].mT


DEFINITIONS = {
    definition.__name__: definition
    for definition in (
        linear,
        lightning,
        retention,
        mamba2,
        gla,
        hgrn2,
        delta_net,
        gated_delta_net,
        gated_delta_product,
        kda,
        log_linear_mamba2,
        log_linear_gated_delta_net,
        softmax,
    )
}


@pytest.mark.parametrize("name", [*MIXERS, "softmax"])
def test_a_mixer_is_its_recurrence(name):
    mixer, pattern = ("linear", "N") if name == "softmax" else (name, "L")
    layer = decoder(mixer, pattern).get_submodule("layers.1.mixer")
    parameters = {key: p.detach().normal_(std=0.4) for key, p in layer.named_parameters()}
    x = torch.randn(1, T, 32, dtype=torch.float64)
    expected = DEFINITIONS[name](x[0], parameters)
    error = (layer(x, sequence(T))[0] - expected).abs().max()
    assert error <= (1e-10 if name not in ("lightning", "retention") else 1e-7)  # the buffer was made in float32


def test_features_and_a_window():
    layer = decoder("hedgehog", "L").get_submodule("layers.1.mixer")
    p = {key: p.detach().normal_(std=0.4) for key, p in layer.named_parameters()}
    linear, window = ({key.removeprefix(f"{part}."): w for key, w in p.items()} for part in ("linear", "window"))
    x = torch.randn(T, 32, dtype=torch.float64)
    q, k, v = _heads(x @ linear["qkv_proj.weight"].mT, K, K, V)
    q, k = (
        torch.cat([turned.softmax(-1), (-turned).softmax(-1)], -1)
        for y, name in ((q, "q"), (k, "k"))
        for turned in [
            torch.stack([y[:, h] @ linear[f"{name}_features.weight"][h * K : (h + 1) * K].mT for h in (0, 1)], 1)
        ]
    )
    gate = x @ linear["decay.proj.0.weight"].mT @ linear["decay.proj.1.weight"].mT + linear["decay.proj.1.bias"]
    decay = gate.sigmoid().log().unflatten(-1, (H, 2 * K)) / 16
    far = _recurrence(q * (2 * K) ** -0.5, k, v, decay)
    expected = _finish(far, linear, F.silu(x @ linear["output.gate_proj.weight"].mT))
    near = _attention(x, window, 5) * 2 * (x @ window["gate_proj.weight"].mT).sigmoid()[..., None]
    expected = expected + near.flatten(1) @ window["out_proj.weight"].mT
    assert (layer(x[None], sequence(T))[0] - expected).abs().max() <= 1e-10


def test_a_convolution_before_queries_keys_and_values():
    layer = decoder("convolved", "L").get_submodule("layers.1.mixer")
    p = {key: p.detach().normal_(std=0.4) for key, p in layer.named_parameters()}
    x = torch.randn(T, 32, dtype=torch.float64)
    q, k, v = _heads(F.silu(_conv(x @ p["qkv_proj.weight"].mT, p["conv.weight"])), K, K, V)
    gate = x @ p["decay.proj.0.weight"].mT @ p["decay.proj.1.weight"].mT + p["decay.proj.1.bias"]
    o = _recurrence(q * K**-0.5, k, v, gate.sigmoid().log().unflatten(-1, (H, K)) / 16)
    expected = _finish(o, p, F.silu(x @ p["output.gate_proj.weight"].mT))
    assert (layer(x[None], sequence(T))[0] - expected).abs().max() <= 1e-10


def test_a_softmax_layer_without_positions_sees_a_set():
    layer = decoder("no positions", "N").get_submodule("layers.1.mixer")
    x = torch.randn(1, T, 32, dtype=torch.float64)
    mixed = torch.cat([x[:, torch.randperm(T - 1)], x[:, -1:]], 1)
    assert (layer(x, sequence(T))[0, -1] - layer(mixed, sequence(T))[0, -1]).abs().max() <= 1e-12


@pytest.mark.parametrize("mixer", ["hgrn2", "mamba2", "delta_net"])
def test_only_some_mixers_have_a_feature_map(mixer):
    with pytest.raises(ValueError, match="feature_map: got 'relu', expected None with mixer"):
        replace(tiny(mixer), feature_map="relu")


@pytest.mark.parametrize("mixer", ["mamba2", "kda", "log_linear_mamba2"])
def test_mixers_with_a_convolution_of_their_own_get_no_second(mixer):
    with pytest.raises(ValueError, match="short_conv: got True, expected False with mixer"):
        replace(tiny(mixer), short_conv=True)


def test_retention_has_positions():
    with pytest.raises(ValueError, match="rope_theta: got None, expected a number with mixer='retention'"):
        replace(tiny("retention"), rope_theta=None)


@pytest.mark.parametrize("mixer", ["delta_net", "gated_delta_net", "kda", "log_linear_gated_delta_net"])
def test_eigenvalues_may_be_negative(mixer):
    """Twice the beta: what is written at a first token is twice as much."""
    plain, negative = (
        make_mixer(replace(tiny(mixer), negative_eigenvalues=choice), 0).double() for choice in (None, True)
    )
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(std=0.4)
    negative.load_state_dict(plain.state_dict())
    found = []
    for layer in (plain, negative):
        layer.output.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        layer(torch.ones(1, 1, 32, dtype=torch.float64), sequence(1))
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("mixer", ["linear", "mamba2", "log_linear_mamba2"])
def test_only_the_delta_rule_has_a_beta(mixer):
    with pytest.raises(ValueError, match="negative_eigenvalues: got True, expected None with mixer"):
        replace(tiny(mixer), negative_eigenvalues=True)


def test_layers_follow_the_pattern():
    layers = [type(make_mixer(tiny("kda", "LN"), layer)).__name__ for layer in range(4)]
    assert layers == ["DeltaMixer", "SoftmaxMixer"] * 2


@pytest.mark.parametrize("plain", ["mamba2", "gated_delta_net"])
def test_levels_weigh_the_same_where_nothing_is_projected(plain):
    made, relative = (decoder(name, "L").get_submodule("layers.1.mixer") for name in (f"log_linear_{plain}", plain))
    torch.nn.init.zeros_(made.level_scales.proj.weight)
    with torch.no_grad():
        made.level_scales.init_parameters(None)  # in float64
    relative.load_state_dict({n: p for n, p in made.state_dict().items() if not n.startswith("level_scales")})
    x = torch.randn(2, T, 32, dtype=torch.float64)
    torch.testing.assert_close(made(x, sequence(T)), relative(x, sequence(T)), rtol=1e-10, atol=1e-12)
