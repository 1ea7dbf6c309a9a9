"""The released weights that can be named: where they lie, what they are, under which licence. One line each."""

from dataclasses import dataclass, replace

from dino.models.backbone import Spec
from dino.models.preprocess import Preprocess
from dino.models.resnet import ResNetSpec
from dino.models.vit import ViTSpec
from dino.models.vit_family import SIZES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# All of them were evaluated so: the shorter side to 256 pixels, then the central 224.
PREPROCESS = Preprocess(224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
DINO, DINOV2 = "https://dl.fbaipublicfiles.com/dino", "https://dl.fbaipublicfiles.com/dinov2"
TORCHVISION = "https://download.pytorch.org/models"


@dataclass(frozen=True)
class Released:
    """One file of released weights.

    Attributes:
        url: of the file.
        spec: of the backbone in it.
        licence: of the weights.
        sha256: the first characters of the file's digest, where the publisher gives them, or, of DINO's and DINOv2's,
            who give none, where projects that do not depend on each other wrote the same down; empty: not known.
        has_heads: a full checkpoint, with student, teacher and their heads.
    """

    url: str
    spec: Spec
    licence: str = "Apache-2.0"
    sha256: str = ""
    has_heads: bool = False
    preprocess: Preprocess = PREPROCESS


def _dino(arch: str, patch_size: int) -> ViTSpec:
    size = SIZES[arch]
    return ViTSpec(*size, patch_size=patch_size, image_size=224, position_interpolation="offset")


def _dinov2(arch: str, registers: int = 0) -> ViTSpec:
    plain = ViTSpec(*SIZES[arch], patch_size=14, image_size=518, layer_scale=1.0, mask_token=True)
    plain = replace(plain, ffn="swiglu" if arch == "vit_giant2" else "mlp")
    # The two families resample positions differently, see ViTSpec.
    return replace(plain, registers=registers, position_interpolation="size" if registers else "offset")


# Of the files of the backbones alone; see `Released.sha256`.
DIGESTS = {
    "dino_vitb16": "bf34ad0f424b9029",
    "dinov2_vits14": "b938bf1bc15cd2ec",
    "dinov2_vitb14": "0b8b82f85de91b42",
    "dinov2_vitl14": "d5383ea8f4877b24",
    "dinov2_vitg14": "baf8467e50af2775",
    "dinov2_vits14_reg": "f433177089a68182",
    "dinov2_vitb14_reg": "73182a088cf94833",
    "dinov2_vitl14_reg": "36e4deffbaef061a",
    "dinov2_vitg14_reg": "746ecb8c6301c645",
}
RESNET50 = ResNetSpec("resnet50")
RELEASED = {
    "dino_vits16": Released(f"{DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", _dino("vit_small", 16)),
    "dino_vits8": Released(f"{DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", _dino("vit_small", 8)),
    "dino_vitb16": Released(f"{DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", _dino("vit_base", 16)),
    "dino_vitb8": Released(f"{DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", _dino("vit_base", 8)),
    "dino_resnet50": Released(f"{DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth", RESNET50),
    "dinov2_vits14": Released(f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth", _dinov2("vit_small")),
    "dinov2_vitb14": Released(f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth", _dinov2("vit_base")),
    "dinov2_vitl14": Released(f"{DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth", _dinov2("vit_large")),
    "dinov2_vitg14": Released(f"{DINOV2}/dinov2_vitg14/dinov2_vitg14_pretrain.pth", _dinov2("vit_giant2")),
    "dinov2_vits14_reg": Released(f"{DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", _dinov2("vit_small", 4)),
    "dinov2_vitb14_reg": Released(f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", _dinov2("vit_base", 4)),
    "dinov2_vitl14_reg": Released(f"{DINOV2}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", _dinov2("vit_large", 4)),
    "dinov2_vitg14_reg": Released(f"{DINOV2}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth", _dinov2("vit_giant2", 4)),
    # Supervised, for comparison.
    "resnet50": Released(f"{TORCHVISION}/resnet50-0676ba61.pth", RESNET50, "BSD-3-Clause", "0676ba61"),
}
RELEASED |= {name: replace(RELEASED[name], sha256=digest) for name, digest in DIGESTS.items()}
# Full checkpoints: student and teacher with their heads; `dino_vits16_full@student` names the student's backbone.
RELEASED |= {
    f"{name}_full": replace(
        entry, url=entry.url.replace("_pretrain.pth", "_pretrain_full_checkpoint.pth"), sha256="", has_heads=True
    )
    for name, entry in RELEASED.items()
    if name.startswith("dino_")
}
