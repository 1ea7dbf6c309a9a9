"""The DINO head: backbone features to prototype scores (Caron et al. 2021, §3.1 and appendix C)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """MLP with GELU, a bottleneck made unit length, and a weight-normed linear layer of prototypes.

    Parameter names are those of the released full checkpoints (`mlp.0.weight`, `last_layer.weight_v` …).

    Args:
        in_dim: width of the features.
        prototypes: number of outputs, K.
        layers: linear layers before the prototypes.
        hidden: width of the MLP.
        bottleneck: width of the unit-length bottleneck.
        norm_last_layer: keep every prototype at length 1; false lets the lengths (`weight_g`) be learned.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        self.prototypes = prototypes
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            modules += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_dim) to scores (B, K)."""
        # The length is taken in fp32: in half precision a short vector's would underflow.
        hidden = self.mlp(features)
        return self.last_layer(F.normalize(hidden.float(), dim=-1).to(hidden.dtype))


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are `weight_g · weight_v / ‖weight_v‖` (Salimans & Kingma 2016)."""

    def __init__(self, in_dim: int, prototypes: int, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(prototypes, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_dim) to (B, K)."""
        # torch's fused kernel: forward and backward take a third less time than F.normalize of a large matrix.
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(features, weight)
