"""DINOv2's own training step, of the user's own clone of facebookresearch/dinov2, with our weights, crops and masks.

It trains on GPUs only, by xFormers and FSDP. Here it has neither FSDP nor several processes; on a CPU, what it calls of
xFormers is done by PyTorch's own operators, below, and what it moves to a GPU stays where it is.
"""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import kit
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from training import Built

RATE, DECAY, MOMENTUM = 1e-6, 0.04, 0.996


class OfficialDINOv2:
    """`SSLMetaArch.forward_backward`, and the update around it from `do_train`.

    In bf16 weights, activations and crops are all in it, and gradients update fp32 weights, as under FSDP's mixed
    precision.
    """

    def __init__(self, arguments: argparse.Namespace, built: Built, precision: str):
        self.built, method = built, built.step.method
        self.on_cpu = built.views[0].device.type == "cpu"
        prepare_modules(arguments.dinov2, self.on_cpu)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if self.on_cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        warnings.filterwarnings("ignore", module="dinov2")  # of whether it has xFormers
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm`")
        warnings.filterwarnings("ignore", "`torch.cuda.amp.autocast")
        module = kit.official(arguments.dinov2, "dinov2.train.ssl_meta_arch")
        settings = OmegaConf.load(Path(arguments.dinov2).expanduser() / "dinov2/configs/ssl_default_config.yaml")
        settings.merge_with_dotlist(settings_of(built))
        self.network = module.SSLMetaArch(settings).to(built.views[0].device)
        self.network.need_to_synchronize_fsdp_streams = False  # there are none
        for name, ours in (("student", method.student), ("teacher", method.teacher)):
            theirs = getattr(self.network, name)
            theirs.backbone.load_state_dict(ours.backbone.state_dict(), strict=name == "student")
            theirs.dino_head.load_state_dict(ours.head.state_dict())
        self.master, self.narrow = self.network, precision == "bf16"
        if self.narrow:
            self.network = module.SSLMetaArch(settings).to(built.views[0].device, torch.bfloat16)
            self.network.load_state_dict(self.master.state_dict())
            self.network.need_to_synchronize_fsdp_streams = False
        groups = self.master.get_params_groups()
        for group in groups:
            group |= {"lr": RATE * group["lr_multiplier"], "weight_decay": DECAY * group["wd_multiplier"]}
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        self.network.train()
        self.batch = self._batch()

    def _batch(self) -> dict[str, Any]:
        """Our crops and masks as its loader gives them."""
        method, built = self.built.step.method, self.built
        (batch,) = built.step._batches([built.views])
        masks = method._masks(batch, 0)
        dtype = torch.bfloat16 if self.narrow else torch.float32
        low, high = built.config.objective.mask_ratio
        masked_crops = int(masks.hidden.any(dim=1).sum())
        parts = torch.linspace(low, high, masked_crops + 1)[1:]
        return {
            "collated_global_crops": batch.crops[0].to(dtype),
            "collated_local_crops": batch.crops[1].to(dtype),
            "collated_masks": masks.hidden,
            "mask_indices_list": masks.rows,
            "n_masked_patches": torch.full((1,), len(masks.rows)),
            "upperbound": int((masks.hidden.shape[1] * parts).int().sum()),
            "masks_weight": masks.weights,
        }

    def check(self, built: Built, tolerance: float) -> None:
        """The same loss and, in fp32, the same gradient of the patch embedding, without stochastic depth.

        In bf16 the loss is compared without KoLeo: the official one takes distances in bf16, ours in fp32.
        """
        method = built.step.method
        for network in (self.network.student, method.student):
            network.eval()
        (batch,) = built.step._batches([built.views])
        ours = method.losses(batch, method.targets([batch], 0)[0])
        torch.stack(list(ours.values())).sum().backward()
        self.forward_and_backward()
        if self.narrow:
            del ours["loss/koleo"], self.losses["koleo_loss"]
        totals = [torch.stack(list(losses.values())).sum() for losses in (ours, self.losses)]
        kit.same(totals[0], totals[1], tolerance, "loss")
        gradients = [
            network.backbone.patch_embed.proj.weight.grad for network in (method.student, self.network.student)
        ]
        if not self.narrow:
            kit.same(gradients[0], gradients[1], 100 * tolerance, "gradient of the patch embedding")
        for network in (self.network.student, method.student):
            network.train()
            network.zero_grad()

    def parts(self) -> dict[str, Callable[[], object]]:
        return {}  # its step is not in pieces that could be timed

    def step(self) -> None:
        if self.narrow:
            with torch.no_grad():
                torch._foreach_copy_(list(self.network.parameters()), list(self.master.parameters()))
        self.forward_and_backward()
        if self.narrow:
            pairs = zip(self.master.student.parameters(), self.network.student.parameters(), strict=True)
            for parameter, narrow in pairs:
                parameter.grad, narrow.grad = None if narrow.grad is None else narrow.grad.float(), None
        for part in self.master.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average()

    def forward_and_backward(self) -> None:
        batch = self.batch | {"n_masked_patches": self.batch["n_masked_patches"].clone()}  # it is added up in place
        stays = patch.object(Tensor, "cuda", lambda tensor, **_: tensor) if self.on_cpu else contextlib.nullcontext()
        with stays:
            losses = self.network.forward_backward(batch, teacher_temp=0.04)
        sum(loss.item() for loss in losses.values())  # as they are looked at in every step
        shown_halved = ("koleo_loss", "ibot_loss")
        self.losses = {
            name: (2 if name in shown_halved else 1) * loss.detach().float() for name, loss in losses.items()
        }

    @torch.no_grad()
    def average(self) -> None:
        """As `update_teacher`, which looks for FSDP's parts."""
        student, teacher = list(self.master.student.parameters()), list(self.master.teacher.parameters())
        torch._foreach_mul_(teacher, MOMENTUM)
        torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def settings_of(built: Built) -> list[str]:
    """Of our step, by its names."""
    model, objective = built.config.model, built.config.objective
    return [
        "compute_precision.grad_scaler=false",
        f"student.arch={model.arch}",
        f"student.patch_size={model.patch_size}",
        f"student.num_register_tokens={model.registers}",
        f"student.layerscale={model.layer_scale}",
        f"student.drop_path_rate={model.drop_path}",
        f"dino.head_n_prototypes={objective.prototypes}",
        f"dino.koleo_loss_weight={objective.koleo_weight}",
        "train.centering=sinkhorn_knopp",
        f"crops.local_crops_number={built.config.views.local_crops}",
    ]


def prepare_modules(directory: str, on_cpu: bool) -> None:
    """Have its training code import what is not installed here, or has nothing for a CPU; says so."""
    if "dinov2.train" in sys.modules:
        return
    logging.getLogger("dinov2").setLevel(logging.WARNING)
    train = ModuleType("dinov2.train")  # whose own __init__ imports the whole program, loggers and data sets
    train.__path__ = [str(Path(directory).expanduser() / "dinov2/train")]
    sys.modules["dinov2.train"] = train
    if find_spec("fvcore") is None:
        checkpoint = ModuleType("fvcore.common.checkpoint")
        checkpoint.Checkpointer = object  # a base class, of which nothing is called
        for name in ("fvcore", "fvcore.common"):
            sys.modules[name] = ModuleType(name)
        sys.modules["fvcore.common.checkpoint"] = checkpoint
    if on_cpu:
        operators = ModuleType("xformers.ops")
        operators.fmha = ModuleType("xformers.ops.fmha")
        operators.fmha.BlockDiagonalMask = BlockDiagonalMask
        for stand_in in (memory_efficient_attention, scaled_index_add, index_select_cat):
            setattr(operators, stand_in.__name__, stand_in)
        operators.unbind = torch.unbind
        sys.modules["xformers"], sys.modules["xformers.ops"] = ModuleType("xformers"), operators
    stand_ins = "PyTorch's operators in place of xFormers', " if on_cpu else ""
    print(f"official DINOv2: {stand_ins}no FSDP, one process\n")


class BlockDiagonalMask:
    """Sequences side by side, (1, ΣN, …), of which each attends to itself only."""

    def __init__(self, lengths: list[int], batches: list[int]):
        self.lengths, self._batch_sizes = lengths, batches

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> "BlockDiagonalMask":
        return cls(lengths, [1] * len(lengths))

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        lengths: list[int] = []
        for tensor in tensors:
            lengths += [tensor.shape[1]] * len(tensor)
        packed = torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)
        return cls(lengths, [len(tensor) for tensor in tensors]), packed

    def split(self, packed: Tensor) -> list[Tensor]:
        """(batch, N, …) of each of the batches, whose sequences are of one length."""
        parts, first, start = [], 0, 0
        for batch in self._batch_sizes:
            end = start + sum(self.lengths[first : first + batch])
            parts.append(packed[:, start:end].reshape(batch, -1, *packed.shape[2:]))
            first, start = first + batch, end
        return parts


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask | None = None
) -> Tensor:
    """(B, N, heads, d), in fp32: in bf16 PyTorch's takes up to twice as long on a CPU."""
    if attn_bias is None:
        by_head = [tensor.transpose(1, 2).float() for tensor in (query, key, value)]
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2).to(query.dtype)
    batches = zip(*(attn_bias.split(tensor) for tensor in (query, key, value)), strict=True)
    attended = [memory_efficient_attention(*batch) for batch in batches]
    return torch.cat([part.reshape(1, -1, *part.shape[2:]) for part in attended], dim=1)


def scaled_index_add(inputs: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    """`inputs` with alpha · scaling · source added at an index of the first dimension."""
    return inputs.index_add(0, index, source * scaling, alpha=alpha)


def index_select_cat(sources: list[Tensor], indices: list[Tensor]) -> Tensor:
    """Chosen rows of each, in one row."""
    pairs = zip(sources, indices, strict=True)
    return torch.cat([source.index_select(0, index).flatten() for source, index in pairs])
