"""What a setting is: a dataclass field that says what it means and what may stand in it."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

AUTO = "auto"
T = TypeVar("T")

# A setting that may be `auto` until `dino.config.auto` has resolved it. Everything after that sees a number, so that is
# what the type says; only the reader, which asks at run time, is told that text is possible.
if TYPE_CHECKING:
    Auto = Annotated[T, AUTO]
else:

    class Auto:
        """`Auto[int]` is `int | str` at run time."""

        def __class_getitem__(cls, kind: type) -> Any:
            return kind | str


# Names that a setting may have where these are those of a table: the room that owns the table puts it here. What is in
# the table of `objective.name` has its settings as `Settings`.
CHOICES: dict[str, Any] = {}


def setting(
    default: Any,
    meaning: str,
    choices: tuple[str, ...] = (),
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
    was: str = "",
    new_names: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field that says what may stand in it.

    Args:
        meaning: for `--help`; to be understood by itself.
        choices: the names it may have.
        low, high: least and greatest value, each allowed; of every entry of a list.
        above, below: the same, not allowed themselves.
        unit: of the value, for `--help`.
        was: the key by which it was called in earlier versions, which is still read.
        new_names: earlier names of values, each with what it is called now.
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "bounds": {"low": low, "high": high, "above": above, "below": below},
        "unit": unit,
        "was": was,
        "new_names": new_names or {},
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
