"""Weights from strangers: what they claim is held against what is there before anything is built of it."""

import dataclasses
import math
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from dino.errors import UserError
from dino.files import shown
from dino.models.backbone import Backbone, Spec
from dino.models.registry import build

FRACTIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_TENSORS, LARGEST_HEADER = 20_000, 2**22  # of a file; bytes, of safetensors
MOST = 10_000_000  # of any number in a description


def some_of(names: Iterable[str]) -> str:
    """Up to three names for a message."""
    first = list(islice(names, 4))
    return f"{', '.join(shown(name[:100]) for name in first[:3])}{' …' if first[3:] else ''}"


def require_small_header(file: Path) -> None:
    """Raise `UserError` for a safetensors file that tells of more tensors, or more of them, than any network has."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > LARGEST_HEADER:
        raise UserError(f"{file} cannot be read as weights: its header would be of {length:,} bytes")


def require_packed(file: Path) -> None:
    """Raise `UserError` for a file of torch.save whose entries would unpack to more than the file has."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > MOST_TENSORS:
        raise UserError(f"{file} cannot be read as weights: no network has {len(entries):,} tensors")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > file.stat().st_size:
        raise UserError(f"{file} cannot be read as weights: it would unpack to {unpacked:,} bytes")


def require_sound(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `UserError` for tensors that are no plain arrays of numbers in a memory of that size."""
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{source}: {name} is no plain tensor ({tensor.layout} on {tensor.device})")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise UserError(f"{source}: {name} claims {tuple(tensor.shape)} of a memory of {storage.nbytes():,} bytes")
        storages[storage.data_ptr()] = storage.nbytes()
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 2 * sum(storages.values()) + 2**20:
        raise UserError(f"{source}: its tensors share their memory, {claimed:,} bytes of {sum(storages.values()):,}")


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `UserError` that names tensors with NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{source}: {len(broken)} tensor(s) hold NaN or infinity: {some_of(broken)}")


def built(spec: Spec, tensors: Mapping[str, Tensor], source: str) -> Backbone:
    """The backbone of a spec with random weights, built only where it has the tensors' names and shapes.

    Raises:
        UserError: names what is missing, unexpected, or of another shape.
    """
    depth = getattr(spec, "depth", 0)
    if depth > len(tensors):
        raise UserError(f"{source} does not fit the model: {depth:,} blocks of {len(tensors):,} tensors")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without numbers, which are refused
            expected = build(spec).state_dict()
    except (ValueError, ArithmeticError, RuntimeError, LookupError, TypeError) as error:
        raise UserError(f"{source} describes no backbone: {str(error).splitlines()[0]}") from error
    require_match(expected, tensors, source)
    if empty := [name for name, tensor in tensors.items() if not tensor.numel() and expected[name].ndim]:
        raise UserError(f"{source} describes no backbone: {empty[0]} would be empty")
    for name, tensor in tensors.items():
        if tensor.dtype not in FRACTIONS and tensor.dtype != expected[name].dtype:
            raise UserError(f"{source}: {name} is of {tensor.dtype}, which no weights are")
    require_finite(tensors, source)
    return build(spec)


def require_match(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `UserError` unless names and shapes are the same; it names what is missing, unexpected or of another."""
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    shapes = []
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            shapes.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} {what}: {some_of(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit the model, {'; '.join(problems)}")


def typed(kind: type, values: Any) -> Any:
    """A dataclass of values from a file, each of its field's type and within reason.

    Raises:
        ValueError: names the value that is not.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is no mapping")
    hints = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"'{name}' is not known")
        if not is_of(hints[name], value):
            raise ValueError(f"{name} cannot be {str(value)[:100]!r}")
    return kind(**values)


def is_of(hint: Any, value: Any) -> bool:
    """Whether a value from JSON is of a type: bool, int, float, str or a choice; numbers are finite and from 0 on."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= MOST
    return type(value) is hint and (hint is not int or 0 <= value <= MOST) and (hint is not str or len(value) < 100)
