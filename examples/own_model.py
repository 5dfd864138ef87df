"""A model of one's own in lasp's training loop, and a recipe with it:   lasp train examples.own_model:small

The loop asks little of a model: it is made of a `lasp.config.ModelConfig`, has its blocks in `layers`, and gives the
sum of the losses of this rank's labels and their number. Labels are shifted before the context is split, and -100
where there is none.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from lasp.models.layers import at_least_float32
from lasp.training.recipes import quickstart


class Block(nn.Module):
    """Softmax attention or linear attention, and an MLP."""

    def __init__(self, config, letter):
        super().__init__()
        self.heads, self.linear = config.num_heads, letter == "L"
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden_size) for _ in range(2))
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, x, seq):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o = seq.linear_attention(q.sigmoid(), k.sigmoid(), v)[0] if self.linear else seq.softmax_attention(q, k, v)
        x = x + self.out(F.rms_norm(o, o.shape[-1:]).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """An embedding, blocks, and the embedding again as the head."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.init_std)

    def forward(self, tokens, seq, *, labels=None, scored=None):
        """Logits, or (sum of losses, how many). scored: where labels are, if few; may be left aside."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, seq)
        logits = F.linear(self.norm(x), self.embedding.weight)
        if labels is None:
            return logits
        logits = at_least_float32(logits.flatten(0, 1))
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        return losses, (labels != -100).sum()


def small():
    """The quickstart with this model."""
    recipe = quickstart()
    model = replace(recipe.model, model_class="examples.own_model:Model")
    return replace(recipe, model=model, run_dir="runs/own_model")
