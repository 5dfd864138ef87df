"""Rows in the experts' order, and matrices of their own for each expert's rows."""

import pytest
import torch

from lasp.kernels.experts import RowOrder, grouped_matmul, grouped_matmul_fused, tally


def draw(gen, rows, experts, channels, width):
    """Rows of which some experts, the last among them, get none."""
    ids = torch.randint(0, experts - 1, (rows,), generator=gen).sort().values
    x = torch.randn(rows, channels, generator=gen, dtype=torch.float64)
    weights = torch.randn(experts, channels, width, generator=gen, dtype=torch.float64)
    return ids, x, weights, tally(ids, experts)


def test_every_row_meets_its_experts_matrix(gen):
    ids, x, weights, counts = draw(gen, 23, 5, 6, 7)
    expected = torch.stack([row @ weights[i] for i, row in zip(ids, x, strict=True)])
    assert (grouped_matmul(x, weights, counts) - expected).abs().max() <= 1e-13


def test_no_rows_at_all(gen):
    _, x, weights, _ = draw(gen, 3, 5, 6, 7)
    weights.requires_grad_()
    y = grouped_matmul(x[:0], weights, torch.zeros(5, dtype=torch.int64))
    assert y.shape == (0, 7)
    assert (torch.autograd.grad(y.sum(), weights)[0] == 0).all()


def test_one_kernel_for_all_experts(gen):
    """torch's grouped matmul, on a GPU where there is one, against the loop: both in bfloat16, output and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, x, weights, counts = (t.to(device) for t in draw(gen, 100, 5, 16, 24))
    dy = torch.randn(100, 24, generator=gen, dtype=torch.float64).to(device)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weights)]
        y = function(*leaves, counts)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    exact = run(grouped_matmul, torch.float64)
    for loop, fused, wanted in zip(
        run(lambda x, w, c: torch.cat([a @ b for a, b in zip(x.split(c.tolist()), w, strict=True)]), torch.bfloat16),
        run(grouped_matmul_fused, torch.bfloat16),
        exact,
        strict=True,
    ):
        assert (fused - wanted).norm() <= 2 * (loop - wanted).norm() + 1e-3 * wanted.norm()


def test_sorting_is_stable_and_undone(gen):
    ids = torch.randint(0, 4, (30,), generator=gen)
    by_id = RowOrder.sorting(ids)
    rows = torch.arange(30)
    sorted_ids = ids[by_id.order]
    assert (sorted_ids.diff() >= 0).all()
    assert all((by_id.order[sorted_ids == i].diff() > 0).all() for i in range(4))
    assert torch.equal(by_id.undo(by_id.apply(rows)), rows)


@pytest.mark.parametrize("copies", [1, 3])
def test_gradients_of_orders(gen, copies):
    by_id = RowOrder.sorting(torch.randint(0, 4, (12,), generator=gen))
    x = torch.randn(12 // copies, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    assert torch.equal(by_id.apply(x, copies), x.repeat_interleave(copies, 0)[by_id.order])
    assert torch.autograd.gradcheck(lambda x: by_id.apply(x, copies), x)
    assert torch.autograd.gradcheck(by_id.undo, by_id.apply(x, copies).detach().requires_grad_())


def test_tally(gen):
    ids, times = torch.tensor([3, 0, 3, 1]), torch.tensor([True, True, False, True])
    assert tally(ids, 5).tolist() == [1, 1, 0, 2, 0]
    assert tally(ids, 5, times).tolist() == [1, 1, 0, 1, 0]
