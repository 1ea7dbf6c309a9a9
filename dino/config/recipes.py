"""Recipes by name: the files of configs/, which an installed package carries as `dino/recipes`."""

import difflib
from pathlib import Path

from dino.errors import UserError

PACKAGE = Path(__file__).parents[1]


def recipe_path(recipe: str | Path) -> Path:
    """The YAML file of a recipe's name, such as `omniglot_cpu`; a path to a file is given back as it is.

    Raises:
        UserError: there is no such recipe.
    """
    path = Path(recipe).expanduser()
    if path.suffix or path.is_file():
        return path
    installed = PACKAGE / "recipes"
    folder = installed if installed.is_dir() else PACKAGE.parent / "configs"
    recipes = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if path.name != str(recipe) or path.name not in recipes:
        near = difflib.get_close_matches(str(recipe), recipes, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no recipe is called '{recipe}'{hint}: there are {', '.join(recipes)}; or name a .yaml file")
    return recipes[path.name]


def recipe_and_settings(words: list[str], config: str | None) -> tuple[str | None, list[str]]:
    """What a command line says of settings: a recipe or file, and `key=value` words.

    Args:
        words: `key=value`; the first may be a recipe instead.
        config: a recipe or file that an option names.

    Raises:
        UserError: two recipes.
    """
    if not words or "=" in words[0]:
        return config, words
    if config is not None:
        raise UserError(f"--config {config} and '{words[0]}' both name settings: leave one out")
    return words[0], words[1:]
