"""A mixer of one's own in lasp's decoder, and a recipe with it:   lasp train examples.own_mixer:small

A mixer takes the vectors of this rank's tokens and the sequence that they are of. What looks along the sequence is
called through `seq`; the rest is PyTorch. It then runs over any number of ranks, in segments, with packed documents.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from lasp.models.layers import at_least_float32
from lasp.training.recipes import quickstart


class ForgettingMixer(nn.Module):
    """Linear attention in which every head forgets by a gate: S_t = exp(g_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads = config.num_heads
        width = self.heads * config.key_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, self.heads)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x, seq):  # x [B, T, hidden]
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o, _ = seq.linear_attention(q, F.silu(k), v, F.logsigmoid(at_least_float32(self.gate_proj(x))))
        return self.out_proj(o.flatten(2))


def small():
    """The quickstart with this mixer in its linear layers."""
    recipe = quickstart()
    model = replace(recipe.model, mixer="examples.own_mixer:ForgettingMixer")
    return replace(recipe, model=model, run_dir="runs/own_mixer")
