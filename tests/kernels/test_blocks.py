"""Blocks see exactly what the definition of the mask says, and joining them makes fewer of them, not other ones."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lasp.kernels import attention, blocks
from lasp.kernels.attention import CuDNN, Dense, Flash
from lasp.kernels.blocks import Block, Mask, join, string
from lasp.kernels.softmax import document_blocks
from lasp.parallel.layout import Layout, Partition
from lasp.parallel.softmax.plan import coarsen, make_plan

cpu = torch.device("cpu")


def seen(blocks: list[Block], queries: int, keys: int) -> Tensor:
    """[queries, keys]: how many of the blocks let a query see a key."""
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for block in blocks:
        for s in block.segments:
            count[s.rows, s.cols] += s.allowed(range(s.queries), cpu)
    return count


@pytest.mark.parametrize("causal", [True, False])
def test_block_is_the_definition(gen, causal):
    for _ in range(200):
        queries, keys, window = (int(torch.randint(1, 9, (), generator=gen)) for _ in range(3))
        offset = int(torch.randint(-10, 11, (), generator=gen))
        for width in (None, window):
            gap = torch.arange(queries)[:, None] + offset - torch.arange(keys)
            wanted = (gap >= 0) | (not causal)
            if width is not None:
                wanted &= gap.abs() < width
            block = Mask(1.0, causal, width).block(slice(0, queries), slice(0, keys), offset)
            found = [] if block is None else [block]
            assert torch.equal(seen(found, queries, keys), wanted.long())
            if block is not None:
                inside = wanted[block.rows, block.cols]
                assert inside.any(0).all() and inside.any(1).all(), "a row or column of the block is empty"
                assert block.is_full == bool(inside.all())


def test_the_work_for_many_documents_grows_with_their_number(monkeypatch):
    """Offsets are copied a few times each, however many there are."""
    copied = []

    def counted(block, **changes):
        copied.extend(cut for cuts in changes.values() for cut in cuts)
        return replace(block, **changes)

    monkeypatch.setattr(blocks, "replace", counted)
    (block,) = document_blocks(list(range(0, 4001, 4)), Mask(1.0))
    assert len(block.q) == 1001 and len(copied) <= 4 * 1001


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("inner", [1, 2])
def test_plans_cover_every_pair_once(gen, layout, inner):
    for window in (None, 3):
        for causal in (True, False):
            cuts = sorted(torch.randint(0, 38, (3,), generator=gen).tolist())
            offsets, mask = [0, *cuts, 37], Mask(1.0, causal, window)
            ranks = 4 // inner
            parts = [coarsen(Partition(Layout(layout, 4), rank * inner, offsets), inner) for rank in range(ranks)]
            plans = [make_plan(part, mask) for part in parts]
            padded = parts[0].layout.units * parts[0].unit_length
            assert plans[0].busiest == max(
                sum(
                    int(s.allowed(range(s.queries), cpu).sum())
                    for blocks in p.blocks.values()
                    for b in blocks
                    for s in b.segments
                )
                for p in plans
            )
            position = [torch.cat([torch.arange(a, b) for a, b in part.ranges]) for part in parts]
            got = torch.zeros(padded, padded, dtype=torch.int64)
            for rank, plan in enumerate(plans):
                assert plan.steps == plans[0].steps, "all ranks must agree on the steps"
                for step in range(ranks):
                    other = (rank - step) % ranks
                    assert step in plan.steps or not plan.blocks[other]
                    local = parts[rank].local_tokens
                    got[position[rank][:, None], position[other]] += seen(plan.blocks[other], local, local)
            place = torch.arange(37)
            document = torch.bucketize(place, torch.tensor(offsets[1:]), right=True)
            gap = place[:, None] - place
            wanted = (document[:, None] == document) & ((gap >= 0) | (not causal))
            if window is not None:
                wanted &= gap.abs() < window
            assert torch.equal(got[:37, :37], wanted.long()) and got.sum() == wanted.sum()


def test_zigzag_needs_one_call_per_step():
    """Own keys: a triangle. An earlier rank's: all see its first unit. A later one's: the second unit sees all."""
    n, layout = 8, Layout("zigzag", 4)
    plan = make_plan(Partition(layout, 1, [0, 8 * n]), Mask(1.0))
    assert plan.blocks[1] == [Block((0, 2 * n), (0, 2 * n), right=0)]
    assert plan.blocks[0] == [Block((0, 2 * n), (0, n))]
    assert plan.blocks[2] == [Block((n, 2 * n), (0, 2 * n))]


def test_documents_are_one_call_and_do_not_travel():
    plan = make_plan(Partition(Layout("contiguous", 2), 0, [0, 3, 4, 8, 12, 16]), Mask(1.0))
    assert plan.blocks[0] == [Block((0, 3, 4, 8), (0, 3, 4, 8), right=0)] and plan.steps == [0]


def test_windows_pass_by_ranks_that_see_nothing():
    assert make_plan(Partition(Layout("contiguous", 8), 3, [0, 64]), Mask(1.0, window=9)).steps == [0, 1]
    assert make_plan(Partition(Layout("zigzag", 8), 3, [0, 64]), Mask(1.0, window=5)).steps == [0, 1, 7]


def test_what_does_not_fit_together_stays_apart():
    apart = [Block((0, 2), (0, 2), right=0), Block((2, 4), (2, 4), right=0)]
    assert join(apart) == apart
    assert string(apart) == [Block((0, 2, 4), (0, 2, 4), right=0)]
    assert string([apart[0], Block((2, 4), (2, 4), left=1, right=0)])[1].left == 1


def test_which_kernel_serves_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "_prefers_cudnn", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_flash_serves", attention._flash_serves.__wrapped__)
    one, two, window = (0, 4096), (0, 4096, 8192), Mask(1.0, window=100)

    def kernels(block: Block, mask: Mask | None = None, batch=1, head_dim=128, dtype=torch.bfloat16) -> list:
        q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(batch, 8192, 8, head_dim))
        return [kernel for _, kernel in attention.calls(block, q, q, mask or Mask(1.0))]

    assert kernels(Block(one, one, right=0), batch=2) == kernels(Block(one, one)) == [CuDNN]
    assert kernels(Block(one, one), head_dim=256) == kernels(Block((0, 64), one)) == [Flash]
    assert kernels(Block(one, one), Mask(1.0, recurring=4095)) == kernels(Block(two, two, right=0)) == [Flash]
    assert kernels(Block((0, 4096), (0, 8192)), Mask(1.0, recurring=4096)) == [CuDNN]
    assert kernels(Block(one, one, left=99, right=0), window) == [Flash]
    assert kernels(Block(two, two, left=99, right=0), window, batch=2) == [Flash, Flash]
    assert kernels(Block(one, one), dtype=torch.float32) == kernels(Block(one, one), head_dim=288) == [Dense]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert kernels(Block(one, one)) == [Flash]


@pytest.mark.parametrize(("capability", "lacks"), [((7, 5), (64, 256)), ((8, 0), (264,)), ((8, 9), (200, 264))])
def test_heads_that_flash_attention_lacks(monkeypatch, capability, lacks):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    sizes = (64, 200, 256, 264)
    served = tuple(size for size in sizes if attention._flash_serves.__wrapped__(size, torch.device("cuda")))
    assert served == tuple(size for size in sizes if size not in lacks and capability >= (8, 0))


@pytest.mark.parametrize(
    ("kernel", "cuts"), [(CuDNN, (0, 6)), (Flash, (0, 6)), (Flash, (0, 1, 6))], ids=["cudnn", "flash", "flash, packed"]
)
def test_arguments_of_gpu_kernels(kernel, cuts):
    """Without a GPU no more than that operators take what they are given, and that shapes come back right."""
    block = Block(cuts, cuts, right=0)
    q = torch.empty(1, 6, 4, 8, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 6, 2, 8, dtype=torch.bfloat16, device="meta")
    o, lse = kernel.forward(q, k, k, block, 1.0)
    assert o.shape == q.shape and lse.shape == (1, 6, 4)
    dq, dk, dv = kernel.backward(o, q, k, k, o, lse, block, 1.0)
    assert dq.shape == q.shape and dk.shape == dv.shape == k.shape
