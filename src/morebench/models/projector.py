"""Visual features to the LLM's width; the number of tokens stays."""

import math

import torch
from torch import Tensor, nn


class MLPProjector(nn.Sequential):
    """`depth` linear layers with exact GELU between; depth 2 is LLaVA-1.5's `mlp2x_gelu`, keys included."""

    def __init__(self, vision_dim: int, llm_dim: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Linear(vision_dim, llm_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(llm_dim, llm_dim)]
        super().__init__(*layers)
        self.vision_dim = vision_dim

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """The distribution of torch's default `Linear`, drawn from a generator of our own.

        So equal cells start equal, whatever was drawn before in this process.
        """
        generator = torch.Generator().manual_seed(seed)
        for layer in self:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for parameter in (layer.weight, layer.bias):
                    drawn = torch.empty(parameter.shape, device="cpu").uniform_(
                        -bound, bound, generator=generator
                    )
                    parameter.copy_(drawn)

    def forward(self, features_IVC: Tensor) -> Tensor:
        return super().forward(features_IVC)
