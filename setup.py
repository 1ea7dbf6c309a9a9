"""What pyproject.toml cannot say: the recipes of configs/ are installed beside the code, as `dino/recipes`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dino", "dino.*"]), "dino.recipes"],
    package_dir={"dino.recipes": "configs"},
    package_data={"dino.recipes": ["*.yaml"]},
)
