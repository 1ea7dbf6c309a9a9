"""What can be set, as `--help` and `--help-json` say it."""

import contextlib
import dataclasses
import json
import sys

import pytest

from dino.commands import train
from dino.config.describe import describe, json_schema
from dino.config.read import get, leaves
from dino.config.schema import AUTO, Config, setting
from dino.methods import METHODS


@dataclasses.dataclass
class OtherSettings:
    """Of a method that is no DINO."""

    name: str = setting("other", "method of learning")
    queue: int = setting(7, "negatives that are kept", low=1, high=9)


def printed(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with contextlib.suppress(SystemExit):
        train.main()
    return capsys.readouterr().out


def test_help_says_key_type_bounds_default_and_meaning_of_every_setting(monkeypatch, capsys):
    text = printed(monkeypatch, capsys, "--help")
    assert describe(Config()) in text
    for key, leaf in leaves(Config()).items():
        assert f"  {key} (" in text
        assert leaf.metadata["meaning"] in text
    for line in (
        "train.batch_size (a whole number; at least 1; default 256)",
        "train.steps (a whole number or 'auto'; at least 1; default auto)",
        "optim.name (adamw | sgd | muon | lars; default adamw)",
        "objective.student_temperature (a number; above 0; default 0.1)",
        "views.global_size (a whole number; pixels; default 224)",
        "model.init (text or none; default none)",
    ):
        assert f"  {line}\n" in text


def test_help_of_a_method_shows_its_own_settings(monkeypatch, capsys):
    type("Other", (METHODS["dino"],), {"Settings": OtherSettings})  # registers itself
    text = printed(monkeypatch, capsys, "objective.name=other", "--help")
    assert "  objective.queue (a whole number; at least 1 and at most 9; default 7)" in text
    assert "objective.prototypes" not in text
    assert "objective.prototypes" in printed(monkeypatch, capsys, "--help")
    group = json.loads(printed(monkeypatch, capsys, "objective.name=other", "--help-json"))["properties"]["objective"]
    assert group["properties"].keys() == {"name", "queue"}


class TestJsonSchema:
    def test_is_valid_json_that_holds_every_setting_by_its_group(self, monkeypatch, capsys):
        schema = json.loads(printed(monkeypatch, capsys, "--help-json"), parse_constant=pytest.fail)  # no Infinity
        assert schema == json.loads(json.dumps(json_schema(Config())))
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        groups = schema["properties"]
        assert [f"{group}.{key}" for group in groups for key in groups[group]["properties"]] == [*leaves(Config())]
        assert all(group["additionalProperties"] is False for group in (schema, *groups.values()))

    def test_every_default_is_valid(self):
        properties = json_schema(Config())["properties"]
        for key in leaves(Config()):
            group, name = key.split(".")
            entry = properties[group]["properties"][name]
            assert entry["default"] == get(Config(), key)
            assert entry["description"]
            assert is_valid(entry["default"], entry), key

    @pytest.mark.parametrize(
        ("key", "valid", "invalid"),
        [
            ("train.batch_size", [1, 10**6], [0, 1.5, "many", None, AUTO, True]),
            ("train.steps", [1, AUTO], [0, 2.5, "soon", None]),
            ("optim.lr", [1, 0.1, AUTO], [0, -1, "fast"]),
            ("model.drop_path", [0, 0.99], [1, 1.0, -0.1, AUTO]),
            ("train.epochs", [0.5, 10**9], [0, AUTO]),
            ("model.init", [None, "runs/mine"], [1]),
            ("train.compile", [True, False], [1, "yes"]),
            ("views.preset", ["dino", "line_art"], ["dino2", None]),
            ("views.mean", [None, [0.5, 1]], [0.5, ["half"]]),
            ("views.std", [None, [0.5]], [[0.5, 0]]),
            ("tracking.backends", [[], ["wandb"]], ["wandb", [1]]),
            ("train.phases", [[], [{"begin": 0.5, "global_size": 12}]], [{"begin": 0.5}, [{"begin": "late"}]]),
        ],
    )
    def test_types_and_bounds_are_those_of_the_setting(self, key, valid, invalid):
        group, name = key.split(".")
        entry = json_schema(Config())["properties"][group]["properties"][name]
        assert [value for value in valid if not is_valid(value, entry)] == []
        assert [value for value in invalid if is_valid(value, entry)] == []


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
TYPES |= {"array": list, "object": dict}
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
}


def is_valid(value: object, schema: dict) -> bool:
    """What JSON Schema (draft 2020-12) says of a value, for the words that are used here; an unknown one fails."""
    unknown = schema.keys() - {"description", "default", "unit", "enum", "anyOf", "const", "type", "items", *LIMITS}
    assert unknown <= {"properties", "additionalProperties"}
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    if "anyOf" in schema:
        return any(is_valid(value, choice) for choice in schema["anyOf"])
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, list):
        return all(is_valid(entry, schema["items"]) for entry in value)
    if isinstance(value, dict):
        return all(is_valid(entry, schema["properties"][name]) for name, entry in value.items())
    return all(holds(value, schema[name]) for name, holds in LIMITS.items() if name in schema)
