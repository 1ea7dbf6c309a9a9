"""Reads and checks settings: the defaults of a schema, then a YAML file, then `key=value` arguments."""

import copy
import dataclasses
import difflib
import functools
import logging
import os
import re
import reprlib
import stat
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino.config import plain_yaml
from dino.config.recipes import recipe_path
from dino.config.schema import AUTO, CHOICES, method_settings
from dino.errors import UserError
from dino.files import shown

Tree = TypeVar("Tree")
LARGEST_FILE = 200_000  # bytes of a config
MOST_ERRORS = 20  # that are listed
ROOT = "data.root"  # of which there may be several, kept as one text
METHOD = "objective.name"  # the setting that chooses the class of its group
REMOVED = {"views.backend": "device"}  # settings of earlier versions, with the value that asked for what is done now
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
logger = logging.getLogger(__name__)


class Leaf(NamedTuple):
    """One setting of a tree.

    Attributes:
        key: `group.key`.
        types: what its value may be: `int`, `str`, `NoneType`, `list[float]` …
        metadata: what `dino.config.schema.setting` says of it.
    """

    key: str
    types: tuple[Any, ...]
    metadata: Mapping[str, Any]

    @property
    def choices(self) -> tuple[str, ...]:
        """The names it may have; none where it is no name."""
        return self.metadata["choices"] or tuple(CHOICES.get(self.key, ()))

    @property
    def may_be_auto(self) -> bool:
        """Whether it is a number or numbers, or `auto` until it is resolved."""
        return str in self.types and any(kind in self.types for kind in (int, float, list[float]))

    @property
    def type_name(self) -> str:
        """What may stand there, in words."""
        if self.choices:
            return " | ".join(self.choices)
        if self.may_be_auto:
            return f"{_type_name(self.types[0])} or '{AUTO}'"
        return " or ".join(_type_name(kind) for kind in self.types)


def _type_name(kind: Any) -> str:
    if kind in TYPE_NAMES:
        return TYPE_NAMES[kind]
    entry = typing.get_args(kind)[-1]
    if dataclasses.is_dataclass(entry):
        return f"a list of {{{', '.join(field.name for field in dataclasses.fields(entry))}}}"
    entries = {str: "texts", int: "whole numbers", float: "numbers"}[entry]
    return f"{{name: …}} of {entries}" if typing.get_origin(kind) is dict else f"a list of {entries}"


def leaves(config: Any) -> dict[str, Leaf]:
    """Every setting of a tree by its key, in the order of its file."""
    settings = {}
    for group in dataclasses.fields(config):
        value = getattr(config, group.name)
        if not dataclasses.is_dataclass(value):
            settings[group.name] = _leaf(group.name, typing.get_type_hints(type(config))[group.name], group)
            continue
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            settings[f"{group.name}.{field.name}"] = _leaf(f"{group.name}.{field.name}", hints[field.name], field)
    return settings


def _leaf(key: str, hint: Any, field: dataclasses.Field) -> Leaf:
    is_container = typing.get_origin(hint) in (list, dict)
    alternatives = () if is_container else typing.get_args(hint)
    return Leaf(key, alternatives or (hint,), field.metadata)


def get(config: Any, key: str) -> Any:
    """The value of `group.key`."""
    return functools.reduce(getattr, key.split("."), config)


def assign(config: Any, key: str, value: Any) -> None:
    """Set `group.key`."""
    *groups, name = key.split(".")
    setattr(functools.reduce(getattr, groups, config), name, value)


def read(schema: type[Tree], path: str | Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Tree:
    """Settings of a tree of dataclasses. Whether values can work is not looked at: see `bounds.py`.

    Args:
        schema: the tree's class.
        path: a YAML file, or a recipe's name.
        overrides: `key=value` texts of a command line, or values by key; they take precedence over the file.

    Raises:
        UserError: unreadable YAML, unknown key (with the nearest valid one), or wrong type; all are listed at once.
    """
    path = recipe_path(path) if path else None
    given = _renamed(dict(_read_yaml(path, schema)) if path else {}, schema, str(path))
    texts: dict[str, str] = {}
    if isinstance(overrides, Mapping):
        given |= _renamed(dict(overrides), schema, "")
    else:
        texts = _renamed(dict(map(_key_and_text, overrides)), schema, "")
    tree = _with_method(schema(), texts.get(METHOD, given.get(METHOD)))
    settings = leaves(tree)
    given |= {key: _parse(text, settings[key]) if key in settings else text for key, text in texts.items()}
    config = OmegaConf.structured(tree)
    errors: list[str] = []
    for key, value in given.items():
        if len(errors) == MOST_ERRORS:
            errors.append("… and perhaps others")
            break
        if key in REMOVED:
            errors.append(f"{key}={value} cannot be had any more, only what was {key}={REMOVED[key]}: leave it out")
            continue
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=1, cutoff=0.3)
            errors.append(f"unknown key '{shown(key[:100])}'" + (f"; did you mean '{near[0]}'?" if near else ""))
            continue
        if key == ROOT and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            value = yaml.safe_dump(list(value), default_flow_style=True, width=10**6, allow_unicode=True).strip()
        if _is_reference(value, settings[key]):
            errors.append(f"{key} must be {settings[key].type_name}, got {reprlib.repr(value)}")
            continue
        try:
            OmegaConf.update(config, key, _number(value) if float in settings[key].types else as_text(value))
            OmegaConf.select(config, key, throw_on_missing=True)  # ??? means something to OmegaConf
        except OmegaConfBaseException:
            errors.append(f"{key} must be {settings[key].type_name}, got {reprlib.repr(value)}")
    refuse(errors)
    return cast(Tree, OmegaConf.to_object(config))


def _is_reference(value: Any, leaf: Leaf) -> bool:
    """Whether a value has `${…}`, which OmegaConf would look up, where no text may stand."""
    if isinstance(value, str):
        return "${" in value and (str not in leaf.types or leaf.may_be_auto)
    if any(str in typing.get_args(kind)[-1:] for kind in leaf.types):
        return False
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any("${" in str(entry) for entry in entries)


def dump(config: Any) -> str:
    """`config` as YAML that `read` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def as_text(value: Any) -> Any:
    """A value in which `${…}`, which OmegaConf would look up, in the environment too, is text like any other.

    A leading `~/` is the home directory: shells leave it alone after a `=`.
    """
    if isinstance(value, str):
        value = os.path.expanduser(value) if value.startswith("~/") else value
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: as_text(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(entry) for entry in value]
    return value


def follow(config: Tree, values: Mapping[str, object], source: str) -> tuple[Tree, dict[str, str]]:
    """Take over what `source`, weights that exist, decides.

    Returns:
        The config, and the reason of each setting.

    Raises:
        UserError: a setting that is not at its default says otherwise.
    """
    followed, blank = copy.deepcopy(config), type(config)()
    for key, value in values.items():
        given = get(config, key)
        if given not in (get(blank, key), value):
            raise UserError(f"{key}={given}, but {source} has {value}: leave {key} out")
        assign(followed, key, value)
    return followed, dict.fromkeys(values, f"of {source}")


def refuse(errors: list[str]) -> None:
    """Raise a `UserError` that lists what is wrong, if anything is."""
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        raise UserError("\n  ".join([f"{len(errors)} settings cannot be used:", *errors]))


def _with_method(tree: Tree, name: Any) -> Tree:
    """The tree with the settings of the method that is asked for; an unknown name is told with the other choices."""
    if hasattr(tree, "objective") and isinstance(name, str) and name in CHOICES["objective.name"]:
        tree.objective = method_settings(name)
    return tree


def _renamed(given: dict[str, Any], schema: Any, source: str) -> dict[str, Any]:
    """Settings under the keys and names that they have now; says so where a person may have written the old ones."""
    names = {}
    for key, leaf in leaves(_with_method(schema(), given.get(METHOD))).items():
        if leaf.metadata["was"]:
            names[leaf.metadata["was"]] = key
        new_names = leaf.metadata["new_names"]
        for old_key in (key, leaf.metadata["was"]):
            if isinstance(given.get(old_key), str) and given[old_key] in new_names:
                names[f"{old_key}={given[old_key]}"] = f"{key}={new_names[given[old_key]]}"
                given = given | {old_key: new_names[given[old_key]]}
    for old, new in names.items():
        if old in given or "=" in old:
            logger.info("%s%s is called %s now", f"{source}: " if source else "", old, new)
    given = {names.get(key, key): value for key, value in given.items()}
    return {key: value for key, value in given.items() if REMOVED.get(key, given) != value}


def _key_and_text(argument: str) -> tuple[str, str]:
    key, separator, text = argument.partition("=")
    if not separator:
        raise UserError(
            f"'{shown(argument[:100])}' is not a setting: write key=value, for example train.batch_size=128"
        )
    return key.strip(), text


def _read_yaml(path: str | Path, schema: Any) -> Iterator[tuple[str, Any]]:
    try:
        tree = plain_yaml.load(_text_of(Path(path)))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {plain_yaml.reason(error)}") from error
    if tree is None:
        return
    groups = {field.name for field in dataclasses.fields(schema)}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold groups of settings ({', '.join(sorted(groups))}), not {type(tree).__name__}")
    for group, settings in tree.items():
        if settings is None and group in groups:
            continue  # all of its lines are commented out
        if isinstance(settings, dict):
            yield from ((f"{group}.{key}", value) for key, value in settings.items())
        else:
            yield str(group), settings


def _text_of(path: Path) -> str:
    """The text of a config.

    Raises:
        UserError: it is no ordinary file, or larger than any config.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        what = "no ordinary file" if not stat.S_ISREG(status.st_mode) else f"larger than {LARGEST_FILE:,} bytes"
        raise UserError(f"cannot read the config {path}: it is {what}")
    return path.read_text(encoding="utf-8")


def _parse(text: str, leaf: Leaf) -> Any:
    """A `key=value` argument's value: text as it stands where text is wanted, else YAML's reading of it."""
    if str in leaf.types and not leaf.may_be_auto:
        return None if text.lower() in ("none", "null") and type(None) in leaf.types else text
    try:
        value = plain_yaml.load(text)
    except yaml.YAMLError:
        return text
    return None if isinstance(value, str) and value.lower() == "none" else value


def _number(value: Any) -> Any:
    """1e-3 and 1 as the fractions that they are meant as; YAML 1.1 takes the first for text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value
