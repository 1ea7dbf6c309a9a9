"""lightly's DINO and DINOv2 (MIT), in the loops that its documentation has; for peer_loops.py.

Its examples' settings; what a small network cannot have from them is said at each loop.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead, DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule, linear_warmup_schedule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Step = Callable[[list[Tensor]], None]


def new_vit(arguments: argparse.Namespace, layer_scale: float | None = None) -> VisionTransformer:
    """timm's ViT, which lightly's users train."""
    return VisionTransformer(
        img_size=arguments.size,
        patch_size=arguments.patch,
        embed_dim=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
        num_classes=0,
        init_values=layer_scale,
        dynamic_img_size=True,
    )


def dino_transform(arguments: argparse.Namespace) -> Callable[..., list[Tensor]]:
    return DINOTransform(global_crop_size=arguments.size, local_crop_size=arguments.local, n_local_views=6)


def dino_loop(arguments: argparse.Namespace, steps: int) -> tuple[Step, nn.Module]:
    """Adam at 0.001, 2,048 prototypes, a bottleneck of 64, momentum 0.996 to 1."""
    head = DINOProjectionHead(arguments.width, 512, 64, 2048, freeze_last_layer=1)
    student = nn.ModuleList([new_vit(arguments), head])
    teacher = nn.ModuleList([copy.deepcopy(student[0]), DINOProjectionHead(arguments.width, 512, 64, 2048)])
    teacher.requires_grad_(False)
    criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.001)
    taken = 0

    def step(views: list[Tensor]) -> None:
        nonlocal taken
        momentum = cosine_schedule(taken, steps, 0.996, 1.0)
        for mine, average in zip(student, teacher, strict=True):
            update_momentum(mine, average, m=momentum)
        with torch.no_grad():
            targets = [teacher[1](teacher[0](view)) for view in views[:2]]
        outputs = [student[1](student[0](view)) for view in views]
        epoch = taken * arguments.batch // arguments.count
        criterion(targets, outputs, epoch=epoch).backward()
        student[1].cancel_last_layer_gradients(current_epoch=epoch)
        optimizer.step()
        optimizer.zero_grad()
        taken += 1

    return step, teacher[0]


def dinov2_transform(arguments: argparse.Namespace) -> Callable[..., list[Tensor]]:
    return DINOTransform(
        global_crop_size=arguments.size,
        local_crop_size=arguments.local,
        global_crop_scale=(0.32, 1),
        local_crop_scale=(0.05, 0.32),
        n_local_views=8,
    )


def dinov2_loop(arguments: argparse.Namespace, steps: int) -> tuple[Step, nn.Module]:
    """AdamW at 0.001, decay 0.04 to 0.4, momentum 0.992 to 1, one head; 4,096 prototypes instead of 65,536."""
    prototypes = 4096
    backbone = MaskedVisionTransformerTIMM(
        vit=new_vit(arguments, layer_scale=1e-5), antialias=False, pos_embed_initialization="skip"
    )
    student = nn.ModuleList([backbone, DINOv2ProjectionHead(arguments.width, output_dim=prototypes)])
    teacher = nn.ModuleList([copy.deepcopy(backbone), DINOv2ProjectionHead(arguments.width, output_dim=prototypes)])
    update_drop_path_rate(backbone.vit, drop_path_rate=0.1, mode="uniform")
    teacher.requires_grad_(False).eval()
    dino_loss, ibot_loss, koleo_loss = DINOLoss(prototypes), IBOTPatchLoss(prototypes), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.001)
    rows, columns = backbone.vit.patch_embed.grid_size
    taken = 0

    def step(views: list[Tensor]) -> None:
        nonlocal taken
        whole, local = torch.cat(views[:2]), torch.cat(views[2:])
        patches = random_block_mask(size=(len(whole), rows, columns))
        masked = torch.cat([torch.zeros(len(whole), 1, dtype=torch.bool), patches.flatten(1)], dim=1)
        with torch.no_grad():
            tokens = teacher[0].encode(whole)
            target, patch_target = teacher[1](tokens[:, 0]), teacher[1](tokens[masked])
        tokens = student[0].encode(whole, mask=masked)
        outputs = student[1](torch.cat([tokens[:, 0], student[0].encode(local)[:, 0]]))
        temperature = linear_warmup_schedule(taken, int(0.6 * steps), 0.04, 0.07)
        loss = dino_loss(target.chunk(2), outputs.chunk(len(views)), teacher_temp=temperature)
        loss += ibot_loss(patch_target, student[1](tokens[masked]), mask=patches, teacher_temp=temperature)
        loss += 0.1 * sum(koleo_loss(half) for half in tokens[:, 0].chunk(2))
        loss.backward()
        for group in optimizer.param_groups:
            group["weight_decay"] = cosine_schedule(taken, steps, 0.04, 0.4)
        optimizer.step()
        optimizer.zero_grad()
        momentum = cosine_schedule(taken, steps, 0.992, 1.0)
        for mine, average in zip(student, teacher, strict=True):
            update_momentum(mine, average, m=momentum)
        taken += 1

    return step, teacher[0].vit
