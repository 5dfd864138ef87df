"""Two lines make a Megatron-Core model a hybrid of linear and softmax attention that trains on long contexts.

    torchrun --nproc-per-node 2 examples/megatron_two_lines.py

It splits sequences of 256 tokens over the ranks (context parallelism) and takes a few steps; without GPUs, too. The two
lines are marked; everything else is what a Megatron-Core program has anyway.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.integrations.megatron import gpt_layer_specs, leave_mesh, run_on_cpu, shard_batch  # line 1

VOCABULARY, LENGTH, STEPS = 64, 256, 10


def main() -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    else:
        run_on_cpu()
    dist.init_process_group("nccl" if gpu else "gloo")
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    torch.manual_seed(0)
    if gpu:
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=ranks,
        use_cpu_initialization=not gpu,
    )
    spec = gpt_layer_specs(config, "LLLN", mixer="gated_delta_net")  # line 2: three linear layers, one softmax layer
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    model = model.to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    group = parallel_state.get_context_parallel_group()
    pattern = torch.randint(VOCABULARY, (LENGTH // 2,), device=device).repeat(3)  # what comes twice can be remembered
    whole = {
        "tokens": pattern[None, :LENGTH],
        "labels": pattern[None, 1 : LENGTH + 1],
        "position_ids": torch.arange(LENGTH, device=device)[None],
    }
    batch = shard_batch(whole, group)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).sum() / LENGTH
        loss.backward()
        for parameter in model.parameters():  # Megatron's DistributedDataParallel does this in a real program
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(total.item())
        if dist.get_rank() == 0:
            print(f"step {step + 1}  loss {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    leave_mesh()


if __name__ == "__main__":
    main()
