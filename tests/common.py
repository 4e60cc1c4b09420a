"""What several tests build."""

import torch
from torch import nn

from pc_transformer.attention import LEARNED


def stir(model: nn.Module, seed: int, scale: float) -> None:
    "Random gains and precisions, and matrices `scale` times as large: a model in which every part matters."
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(LEARNED) or p.dim() < 2:
                p.add_(torch.randn(p.shape, generator=noise) / 4)
            else:
                p.mul_(scale)
