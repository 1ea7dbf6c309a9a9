"""The official DINO, from the user's own clone of facebookresearch/dino; for peer_loops.py."""

import argparse
from collections.abc import Callable

import torch
from kit import official
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop

Step = Callable[[list[Tensor]], None]


def dino_transform(arguments: argparse.Namespace) -> Callable[..., list[Tensor]]:
    """main_dino.py's, whose sizes are written into it: they become ours."""
    made = official(arguments.official, "main_dino").DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 6)
    for transform in (made.global_transfo1, made.global_transfo2, made.local_transfo):
        side = arguments.local if transform is made.local_transfo else arguments.size
        for part in transform.transforms:
            if isinstance(part, RandomResizedCrop):
                part.size = (side, side)
    return made


def dino_loop(arguments: argparse.Namespace, steps: int) -> tuple[Step, nn.Module]:
    """main_dino.py with its defaults but for 4,096 prototypes: AdamW at 0.0005 · batch / 256, momentum 0.996 to 1."""
    main, utils = official(arguments.official, "main_dino"), official(arguments.official, "utils")
    vits = official(arguments.official, "vision_transformer")
    prototypes, epochs = 4096, 100  # the loss looks its temperature up by epoch: a hundredth of the run

    def network() -> nn.Module:
        vit = vits.VisionTransformer(
            [arguments.size],
            arguments.patch,
            embed_dim=arguments.width,
            depth=arguments.depth,
            num_heads=arguments.heads,
            qkv_bias=True,
            norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        )
        return utils.MultiCropWrapper(vit, vits.DINOHead(arguments.width, prototypes))

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = main.DINOLoss(prototypes, 8, 0.04, 0.04, 0, epochs)
    criterion.update_center = lambda output: _center(criterion, output)  # without the process group that it asks for
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    schedule = {"niter_per_ep": 1}
    rates = utils.cosine_scheduler(0.0005 * arguments.batch / 256, 1e-6, steps, **schedule, warmup_epochs=steps // 10)
    decays = utils.cosine_scheduler(0.04, 0.4, steps, **schedule)
    momenta = utils.cosine_scheduler(0.996, 1, steps, **schedule)
    taken = 0

    def step(views: list[Tensor]) -> None:
        nonlocal taken
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = rates[taken]
            if number == 0:
                group["weight_decay"] = decays[taken]
        criterion(student(views), teacher(views[:2]), taken * epochs // steps).backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(taken * epochs // steps, student, 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, average in zip(student.parameters(), teacher.parameters(), strict=True):
                average.mul_(momenta[taken]).add_((1 - momenta[taken]) * mine.detach())
        taken += 1

    return step, teacher.backbone


@torch.no_grad()
def _center(criterion: nn.Module, output: Tensor) -> None:
    criterion.center = 0.9 * criterion.center + 0.1 * output.mean(0, keepdim=True)
