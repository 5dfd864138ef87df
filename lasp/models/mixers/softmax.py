"""Softmax attention with rotary positions and grouped keys and values."""

from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.models.layers import rotate
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


class SoftmaxMixer(nn.Module):
    """Causal attention (arXiv:1706.03762) with RoPE (arXiv:2104.09864) and GQA (arXiv:2305.13245), as in Llama 3."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.theta = config.rope_theta
        self.head_counts = [config.num_heads, config.kv_heads, config.kv_heads]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.head_counts) * config.key_dim, bias=False)
        self.out_proj = nn.Linear(config.num_heads * config.key_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        q, k, v = product(self.qkv_proj, x).unflatten(-1, (sum(self.head_counts), -1)).split(self.head_counts, dim=-2)
        q, k = (rotate(y, seq.positions, self.theta) for y in (q, k))
        return product(self.out_proj, seq.softmax_attention(q, k, v).flatten(2))
