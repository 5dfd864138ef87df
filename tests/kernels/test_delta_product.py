"""Several steps of the delta rule for each token against the definition, on one device."""

import pytest
import torch

from lasp.kernels import delta_product, delta_rule
from tests.parallel.inputs import error
from tests.parallel.product import HEADS, draw, expected

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of kernels


def found(case, dtype=torch.float64, device="cpu", **options) -> dict[str, torch.Tensor]:
    given = case.per_token | {"state": case.state}
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in given.items()}
    tensors = {name: x for name, x in leaves.items() if name != "state"}
    options |= {"initial_state": leaves["state"], "output_final_state": True, "cu_seqlens": case.offsets}
    upstream = [d.to(device, dtype) for d in (case.do, case.d_final)]
    o, final = delta_product(**tensors, **options)
    grads = torch.autograd.grad([o, final], list(leaves.values()), upstream)
    return {"o": o, "final": final} | {f"d{name}": d for name, d in zip(leaves, grads, strict=True)}


def errors(case, **options) -> dict[str, float]:
    got, wanted = found(case, **options), expected(case)
    return {name: error(got[name].double().cpu(), x) for name, x in wanted.items()}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("decay", ["none", "scalar", "diagonal"])
@pytest.mark.parametrize(("tokens", "documents", "batch"), [(40, None, 2), (45, (0, 1, 1, 40, 45), 1), (1, None, 2)])
def test_equals_the_definition(gen, decay, steps, tokens, documents, batch):
    got = errors(draw(gen, decay, steps, tokens, documents, batch))
    assert max(got.values()) < 1e-10, got


def test_one_step_is_the_delta_rule(gen):
    tensors = draw(gen, "scalar", 1, 30).per_token
    once = {name: x[:, :, 0] if name in ("k", "v", "beta") else x for name, x in tensors.items()}
    assert torch.equal(delta_product(**tensors)[0], delta_rule(**once)[0])


def test_a_constant_decay_is_that_of_every_token(gen):
    tensors = draw(gen, "scalar", 2, 30).per_token
    constant = tensors["decay"][0, 0]
    every = tensors | {"decay": constant.expand_as(tensors["decay"])}
    assert torch.equal(delta_product(**tensors | {"decay": constant})[0], delta_product(**every)[0])


@pytest.mark.parametrize("documents", [None, (0, 30, 40)], ids=["", "packed"])
def test_kernels_equal_the_definition(gen, documents):
    pytest.importorskip("lasp.kernels.triton.delta.op")
    got = errors(draw(gen, "scalar", 2, 40, documents), dtype=torch.float32, device=DEVICE, backend="triton")
    assert max(got.values()) < 1e-5, got


def test_a_single_token_is_a_launch_for_each_step(gen, monkeypatch):
    dispatch = pytest.importorskip("lasp.kernels.triton.dispatch")
    monkeypatch.setattr(dispatch, "triton_op", None)
    case = draw(gen, "diagonal", 3, 1, batch=2)
    tensors = {name: x.to(DEVICE, torch.float32) for name, x in case.per_token.items()}
    state = case.state.to(DEVICE, torch.float32)
    o, final = delta_product(**tensors, initial_state=state, output_final_state=True, backend="triton")
    wanted = expected(case)
    assert error(o.double().cpu(), wanted["o"]) < 1e-6 and error(final.double().cpu(), wanted["final"]) < 1e-6


def test_refuses_what_does_not_fit(gen):
    given = draw(gen, "scalar", 2, 5).per_token
    for name, change, words in (
        ("k", given["k"][:, :, 0], "k: got 4 dimensions"),
        ("v", given["v"][:, :, :1], "v: got 1 steps a token"),
        ("beta", given["beta"][..., :1], "beta: got shape"),
        ("k", given["k"][:, :, :0], "k: got 0 steps a token"),
        ("decay", given["decay"] + 1, "decay: got a maximum"),
        ("decay", torch.zeros(HEADS, dtype=torch.float64, requires_grad=True), "decay: got a constant"),
        ("beta", None, "beta: got None"),
    ):
        with pytest.raises(ValueError, match=words):
            delta_product(**given | {name: change})
