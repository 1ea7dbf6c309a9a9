"""What can be set, as `--help` prints it and as a JSON schema."""

import dataclasses
import typing
from typing import Any

from dino.config.bounds import bounds_text
from dino.config.read import Leaf, get, leaves
from dino.config.schema import AUTO

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
JSON_BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def describe(config: Any) -> str:
    """The table of keys that `--help` prints: key, type, unit, bounds, default, meaning."""
    lines = []
    for key, leaf in leaves(config).items():
        value = get(config, key)
        parts = [leaf.type_name, leaf.metadata["unit"], bounds_text(leaf)]
        parts.append(f"default {'none' if value is None else value}")
        lines.append(f"  {key} ({'; '.join(filter(None, parts))})\n      {leaf.metadata['meaning']}")
    return "\n".join(lines)


def json_schema(config: Any) -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of a config file, for editors and other programs."""
    properties: dict[str, Any] = {}
    for key, leaf in leaves(config).items():
        group, _, name = key.rpartition(".")
        entry = _entry(leaf, get(config, key))
        if group:
            empty = {"type": "object", "additionalProperties": False, "properties": {}}
            properties.setdefault(group, empty)["properties"][name] = entry
        else:
            properties[name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _entry(leaf: Leaf, default: Any) -> dict[str, Any]:
    limits = {JSON_BOUNDS[name]: value for name, value in leaf.metadata["bounds"].items() if _is_limit(value)}
    entry: dict[str, Any] = {"description": leaf.metadata["meaning"], "default": default}
    if leaf.metadata["unit"]:
        entry["unit"] = leaf.metadata["unit"]
    if leaf.choices:
        return entry | {"enum": list(leaf.choices)}
    if leaf.may_be_auto:
        given = [_json_type(kind, limits) for kind in leaf.types if kind is not str]
        return entry | {"anyOf": [*given, {"const": AUTO}]}
    kinds = [_json_type(kind, limits) for kind in leaf.types]
    return entry | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _is_limit(value: float | None) -> bool:
    return value is not None and value != float("inf")  # which JSON cannot say


def _json_type(kind: Any, limits: dict[str, Any]) -> dict[str, Any]:
    if kind in JSON_TYPES:
        return {"type": JSON_TYPES[kind], **(limits if kind in (int, float) else {})}
    entry = typing.get_args(kind)[-1]
    if typing.get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _json_type(entry, limits)}
    if not dataclasses.is_dataclass(entry):
        return {"type": "array", "items": _json_type(entry, limits)}
    fields = {name: _json_type(hint, {}) for name, hint in typing.get_type_hints(entry).items()}
    return {"type": "array", "items": {"type": "object", "properties": fields}}
