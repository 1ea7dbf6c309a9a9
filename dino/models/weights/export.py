"""A ViT for other libraries: timm's and Hugging Face's names, and ONNX.

Plain releases (`position_interpolation="offset"`) resample their positions as neither of the two does, and ONNX freezes
the factor: for them the table is resampled here, once, and the export serves that image size alone. Exports of the
others, which ask for the exact grid, serve every size that patches divide.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.errors import UserError
from dino.models.backbone import Backbone
from dino.models.positions import interpolate_positions
from dino.models.preprocess import Preprocess
from dino.models.registry import build, family_of
from dino.models.weights import names
from dino.models.weights.facts import describe

LARGEST_ONNX = 1.9e9  # bytes of weights that go into the file itself; Protocol Buffers end at 2 GiB


def check(backbone: Backbone, target: str) -> None:
    """Refuse what a target (`timm`, `huggingface`, `onnx`) cannot hold.

    Raises:
        UserError: with the reason.
    """
    if not backbone.has_patches:
        if target == "onnx":
            return
        title = family_of(backbone.spec).title
        raise UserError(
            f"this is a {title}, which needs no export to {target}: its parameters have torchvision's names already"
        )
    spec = backbone.spec
    if spec.positions == "rotary" and target != "onnx":
        raise UserError(f"{target} has no model that rotates queries and keys as model.positions=rotary does: use onnx")
    if spec.stem == "conv" and target != "onnx":
        raise UserError(f"{target} has no ViT with the convolutional stem of model.stem=conv: use onnx")


def at_size(backbone: Backbone, image_size: int) -> Backbone:
    """The same network with its position table resampled for square images of `image_size` pixels."""
    if image_size % backbone.patch_size:
        raise UserError(f"image size {image_size} is not divisible by the patch size {backbone.patch_size}")
    side, spec = image_size // backbone.patch_size, backbone.spec
    if spec.positions != "learned":
        return backbone  # which any size needs no change for
    state = dict(backbone.state_dict())
    state["pos_embed"] = interpolate_positions(
        state["pos_embed"], (side, side), backbone.spec.position_interpolation
    ).clone()
    resized = build(replace(backbone.spec, image_size=image_size))
    resized.load_state_dict(state)
    resized.preprocess, resized.description = backbone.preprocess, backbone.description
    return resized.eval()


def timm_state(backbone: Backbone) -> dict[str, Tensor]:
    """Tensors under timm's names."""
    return {name: tensor.contiguous() for name, tensor in names.to_timm(backbone.state_dict()).items()}


def timm_arguments(backbone: Backbone) -> dict[str, Any]:
    """What `timm.models.vision_transformer.VisionTransformer(**…)` takes to hold them."""
    spec = backbone.spec
    arguments: dict[str, Any] = {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.in_chans,
        "num_classes": 0,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "init_values": spec.layer_scale or None,
        "reg_tokens": spec.registers,
        "no_embed_class": bool(spec.registers),
        "dynamic_img_size": True,
    }
    if spec.ffn == "swiglu":
        hidden = backbone.state_dict()["blocks.0.mlp.w3.weight"].shape[1]
        arguments |= {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "mlp_ratio": 2 * hidden / spec.embed_dim}
    return arguments


def timm_config(backbone: Backbone, size: int) -> dict[str, Any]:
    """The config.json with which `timm.create_model("local-dir:…")` and `"hf-hub:…"` open model.safetensors."""
    arguments, preprocess = timm_arguments(backbone), preprocess_at(backbone, size)
    architecture = "vit_base_patch16_224"  # of which the arguments change everything, but for what no JSON can say
    if "mlp_layer" in arguments:
        architecture = "vit_giant_patch14_reg4_dinov2"
        del arguments["mlp_layer"], arguments["act_layer"]
    return {
        "architecture": architecture,
        "num_classes": arguments.pop("num_classes"),
        "num_features": backbone.spec.embed_dim,
        "global_pool": "token",
        "model_args": arguments | {"global_pool": "token"},
        "pretrained_cfg": {
            "input_size": [backbone.spec.in_chans, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": size / (preprocess.resize or size),
            "crop_mode": "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def hugging_face_state(backbone: Backbone) -> dict[str, Tensor]:
    """Tensors under the names of Dinov2Model or Dinov2WithRegistersModel; LayerScale is 1 where there is none.

    ViTModel would do without, but has a pooler of random weights in what `pooler_output` gives.
    """
    spec, ours = backbone.spec, dict(backbone.state_dict())
    ours.setdefault("mask_token", torch.zeros(1, spec.embed_dim))
    for block in range(spec.depth):
        for scale in ("ls1", "ls2"):
            ours.setdefault(f"blocks.{block}.{scale}.gamma", torch.ones(spec.embed_dim))
    return {name: tensor.contiguous() for name, tensor in names.to_hugging_face(ours).items()}


def hugging_face_config(backbone: Backbone) -> dict[str, Any]:
    """The config.json that `from_pretrained` reads."""
    spec = backbone.spec
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": ["Dinov2WithRegistersModel" if spec.registers else "Dinov2Model"],
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "num_channels": spec.in_chans,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "mlp_ratio": round(spec.mlp_ratio),
        "use_swiglu_ffn": spec.ffn == "swiglu",
        "layerscale_value": spec.layer_scale or 1.0,
    }
    return config | ({"num_register_tokens": spec.registers} if spec.registers else {"use_mask_token": True})


def preprocess_at(backbone: Backbone, size: int) -> Preprocess:
    """What the weights expect, for crops of another size: before them images are as much larger as they were."""
    own = backbone.preprocess
    resize = None if own.resize is None else round(own.resize * size / own.image_size)
    return replace(own, image_size=size, resize=resize)


def hugging_face_processor(backbone: Backbone, size: int) -> dict[str, Any]:
    """The preprocessor_config.json that `AutoImageProcessor.from_pretrained` reads."""
    preprocess = preprocess_at(backbone, size)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": backbone.spec.in_chans == 3,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.resize or size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def reloadable(backbone: Backbone, size: int, layout: str, **changed: Any) -> dict[str, str]:
    """Metadata by which this project reads an export back as the network that it was; see `describe`."""
    preprocess = preprocess_at(backbone, size)
    preprocessing = {"image_size": size, "mean": list(preprocess.mean), "std": list(preprocess.std)}
    if preprocess.resize is not None:
        preprocessing["resize"] = preprocess.resize
    return describe(backbone, preprocessing, backbone.description.get("training", {}), layout, **changed)


class ForOnnx(nn.Module):
    """(B, C, H, W), preprocessed, to class tokens (B, D) and patch tokens (B, N, D)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.forward_features(images)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]


def write_onnx(backbone: Backbone, file: Path, image_size: int) -> None:
    """An ONNX file with a dynamic batch, and dynamic sizes where the position convention has them.

    An ONNX file holds at most 2 GB: the weights of a larger network lie beside it, in `model.onnx.data`. Images and
    tokens are of the type of the backbone's parameters.

    Args:
        image_size: side of the square images it serves; where sizes are dynamic, of those it is traced with.
    """
    dtype = next(backbone.parameters()).dtype
    images = torch.randn(2, backbone.spec.in_chans, image_size, image_size, dtype=dtype)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=4096)}
    if not backbone.has_patches or backbone.spec.position_interpolation == "size":
        # Traced at another grid than the table's own, for which nothing would be resampled; and not at a square one.
        patch, (rows, columns) = backbone.patch_size, (torch.export.Dim(name, min=2, max=1024) for name in ("h", "w"))
        images = torch.randn(2, backbone.spec.in_chans, image_size + patch, image_size + 2 * patch, dtype=dtype)
        sizes |= {2: patch * rows, 3: patch * columns}
    torch.onnx.export(
        ForOnnx(backbone).eval(),
        (images,),
        str(file),
        input_names=["images"],
        output_names=["class_token", "patch_tokens"],
        dynamic_shapes={"images": sizes},
        dynamo=True,
        verbose=False,
        external_data=_bytes(backbone) > LARGEST_ONNX,
    )


def _bytes(backbone: Backbone) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
