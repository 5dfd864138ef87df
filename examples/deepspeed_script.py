"""Sequence parallelism in a DeepSpeed script of your own: ZeRO shards the model, lasp splits the sequence.

    torchrun --nproc-per-node 2 examples/deepspeed_script.py         # or: deepspeed --num_gpus 2 …

On a machine without a GPU set DS_ACCELERATOR=cpu. What lasp adds is marked (1) to (4).
"""

import sys

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import nn

from lasp.parallel import SequenceParallel, leave

VOCABULARY, HIDDEN, HEADS, TOKENS, STEPS = 100, 64, 4, 501, 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv, self.beta = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HEADS)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens, seq):
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        # (1) What looks along the sequence is called through `seq`; x holds this rank's tokens only.
        o, _ = seq.delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, self.beta(x).sigmoid())
        return self.head(x + o.flatten(2))


def main(stage):
    deepspeed.init_distributed("nccl" if get_accelerator().device_name() == "cuda" else "gloo")
    torch.manual_seed(0)  # the same weights and data on every rank
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
        # (2) No `mpu` and no sequence_parallel_size: with them, ZeRO 3 divides gradients by another number than ZeRO 0
        # to 2. Every rank counts as data parallel; DeepSpeed then divides by the world size, always.
    )
    world = dist.get_world_size()
    sp = SequenceParallel(dist.group.WORLD, device=engine.device)  # (3) here all ranks share one sequence
    for step in range(STEPS):
        text = torch.randint(VOCABULARY, (1, TOKENS + 1)).to(engine.device)
        seq = sp.sequence(TOKENS)
        tokens, labels = seq.shard(text[:, :-1]), seq.shard(text[:, 1:])
        labels = labels.masked_fill(~seq.valid, -100)
        logits = engine(tokens, seq)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        loss = seq.mean(total, (labels != -100).sum())
        # (4) The ranks' gradients add up to that of `loss`, but DeepSpeed averages them: so it gets `world` times it.
        # With several sequence-parallel groups of `size` ranks (data parallel), it is `size` times each group's mean.
        engine.backward(loss * world)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    leave()


if __name__ == "__main__":
    main(stage=int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 2)
