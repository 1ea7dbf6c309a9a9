"""Parameter names of other libraries and this project's, which are DINOv2's: each table is read both ways."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

# Names of modules and parameters here and in Hugging Face's library: outside the blocks …
HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
# … and in a block: of Dinov2Model and Dinov2WithRegistersModel,
HUGGING_FACE_BLOCK = {
    "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
# of ViTModel where it differs,
VIT_MODEL_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# and of transformers 5, which is asked to keep the names of its modules; only read.
TRANSFORMERS_5_BLOCK = {
    "attn.query": "attention.q_proj",
    "attn.key": "attention.k_proj",
    "attn.value": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.w3": "mlp.down_proj",
}
JOINED = {  # one matrix here, several there
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}
TIMM_SWIGLU = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
BLOCK = re.compile(r"(?:blocks|encoder\.layer|layers)\.(\d+)\.(.+)")


def from_hugging_face(tensors: Mapping[str, Tensor]) -> State:
    """A state of Dinov2Model, Dinov2WithRegistersModel or ViTModel, with or without the names of transformers 5."""
    in_block = _inverse(HUGGING_FACE_BLOCK) | _inverse(VIT_MODEL_BLOCK) | _inverse(TRANSFORMERS_5_BLOCK)
    state = _renamed(tensors, blocks="blocks", outside=_inverse(HUGGING_FACE), in_block=in_block)
    for whole, parts in JOINED.items():
        for name in [name for name in state if f".{parts[0]}." in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if state.keys() >= set(names):
                state[name.replace(parts[0], whole)] = torch.cat([state.pop(part) for part in names])
    if "mask_token" in state:  # (1, 1, D) in a ViTModel
        state["mask_token"] = state["mask_token"].reshape(1, -1)
    return state


def to_hugging_face(state: Mapping[str, Tensor]) -> State:
    """A state of Dinov2Model or Dinov2WithRegistersModel."""
    parts: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip(JOINED["attn.qkv"], tensor.chunk(3), strict=True):
                parts[name.replace("attn.qkv", part)] = rows.clone()
        else:
            parts[name] = tensor
    return _renamed(parts, blocks="encoder.layer", outside=HUGGING_FACE, in_block=HUGGING_FACE_BLOCK)


def from_timm(tensors: Mapping[str, Tensor]) -> State:
    """timm's state of a ViT with SwiGLU or registers, which it packs otherwise than DINOv2; others are left alone."""
    state = dict(tensors)
    first, second = (tensors.get(f"blocks.0.mlp.fc{layer}.weight") for layer in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        state = _renamed(state, blocks="blocks", outside={}, in_block=_inverse(TIMM_SWIGLU))
    if "reg_token" in state:  # the class token holds its position already
        state["register_tokens"] = state.pop("reg_token")
        none = torch.zeros_like(state["pos_embed"][:, :1])
        state["pos_embed"] = torch.cat([none, state["pos_embed"]], dim=1)
    return state


def to_timm(state: Mapping[str, Tensor]) -> State:
    """timm has no mask token, and with registers adds the class token's position to it beforehand."""
    theirs = _renamed(state, blocks="blocks", outside={}, in_block=TIMM_SWIGLU)
    theirs.pop("mask_token", None)
    if "register_tokens" in theirs:
        theirs["reg_token"] = theirs.pop("register_tokens")
        theirs["cls_token"] = theirs["cls_token"] + theirs["pos_embed"][:, :1]
        theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    return theirs


def _renamed(
    tensors: Mapping[str, Tensor], *, blocks: str, outside: Mapping[str, str], in_block: Mapping[str, str]
) -> State:
    """Tensors under new names; a name that no table knows stays as it is.

    Args:
        blocks: what comes before the number of a block.
        outside, in_block: old and new names of modules and parameters.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if match := BLOCK.fullmatch(name):
            number, inside = match.groups()
            renamed[f"{blocks}.{number}.{_looked_up(inside, in_block)}"] = tensor
        else:
            renamed[_looked_up(name, outside)] = tensor
    return renamed


def _looked_up(name: str, table: Mapping[str, str]) -> str:
    """The new name of a parameter, by its own name or by that of its module."""
    module, _, parameter = name.rpartition(".")
    if module in table:
        return f"{table[module]}.{parameter}"
    return table.get(name, name)


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
