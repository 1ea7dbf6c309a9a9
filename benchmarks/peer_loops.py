"""One training run of a peer, in its own documented loop, for a number of minutes; run by peers.py.

    python benchmarks/peer_loops.py lightly-dino --images FOLDER --minutes 5 --out FILE --size 32 --patch 4 …

To be run by a Python that has the peer (`pip install lightly`) and this project. The peer brings its loss, head, views
and the settings that its documentation trains with; the network is a ViT of the same width, depth and patches as ours,
and schedules are as long as the minutes allow, which a few steps tell. One thread: its CPU time counts.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kit import official
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dino.data import open_images
from dino.models import VisionTransformer, ViTSpec
from dino.models.weights import save_backbone

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # both peers normalise by ImageNet's
PILOT = 8  # steps that tell how many fit into the minutes

Step = Callable[[list[Tensor]], None]
Loop = tuple[Step, nn.Module]  # and the network whose backbone is the result


class Pictures(torch.utils.data.Dataset):
    """The images of a folder as three-channel pictures, through a peer's transform."""

    def __init__(self, folder: str, transform: Callable[..., list[Tensor]]):
        from torchvision.transforms.functional import to_pil_image

        pool = open_images(folder)
        pictures = (pool.read(index) for index in range(len(pool.names)))
        self.pictures = [to_pil_image(picture).convert("RGB") for picture in pictures]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.pictures[index])


def new_vit(arguments: argparse.Namespace) -> nn.Module:
    """timm's ViT, which lightly's users train."""
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    return TimmViT(
        img_size=arguments.size,
        patch_size=arguments.patch,
        embed_dim=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
        num_classes=0,
        dynamic_img_size=True,
    )


def lightly_transform(arguments: argparse.Namespace) -> Callable[..., list[Tensor]]:
    from lightly.transforms.dino_transform import DINOTransform

    return DINOTransform(global_crop_size=arguments.size, local_crop_size=arguments.local, n_local_views=6)


def lightly_dino(arguments: argparse.Namespace, steps: int) -> Loop:
    """lightly's DINO: Adam at 0.001, 2,048 prototypes, a bottleneck of 64, momentum 0.996 to 1."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.utils.scheduler import cosine_schedule

    student = nn.ModuleList(
        [new_vit(arguments), DINOProjectionHead(arguments.width, 512, 64, 2048, freeze_last_layer=1)]
    )
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


def official_transform(arguments: argparse.Namespace) -> Callable[..., list[Tensor]]:
    """main_dino.py's, whose sizes are written into it: its crops are resized to ours."""
    from torchvision.transforms import RandomResizedCrop

    made = official(arguments.official, "main_dino").DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 6)
    for transform, side in ((made.global_transfo1, arguments.size), (made.global_transfo2, arguments.size)):
        _resize(transform, side, RandomResizedCrop)
    _resize(made.local_transfo, arguments.local, RandomResizedCrop)
    return made


def _resize(transform: object, side: int, kind: type) -> None:
    for part in transform.transforms:  # type: ignore[attr-defined]
        if isinstance(part, kind):
            part.size = (side, side)


def official_dino(arguments: argparse.Namespace, steps: int) -> Loop:
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


LOOPS = {"lightly-dino": (lightly_transform, lightly_dino), "official-dino": (official_transform, official_dino)}


def batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    new_transform, new_loop = LOOPS[arguments.peer]
    pictures = Pictures(arguments.images, new_transform(arguments))
    arguments.count = len(pictures)
    views = batches(DataLoader(pictures, arguments.batch, shuffle=True, drop_last=True))
    pilot, _ = new_loop(arguments, PILOT + 2)
    for number in range(PILOT + 2):
        if number == 2:
            began = time.process_time()
        pilot(next(views))
    seconds = (time.process_time() - began) / PILOT
    steps = max(10, int(60 * arguments.minutes / seconds))
    step, backbone = new_loop(arguments, steps)
    began = time.process_time()
    for _ in range(steps):
        step(next(views))
    minutes = (time.process_time() - began) / 60
    spec = ViTSpec(
        arguments.width,
        arguments.depth,
        arguments.heads,
        arguments.patch,
        arguments.size,
        position_interpolation="offset",
    )
    result = VisionTransformer(spec)
    result.load_state_dict(backbone.state_dict())  # official and timm's names are the same
    facts = {"steps": steps, "minutes": minutes, "peer": arguments.peer, "initialisation": "published"}
    save_backbone(arguments.out, result, {"image_size": arguments.size, "mean": MEAN, "std": STD}, facts)
    print(f"{steps} steps of {arguments.batch} in {minutes:.2f} minutes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=LOOPS)
    parser.add_argument("--images", required=True, help="folder or zip archive")
    parser.add_argument("--minutes", type=float, required=True, help="of CPU time of one thread")
    parser.add_argument("--out", type=Path, required=True, help="file of the backbone, in this project's format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    for name, default in (("size", 32), ("local", 16), ("patch", 4), ("width", 192), ("depth", 4), ("heads", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--official", metavar="DIR", help="your clone of facebookresearch/dino")
    return parser.parse_args()


if __name__ == "__main__":
    main()
