"""A Hugging Face Llama trained with context parallelism: each rank holds a part of every text.

    torchrun --nproc-per-node 2 examples/llama_context_parallel.py

What lasp adds is marked (1) to (5). In the end losses and gradients are compared with those of one
process that uses PyTorch's attention.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from lasp.parallel import SequenceParallel, leave

TOKENS, STEPS = 1001, 3


def attention(module, q, k, v, mask, *, sequence, scaling, **_):
    """(1) Called by every layer; q, k, v [B, H, T, D] of this rank's tokens."""
    o = sequence.softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scaling)
    return o, None


AttentionInterface.register("lasp", attention)


def make_model(attention, device):
    torch.manual_seed(0)  # the same weights on every rank
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(device)


def loss_of(model, text, sp):
    """The mean over all ranks' tokens; text [B, T + 1] is the same on every rank."""
    seq = sp.sequence(text.shape[1] - 1)  # (2) for every batch: any length; packed documents by cu_seqlens
    tokens, labels = seq.shard(text[:, :-1]), seq.shard(text[:, 1:])
    labels = labels.masked_fill(~seq.valid, -100)  # padding, if the ranks do not divide the length
    positions = seq.positions[None]  # (3) for the rotary embedding: a rank's tokens do not begin at 0
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False, sequence=seq).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return seq.mean(total, (labels != -100).sum())  # (4) the same on every rank


def train(group, device):
    """The losses on the ranks of the group (None: on this one, without lasp), and the gradients of the first step."""
    model = make_model("sdpa" if group is None else "lasp", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sp = SequenceParallel(group, layout="zigzag", device=device)  # once, for the whole run
    losses, first = [], {}
    for _ in range(STEPS):
        loss = loss_of(model, torch.randint(model.config.vocab_size, (1, TOKENS + 1), device=device), sp)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)  # (5) the sum, not the mean, of the ranks' parts
            first.setdefault(name, parameter.grad.clone())
        optimizer.step()
        losses.append(loss.item())
    return losses, first


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_default_dtype(torch.float32 if gpu else torch.float64)
    (together, grads), (alone, expected) = train(dist.group.WORLD, device), train(None, device)
    tolerance = 1e-4 if gpu else 1e-10
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=tolerance, atol=0.0)
    for name, grad in grads.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    if dist.get_rank() == 0:
        print(
            f"losses on {dist.get_world_size()} ranks {together}, on one {alone}; {len(grads)} gradients are equal, too"
        )
    leave()
