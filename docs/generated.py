"""Pages of the documentation that are made of the program itself: settings, recipes, launch files, measured figures."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dino.config.bounds import bounds_text
from dino.config.read import Leaf, get, leaves
from dino.config.schema import Config, Phase, method_settings
from dino.curation.settings import CurateConfig
from dino.methods import METHODS

REPOSITORY = Path(__file__).parents[1]
ABOUT_SETTINGS = """# Settings

Written as `group.key=value` on the command line, or in a YAML file as groups and keys; the command line wins.
`auto` is worked out from the images, the batch size and the length of the run; the run prints what it chose and why.
`dino train --help` prints this list, `dino train --help-json` a JSON schema of it for editors.
"""
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def settings() -> str:
    """Every setting: type, unit, bounds, default, meaning; of a run, of each method, of a curation."""
    return "\n".join(_settings())


def _settings() -> Iterator[str]:
    yield ABOUT_SETTINGS
    yield "## Training: `dino train`\n"
    for group in dataclasses.fields(Config):
        if group.name != "objective":
            yield from _group(Config(), group.name, f"`{group.name}`")
            continue
        for name in METHODS:
            config = Config(objective=method_settings(name))
            yield from _group(config, "objective", f"`objective` with `objective.name={name}`")
    yield "### an entry of `train.phases`\n"
    yield from _list(
        [(Leaf(field.name, (field.type,), field.metadata), field.default) for field in dataclasses.fields(Phase)]
    )
    yield "## Curating: `dino curate`\n"
    config = CurateConfig()
    for group in dataclasses.fields(config):
        yield from _group(config, group.name, f"`{group.name}` of a curation")


def _group(config: Any, group: str, title: str) -> Iterator[str]:
    rows = [(leaf, get(config, key)) for key, leaf in leaves(config).items() if key.split(".")[0] == group]
    yield f"### {title}\n"
    yield from _list(rows)


def _list(rows: list[tuple[Leaf, Any]]) -> Iterator[str]:
    """A definition list: the key with what may stand there, and below what it means."""
    for leaf, default in rows:
        kind = ", ".join(filter(None, [leaf.type_name, leaf.metadata["unit"], bounds_text(leaf)]))
        value = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
        default_text = f"; default `{value}`" if value != "" else ""
        yield f"`{leaf.key}` {_plain(kind)}{default_text}"
        yield f":   {_plain(leaf.metadata['meaning'])}\n"


def _plain(text: str) -> str:
    """Text in which Markdown sees no signs of its own."""
    return re.sub(r"([\\`*_<\[{])", r"\\\1", text)


def recipes() -> str:
    """configs/README.md, then the header of each recipe."""
    parts = [(REPOSITORY / "configs" / "README.md").read_text(), "# The recipes one by one"]
    for path in RECIPES:
        parts.append(f"## {path.stem}\n\n{_header(path)}")
    text = "\n\n".join(parts)
    first, rest = text.split("\n", 1)
    return first + "\n" + re.sub(r"^(#+ )", r"#\1", rest, flags=re.MULTILINE)


def _header(path: Path) -> str:
    """The comment that a recipe begins with, its indented lines as commands; then its settings."""
    text, lines = "", path.read_text().splitlines()
    header = [line.removeprefix("#").removeprefix(" ") for line in itertools.takewhile(_is_comment, lines)]
    for is_command, block in itertools.groupby(header, lambda line: line.startswith(" ")):
        body = "\n".join(block)
        text += f"\n```bash\n{textwrap.dedent(body)}\n```\n\n" if is_command else _plain(body) + "\n"
    return text + "\n```yaml\n" + "\n".join(lines[len(header) :]).strip() + "\n```"


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def launch_files() -> str:
    return (REPOSITORY / "configs" / "accelerate" / "README.md").read_text()


def ledger() -> str:
    return (REPOSITORY / "benchmarks" / "RESULTS.md").read_text()


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "recipes.md": recipes,
    "launch_files.md": launch_files,
    "ledger.md": ledger,
}
