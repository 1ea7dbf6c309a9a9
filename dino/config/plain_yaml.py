"""YAML as settings need it: values that stand where they are read, nothing that grows, repeats or runs."""

from collections.abc import Hashable
from typing import Any

import yaml

from dino.files import shown

DEEPEST = 20  # lists and groups inside one another


class PlainLoader(yaml.SafeLoader):
    """A safe loader without aliases, dates, keys that come twice, and depths that only an attack has."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not understood here", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, f"more than {DEEPEST} levels deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# A date is text like any other: no setting is one, and impossible ones are errors of Python's, not of YAML's.
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not YAML, or not plain.
    """
    try:
        return yaml.load(text, PlainLoader)
    except (
        ValueError,
        RecursionError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # a tag that its value does not fit, an endless number
        raise yaml.YAMLError(str(error)) from error


def reason(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8: save it as UTF-8 text"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{shown(str(error.problem)[:300])} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())
