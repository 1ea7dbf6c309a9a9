"""Heads: the DINO head, backbone features to prototype scores (Caron et al. 2021, §3.1 and appendix C), and MLPs."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.distributed import local


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


def mlp(
    widths: Sequence[int],
    batch_norm: bool = False,
    norm_output: bool = False,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers with an activation between them.

    BatchNorm makes its statistics of a micro-batch, of both global views together; on GPUs of all processes, on CPUs
    each process of its own.

    Args:
        widths: of the input and of each layer's output.
        batch_norm: after each layer but the last.
        norm_output: after the last, too.
    """
    modules: list[nn.Module] = []
    last = len(widths) - 2
    for layer, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        has_norm = batch_norm and (layer < last or norm_output)
        modules.append(nn.Linear(width_in, width_out, bias=not has_norm))
        if has_norm:
            modules.append(nn.BatchNorm1d(width_out))
        if layer < last:
            modules.append(activation())
    return nn.Sequential(*modules)


class PredictionHead(nn.Module):
    """A projector and, in the student of some methods, a predictor of the teacher's projections (Grill et al. 2020)."""

    def __init__(self, projector: nn.Module, predictor: nn.Module | None = None):
        super().__init__()
        self.projector, self.predictor = projector, predictor

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) to (B, E)."""
        projections = self.projector(tokens)
        return projections if self.predictor is None else self.predictor(projections)


class SwAVHead(nn.Module):
    """A projector to unit length, and prototypes that `normalise` keeps at unit length (Caron et al. 2020, §3.1).

    Args:
        projector: to width E.
        width: E.
        prototypes: K.
    """

    def __init__(self, projector: nn.Module, width: int, prototypes: int):
        super().__init__()
        self.projector = projector
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """After each update."""
        for weight in local([self.prototypes.weight]):
            weight.copy_(F.normalize(weight, dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) to (B, K + E): scores, and the embeddings that they are of."""
        hidden = self.projector(tokens)
        embeddings = F.normalize(hidden.float(), dim=1).to(hidden.dtype)
        return torch.cat([self.prototypes(embeddings), embeddings], dim=1)
