"""A backbone for use elsewhere: as a timm state, a Hugging Face directory, or an ONNX file.

    dino export --weights runs/mine --to huggingface --out exported/
    dino export --weights dinov2_vits14_reg --to onnx --out exported/ --image-size 224 --half
    dino export --weights runs/mine --to huggingface --out exported/ --push me/my-backbone --license mit

A README.md, the model card, tells what is known of data, training and figures, and how the export is loaded. The
export's features are compared with this project's, by the library it is for, and the largest difference is printed,
with the image sizes that it serves. The libraries come with pip install -e ".[export]".
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dino.commands import common, hub
from dino.errors import UserError
from dino.files import write_text
from dino.models import Backbone, load_backbone
from dino.models.weights import export
from dino.report import card

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1  # of class tokens, whose deviation is about 1


def main() -> None:
    """Write a backbone for another library with its model card, compare their features, and send it if asked to.

    Raises:
        UserError: the format cannot hold this backbone, a library or a token is missing, or features differ.
    """
    options = common.parser(__doc__, weights={}, heads={}, out={"required": True, "help": "folder to write to"})
    options.add_argument("--to", required=True, choices=WRITERS)
    options.add_argument("--image-size", type=int, help="side in pixels; default: the weights' own")
    options.add_argument("--half", action="store_true", help="fp16 weights, images and features (onnx)")
    options.add_argument("--license", help="of the weights, for the model card: mit, apache-2.0, cc-by-4.0, other …")
    options.add_argument(
        "--push", metavar="REPO", help="send it to this repository of the Hugging Face Hub, OWNER/NAME"
    )
    options.add_argument("--public", action="store_true", help="a repository that --push makes is public, not private")
    arguments = options.parse_args()
    if arguments.half and arguments.to != "onnx":
        raise UserError("--half is for --to onnx; timm and transformers take fp16 when they load: torch_dtype, .half()")
    if arguments.push:
        hub.check(arguments.push)
    backbone = load_backbone(arguments.weights, arguments.heads)
    export.check(backbone, arguments.to)
    size, patch = arguments.image_size or backbone.preprocess.image_size, backbone.patch_size
    if size < 1 or size % patch:
        raise UserError(f"--image-size {size} is not divisible by the patch size {patch}")
    # Positions resampled as Meta's plain releases do it exist nowhere else, and in Hugging Face's library only the
    # models with registers resample as the register releases do: then the table is made for one size.
    is_fixed = backbone.has_patches and backbone.spec.position_interpolation == "offset"
    is_fixed |= arguments.to == "huggingface" and not backbone.spec.registers
    exported = export.at_size(backbone, size) if is_fixed else backbone
    if arguments.half:
        exported = copy.deepcopy(exported).half()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        features = WRITERS[arguments.to](exported, arguments.out, size)
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is needed for this: pip install "dino-pretrain[export]"') from error
    sizes = f"square images of {size} pixels only" if is_fixed else f"any size that patches of {patch} divide"
    print(f"{arguments.out}: {arguments.to}, {sizes}")
    if (levels := backbone.preprocess.levels).bits != "8":
        ends = levels.range or (0, 65535)
        print(f"it was trained with data.bits={levels.bits}: images are to be fractions of {ends[0]:g} to {ends[1]:g}")
    compare(backbone, features, [size] if is_fixed else [size, size + 4 * patch], arguments.half)
    place, on_hub = arguments.push or arguments.out.name, arguments.push is not None
    lines = card.snippet(arguments.to, place, on_hub)
    text = card.model_card(arguments.weights, backbone, arguments.to, place, lines, arguments.license)
    write_text(arguments.out / "README.md", text)
    if on_hub:
        print(hub.push(arguments.out, place, ["README.md", *FILES[arguments.to]], arguments.public))
    else:
        lines = card.snippet(arguments.to, str(arguments.out), on_hub)
    print(f"to load it:\n\n{lines}")


def write_timm(backbone: Backbone, out: Path, size: int) -> Callable[[Tensor], Tensor]:
    """model.safetensors, with config.json for `timm.create_model("local-dir:OUT", pretrained=True)` and arguments.json
    for timm's VisionTransformer."""
    import timm

    metadata = export.reloadable(backbone, size, "timm", mask_token=False)
    save_file(export.timm_state(backbone), out / "model.safetensors", metadata)
    write_json(out / "arguments.json", export.timm_arguments(backbone))
    write_json(out / "config.json", export.timm_config(backbone, size))
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    return model.eval().forward_features


def write_hugging_face(backbone: Backbone, out: Path, size: int) -> Callable[[Tensor], Tensor]:
    """A directory that `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained` open."""
    from transformers import AutoModel

    metadata = export.reloadable(backbone, size, "huggingface")
    save_file(export.hugging_face_state(backbone), out / "model.safetensors", metadata | {"format": "pt"})
    write_json(out / "config.json", export.hugging_face_config(backbone))
    write_json(out / "preprocessor_config.json", export.hugging_face_processor(backbone, size))
    model = AutoModel.from_pretrained(out).eval()
    return lambda images: model(images).last_hidden_state


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_onnx(backbone: Backbone, out: Path, size: int) -> Callable[[Tensor], Tensor]:
    """model.onnx, and model.onnx.data where the weights are too large for it."""
    import onnxruntime

    export.write_onnx(backbone, out / "model.onnx", size)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    dtype = next(backbone.parameters()).dtype
    return lambda images: torch.from_numpy(session.run(["class_token"], {"images": images.to(dtype).numpy()})[0])[
        :, None
    ]


@torch.no_grad()
def compare(backbone: Backbone, features: Callable[[Tensor], Tensor], sizes: list[int], half: bool) -> None:
    """Print the largest difference of class tokens, which come first in `features`, at each size.

    Raises:
        UserError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randn(3, backbone.spec.in_chans, size, size, generator=generator)
        difference = (features(images)[:, 0].float() - backbone(images)).abs().max().item()
        print(f"  at {size}×{size}: class tokens differ by at most {difference:.1e}")
        if not difference < (HALF_TOLERANCE if half else TOLERANCE):
            raise UserError(f"the export's features are others than this project's at {size}×{size}: do not use it")


FILES = {  # that each writes
    "timm": ["model.safetensors", "config.json", "arguments.json"],
    "huggingface": ["model.safetensors", "config.json", "preprocessor_config.json"],
    "onnx": ["model.onnx", "model.onnx.data"],
}
WRITERS = {"timm": write_timm, "huggingface": write_hugging_face, "onnx": write_onnx}
