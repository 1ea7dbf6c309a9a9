"""How the code is laid out: rooms import only from rooms below them, and no file or function grows too long."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dino"
ROOMS = (  # from the top; those of a line are of one level and know nothing of each other
    ("commands", "cli"),
    ("training",),
    ("curation",),
    ("report",),
    ("monitor",),
    ("evaluation",),
    ("methods",),
    ("models",),
    ("views",),
    ("data",),
    ("tracking",),
    ("run", "run_lock"),  # the files of a run directory; a distillation reads the heads of one
    ("config", "seal"),
    ("distributed", "precision", "files"),
    ("errors",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
ENTRANCES = {"__init__", "objectives"}  # they only hand on what others have
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST_FILE, LONGEST_FUNCTION = 320, 60


def room_of(module: str) -> str:
    return module.split("/")[0]


def imported(module: str) -> Iterator[str]:
    """The files of dino/ that a file imports, wherever in it, also for type checkers only."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *path = name.split(".")
            while first == "dino" and path:
                if found := FILES.keys() & {"/".join(path), "/".join([*path, "__init__"])}:
                    yield found.pop()
                    break
                path.pop()


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in FILES} == LEVELS.keys() | ENTRANCES


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module) not in ENTRANCES])
def test_imports_are_from_the_same_room_or_from_rooms_below(module):
    room = room_of(module)
    others = [other for other in imported(module) if room_of(other) != room]
    upwards = [other for other in others if LEVELS.get(room_of(other), -1) <= LEVELS[room]]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle():
    """A room's `__init__` may hand on what its files have; these then import from the files themselves."""
    unresolved = {module: set(imported(module)) - {module} for module in FILES}
    while independent := [module for module, others in unresolved.items() if not others & unresolved.keys()]:
        for module in independent:
            del unresolved[module]
    assert unresolved == {}


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    text = FILES[module].read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("module", FILES)
def test_text_is_read_and_written_in_a_named_encoding(module):
    """Windows takes another one for granted than Linux and macOS."""
    nameless = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Call) and "encoding" not in [keyword.arg for keyword in node.keywords]:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            mode = node.args[-1].value if node.args and isinstance(node.args[-1], ast.Constant) else ""
            is_text = called == "open" and (not (node.args or node.keywords) or mode in ("r", "w", "a", "x"))
            if is_text or called == "write_text" or (called == "read_text" and not node.args):
                nameless.append(ast.unparse(node))
    assert nameless == []


@pytest.mark.parametrize("room", [module.removesuffix("/__init__") for module in FILES if module.endswith("/__init__")])
def test_no_name_that_a_room_hands_on_is_that_of_another_file_of_it(room):
    """Whoever imports that file would put it in place of the name, for all others too."""
    names, sources = set(), set()
    for node in ast.walk(ast.parse(FILES[f"{room}/__init__"].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module != f"dino.{room.replace('/', '.')}":
            names |= {alias.asname or alias.name for alias in node.names}
            sources.add((node.module or "").rpartition(".")[2])  # what the room itself imports lies beneath its names
    files = {path.stem for path in (PACKAGE / room).glob("*.py")}
    assert names & files <= sources
