"""Sequence parallelism in a model of your own.

    torchrun --nproc-per-node 2 examples/own_pytorch_model.py

What lasp adds is marked (1) to (5). The model does not know how many ranks there are; its losses do not depend on it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lasp.parallel import SequenceParallel, leave

VOCABULARY, HIDDEN, HEADS, TOKENS, STEPS = 100, 64, 4, 501, 5


class Attention(nn.Module):
    """Linear attention with a learned decay, or softmax attention."""

    def __init__(self, linear):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.decay = nn.Linear(HIDDEN, HEADS) if linear else None
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, seq):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        # (1) What looks along the sequence is called through `seq`; x holds this rank's tokens only.
        if self.decay is not None:
            o, _ = seq.linear_attention(q, k, v, F.logsigmoid(self.decay(x)))
        else:
            o = seq.softmax_attention(q, k, v)
        return self.out(o.flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Attention(linear=True), Attention(linear=False)])
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens, seq):
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), seq)
        return self.head(x)


def train(group, device):
    """The losses of a few steps on the ranks of the group (None: on this one alone)."""
    torch.manual_seed(0)  # the same weights and data on every rank
    model = Model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sp = SequenceParallel(group, layout="zigzag", device=device)  # (2) once, for the whole run
    losses = []
    for _ in range(STEPS):
        text = torch.randint(VOCABULARY, (1, TOKENS + 1), device=device)
        seq = sp.sequence(TOKENS)  # (3) for every batch: any length; packed documents by cu_seqlens
        tokens, labels = seq.shard(text[:, :-1]), seq.shard(text[:, 1:])
        labels = labels.masked_fill(~seq.valid, -100)  # padding, if the ranks do not divide the length
        logits = model(tokens, seq)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        loss = seq.mean(total, (labels != -100).sum())  # (4) the mean over all tokens, on every rank
        optimizer.zero_grad()
        loss.backward()
        if group is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)  # (5) the sum, not the mean, of the ranks' parts
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    together, alone = train(dist.group.WORLD, device), train(None, device)
    if dist.get_rank() == 0:
        print("step  all ranks  one rank")
        for step, losses in enumerate(zip(together, alone, strict=True)):
            print(f"{step:4d}  {losses[0]:9.6f}  {losses[1]:8.6f}")
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4 if gpu else 1e-5, atol=0.0)
    leave()
