"""Sharding: each process holds its share of every parameter, gradient and moment (`train.shard`).

torch's `fully_shard` on student and teacher alike: parameters are DTensors, cut along their first dimension; a block's
are brought together for its own forward and backward pass only. A distillation's frozen guide stays whole.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dino.distributed import local
from dino.methods.network import Network
from dino.models import Backbone, build


def shard(network: Network, accelerator: Accelerator) -> None:
    """Cut a network up among all processes, block by block, in place; its shares move to this process's device.

    On GPUs under bf16 the blocks' parameters travel as bf16, which most of them would become anyway; those of heads and
    tokens, and all gradients, travel as fp32.

    Args:
        network: with a ViT as its `backbone`; every process has the same weights.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    on_gpu = accelerator.device.type == "cuda"  # CPU kernels of LayerNorm take no bf16 weights for fp32 tokens
    narrow = torch.bfloat16 if accelerator.mixed_precision == "bf16" and on_gpu else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.backbone.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(network, FSDPModule)


def norms(tensors: list[Tensor]) -> Tensor:
    """(n,) the norm of each tensor, over all processes' shares; at least one tensor, and sharded all or none."""
    own = torch.stack(torch._foreach_norm(local(tensors)))
    if isinstance(tensors[0], DTensor):
        squared = own.square()
        dist.all_reduce(squared)
        return squared.sqrt()
    return own


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, one after the other; every process must call this.

    Args:
        keep: whether this process wants them (on the CPU); the others get nothing.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def scattered(whole: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, which every process has, cut as those of the same name in `like` are."""
    return {
        name: distribute_tensor(tensor.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
        if isinstance(there := like.get(name), DTensor)
        else tensor
        for name, tensor in whole.items()
    }


def whole_backbone(network: Network, accelerator: Accelerator, everywhere: bool = False) -> Backbone:
    """A network's backbone in one piece: itself, or where it is sharded a copy; every process must call this.

    Args:
        everywhere: whether all processes get a copy that can be used, or only the main process.
    """
    backbone = network.backbone
    if not is_sharded(network):
        return backbone
    keep = everywhere or accelerator.is_main_process
    tensors = gathered(backbone.state_dict(), keep)
    if not keep:
        return backbone
    with torch.device("meta"):
        copy = build(backbone.spec)
    copy.load_state_dict(tensors, assign=True)
    return copy.to(accelerator.device)
