"""Mixtures of experts on one rank, against a loop over tokens and experts written down plainly."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lasp.models import Decoder, Memory, count_active_parameters, count_parameters, flops_per_token
from lasp.models.moe import ExpertBalance, MixtureOfExperts, Router, Routing
from lasp.parallel import SequenceParallel
from tests.models.helpers import assert_same, config, gradients, random_tokens, sequence

F64 = torch.float64
E, K = 6, 2


def moe_config(**changes):
    experts = {"num_experts": E, "experts_per_token": K, "expert_intermediate_size": 12}
    return replace(config("gated_delta_net", "LN"), **(experts | changes))


def moe_decoder(**changes) -> Decoder:
    return Decoder(moe_config(**changes)).double()


def layer(**changes) -> MixtureOfExperts:
    moe = MixtureOfExperts(moe_config(**changes)).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if moe.router.bias is not None:
        moe.router.bias.normal_(std=0.2)
    return moe


def plainly(moe, x, normalize, softmax):
    """One token after the other, one expert after the other."""
    y = []
    for token in x.flatten(0, 1):
        logits = moe.router.proj.weight @ token
        scores = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
        ranked = scores if moe.router.bias is None else scores + moe.router.bias
        chosen = ranked.argsort(descending=True)[:K]
        weights = scores[chosen] / (scores[chosen].sum() if normalize else 1)
        out = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = (token @ moe.experts.gate_up_proj[expert]).chunk(2)
            out = out + weight * (F.silu(gate) * up) @ moe.experts.out_proj[expert]
        if moe.shared is not None:
            gate, up = (moe.shared.gate_up_proj.weight @ token).chunk(2)
            out = out + moe.shared.out_proj.weight @ (F.silu(gate) * up)
        y.append(out)
    return torch.stack(y).view_as(x)


@pytest.mark.parametrize("bias_rate", [0.0, 0.01])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_mixture_is_its_definition(scores, normalize, shared, bias_rate):
    moe = layer(
        router_scores=scores, normalize_expert_weights=normalize, num_shared_experts=shared, expert_bias_rate=bias_rate
    )
    x = torch.randn(2, 11, 32, dtype=F64, requires_grad=True)
    dy = torch.randn_like(x)
    leaves = [x, *moe.parameters()]
    y, routing = moe(x, sequence(11))
    expected = plainly(moe, x, normalize, scores == "softmax")
    assert (y - expected).abs().max() <= 1e-12
    assert routing.counts.sum() == 2 * 11 * K
    grads = torch.autograd.grad(y, leaves, dy)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, dy), strict=True):
        assert wanted.norm() > 0
        assert (grad - wanted).norm() <= 1e-11 * wanted.norm()


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    moe = layer(expert_bias_rate=0.01)
    moe.router.bias.copy_(torch.tensor([10.0, 9.0, 0, 0, 0, 0]))
    x = torch.randn(1, 50, 32, dtype=F64)
    y, routing = moe(x, sequence(50))
    assert routing.counts.tolist() == [50, 50, 0, 0, 0, 0]
    assert (y - plainly(moe, x, True, True)).abs().max() <= 1e-12


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gradients_of_the_router(scores, normalize):
    router = Router(moe_config(router_scores=scores, normalize_expert_weights=normalize)).double()
    x = torch.randn(5, 32, dtype=F64, requires_grad=True)
    valid = torch.tensor([True, True, True, False, True])

    def margin(weight):
        ranked = (x @ weight.T).sort(descending=True).values
        return (ranked[:, K - 1] - ranked[:, K]).min()

    draws = (torch.randn(E, 32, dtype=F64) for _ in range(100))
    weight = next(w for w in draws if margin(w) > 0.1).requires_grad_()  # finite steps must not swap experts

    def run(x, weight):
        _, weights, routing = torch.func.functional_call(router, {"proj.weight": weight}, (x, valid))
        return weights, routing.scores, routing.squared_z

    assert torch.autograd.gradcheck(run, (x, weight))
    weights, scores_sum, _ = run(x, weight)
    assert (weights[3] == 0).all()
    assert scores_sum.sum().item() == pytest.approx(4)


def test_the_bias_moves_the_choice_but_not_the_weights():
    router = Router(moe_config(expert_bias_rate=0.5, normalize_expert_weights=False)).double()
    torch.nn.init.normal_(router.proj.weight)
    x, valid = torch.randn(20, 32, dtype=F64), torch.ones(20, dtype=torch.bool)
    chosen, _, routing = router(x, valid)
    router.move_bias(routing.counts)
    mean = 20 * K / E
    assert torch.equal(router.bias, 0.5 * (mean - routing.counts).sign())
    moved, weights, _ = router(x, valid)
    assert not torch.equal(moved, chosen)
    scores = (x @ router.proj.weight.T).softmax(-1)
    assert torch.allclose(weights, scores.gather(1, moved), rtol=1e-12)
    assert torch.equal(moved.sort().values, (scores + router.bias).topk(K).indices.sort().values)


def test_biases_alone_balance_a_router():
    router = Router(moe_config(router_scores="sigmoid", expert_bias_rate=0.01)).double()
    torch.nn.init.normal_(router.proj.weight, std=0.1)
    common, valid = 2 * torch.randn(32, dtype=F64), torch.ones(500, dtype=torch.bool)
    busiest = []
    for _ in range(200):
        routing = router(common + torch.randn(500, 32, dtype=F64), valid)[2]
        router.move_bias(routing.counts)
        busiest.append((routing.counts.max() / routing.counts.double().mean()).item())
    assert sum(busiest[-20:]) / 20 < 1.4 < busiest[0]


def test_balancing_losses_by_hand():
    balance = ExpertBalance(moe_config(aux_loss_weight=0.3, z_loss_weight=0.2))
    counts, scores = torch.tensor([[4, 0, 2, 2, 0, 0], [1, 1, 2, 2, 1, 1]]), torch.rand(2, E, dtype=F64)
    z = torch.rand(2, dtype=F64)
    part = balance.loss([Routing(*row) for row in zip(counts, scores, z, strict=True)], torch.tensor(3), sequence(4))
    aux = sum(E * (c / 8 * s / 4).sum() for c, s in zip(counts, scores, strict=True))
    assert part.item() == pytest.approx(3 * (0.3 * aux + 0.2 * z.sum() / 4).item(), rel=1e-12)
    load, loss, labels = balance.take()
    assert torch.equal(load, counts) and labels == 3 and loss == part
    with pytest.raises(RuntimeError, match="before any batch"):
        balance.take()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balancing_losses_belong_to_training_alone(scores):
    model = moe_decoder(router_scores=scores, z_loss_weight=0.1)
    tokens, labels = random_tokens(1, 30), random_tokens(1, 30)
    total, count = model(tokens, sequence(30), labels=labels)
    _, part, labelled = model.balance.take()
    entropy, _ = model.eval()(tokens, sequence(30), labels=labels)
    logits = model(tokens, sequence(30))
    assert entropy.item() == pytest.approx(F.cross_entropy(logits[0], labels[0], reduction="sum").item(), rel=1e-12)
    assert (total - entropy).item() == pytest.approx(part.item(), rel=1e-10)
    assert part > 0 and count == labelled == 30
    with pytest.raises(RuntimeError, match="before any batch"):
        model.balance.take()


def test_a_batch_of_no_rows_has_no_loss():
    model, nothing = moe_decoder(z_loss_weight=0.1), random_tokens(0, 5)
    total, count = model(nothing, sequence(5), labels=nothing)
    assert total == count == 0


def test_padding_changes_neither_loss_nor_gradients_nor_statistics():
    model, tokens, labels = moe_decoder(z_loss_weight=0.1), random_tokens(2, 41), random_tokens(2, 41)
    seq = SequenceParallel(None, layout="zigzag").sequence(41)
    assert not seq.valid.all()
    loss, _ = model(tokens, sequence(41), labels=labels)
    expected = model.balance.take()
    padded, padded_labels = (seq.shard(x).where(seq.valid, 63) for x in (tokens, labels))
    padded_loss, _ = model(padded, seq, labels=padded_labels)
    got = model.balance.take()
    assert torch.equal(got[0], expected[0]) and got[2] == expected[2]
    assert got[1].item() == pytest.approx(expected[1].item(), rel=1e-10)
    assert (padded_loss - loss).abs() <= 1e-10 * loss
    assert_same(gradients(model, padded_loss), gradients(model, loss))


def test_recomputing_layers_counts_each_token_once():
    model, tokens = moe_decoder(), random_tokens(1, 33)
    plain = gradients(model, model(tokens, sequence(33), labels=tokens)[0])
    load = model.balance.take()[0]
    model.checkpoint_layers = True
    recomputed = gradients(model, model(tokens, sequence(33), labels=tokens)[0])
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    assert torch.equal(model.balance.take()[0], load)
    assert load.sum() == 4 * 33 * K


def test_token_by_token_is_the_whole():
    model, tokens, memory = moe_decoder().eval(), random_tokens(1, 9), Memory()
    steps = [model(tokens[:, i : i + 1], sequence(1), memory=memory) for i in range(9)]
    assert (torch.cat(steps, 1) - model(tokens, sequence(9))).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """As near to float64 as the dtype allows, given the float64 model's choices; its own may differ at near ties."""
    moe = layer(num_shared_experts=1)
    x = torch.randn(1, 40, 32, dtype=F64)
    exact, _ = moe(x, sequence(40))
    chosen = moe.router(x[0], torch.ones(40, dtype=torch.bool))[0]
    y, _ = moe.to(dtype)(x.to(dtype), sequence(40))
    same = (moe.router(x[0].to(dtype), torch.ones(40, dtype=torch.bool))[0] == chosen).all(-1)
    assert y.dtype == dtype and same.sum() >= 30
    assert (y.double() - exact)[0, same].norm() <= 8 * torch.finfo(dtype).eps * exact[0, same].norm()


def test_which_layers_have_experts():
    model = Decoder(moe_config(moe_every=2))
    assert [isinstance(block.mlp, MixtureOfExperts) for block in model.layers] == [False, True, False, True]
    assert not any(isinstance(m, MixtureOfExperts) for m in Decoder(moe_config(num_experts=0)).modules())


def test_flops_and_active_parameters_count_the_chosen_experts():
    few, many = moe_config(), moe_config(num_experts=10 * E)
    expert, routers = 3 * 32 * 12, 4 * 9 * E * 32  # of four layers, the routers' rows for the additional experts
    assert count_parameters(many) - count_parameters(few) == 4 * 9 * E * expert + routers
    assert count_active_parameters(many) - count_active_parameters(few) == routers
    assert count_parameters(few) - count_active_parameters(few) == 4 * (E - K) * expert
    assert flops_per_token(many, 64) - flops_per_token(few, 64) == 6 * routers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": E + 1}, f"experts_per_token: got {E + 1}, expected between 1 and num_experts={E}"),
        ({"experts_per_token": 0}, "experts_per_token: got 0"),
        ({"num_experts": -1}, "num_experts: got -1"),
        ({"num_shared_experts": -1}, "num_shared_experts: got -1"),
        ({"expert_intermediate_size": 0}, "expert_intermediate_size: got 0"),
        ({"moe_every": 5}, "moe_every: got 5, expected between 1 and num_layers=4"),
        ({"router_scores": "relu"}, "router_scores: got 'relu', expected one of softmax, sigmoid"),
        ({"aux_loss_weight": float("nan")}, "aux_loss_weight: got nan"),
        ({"z_loss_weight": -0.1}, "z_loss_weight: got -0.1"),
        ({"expert_bias_rate": -0.1}, "expert_bias_rate: got -0.1"),
    ],
)
def test_configurations_refuse_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**change)
