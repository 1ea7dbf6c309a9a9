"""The documentation's commands and settings exist: each is read as the program would; test_commands.py runs some."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from wandb.sdk.launch.sweeps import utils

from dino.cli import COMMANDS
from dino.config.bounds import out_of_bounds
from dino.config.read import get, leaves, read
from dino.config.recipes import recipe_and_settings
from dino.config.schema import Config, method_settings
from dino.curation.settings import CurateConfig, check
from dino.methods import METHODS
from dino.monitor.indicators import INDICATORS
from dino.training.settings import load

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
OF_SCRIPTS = {"train/pretrain.py": "train", "train/curate.py": "curate"}
OTHERS = ("pip", "sbatch", "kubectl", "make", "docker", "git", "wandb")  # programs of others
OWNERS: dict[str, str] = {}  # by setting: "curation", or a method that has it, DINO if it does
OWNERS |= dict.fromkeys(leaves(CurateConfig()), "curation")
for _name in [*(name for name in METHODS if name != "dino"), "dino"]:
    OWNERS |= dict.fromkeys(leaves(Config(objective=method_settings(_name))), _name)


class Parsed(Exception):
    """A command line was understood; carries what it says."""


@pytest.fixture(autouse=True)
def parsing_only(monkeypatch):
    """A command ends as soon as its command line is read."""

    def stop(parse):
        def parsed(*arguments):
            raise Parsed(parse(*arguments))

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name)))


def commands(pages: Sequence[Path] = PAGES) -> Iterator[str]:
    for page in pages:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.S | re.M):
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.strip() and not line.startswith("#"))


def without_launcher(words: list[str]) -> list[str]:
    """The subcommand and its words; what stands before is read by the launcher's own parser."""
    script = next(index for index, word in enumerate(words) if word == "dino" or word.endswith(".py"))
    launchers = {"accelerate": launch_command_parser, "torchrun": get_args_parser}
    if words[0] in launchers:
        options = words[2 if words[0] == "accelerate" else 1 : script]
        with pytest.raises(Parsed):
            launchers[words[0]]().parse_args([*options, "script.py"])
    if words[script] == "dino":
        return words[script + 1 :]
    assert (REPOSITORY / words[script]).is_file(), words[script]
    name = OF_SCRIPTS.get(words[script], Path(words[script]).stem)
    return [name, *words[script + 1 :]] if words[script].split("/")[0] in ("train", "eval") else []


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command(command, monkeypatch):
    words = shlex.split(command)
    if words[0] in OTHERS:
        return
    words = without_launcher(words)
    if not words:
        return
    assert words[0] in COMMANDS, command
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(f"dino.commands.{words[0]}").main()
    arguments = parsed.value.args[0]
    if words[0] == "train":
        load(*recipe_and_settings(arguments.settings, arguments.config))
    if words[0] == "curate":
        check(read(CurateConfig, *recipe_and_settings(arguments.settings, arguments.config)))


def test_commands_are_found():
    assert len(list(commands())) > 30


def settings_of(page: Path) -> Iterator[tuple[str, str]]:
    """The settings that a page names in its text, with values where it gives any."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    groups = "|".join({key.split(".")[0] for key in OWNERS})
    for code in re.findall(r"`([^`]+)`", text):
        yield from re.findall(rf"(?<![/\w.])((?:{groups})\.(?!py\b|dir\b)[a-z_]+)(?![\w(])(?:=([^\s;]+))?", code)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extending"], ids=lambda page: page.stem)
def test_settings_in_the_text_exist_and_may_have_these_values(page):
    values: dict[str, set[str]] = {}
    for key, value in settings_of(page):
        values.setdefault(key, set()).update([value] if value and value[0] not in "[{…" else [])
    assert values.keys() - OWNERS.keys() == set()
    while values := {key: rest for key, rest in values.items() if rest}:  # each round a value of every setting
        given = {key: rest.pop() for key, rest in values.items()}
        for owner in {OWNERS[key] for key in given}:
            settings = [f"{key}={value}" for key, value in given.items() if OWNERS[key] == owner]
            if owner == "curation":
                tree = read(CurateConfig, None, settings)
            else:
                tree = read(Config, None, settings if owner == "dino" else [f"objective.name={owner}", *settings])
            assert [problem for problem in out_of_bounds(tree) if problem.split()[0] in given] == []


def test_the_page_of_settings_has_every_one():
    sys.path.insert(0, str(REPOSITORY / "docs"))
    try:
        page = importlib.import_module("generated").settings()
    finally:
        sys.path.pop(0)
    names = set(re.findall(r"^`([\w.]+)` .+\n:   \w", page, re.M))
    assert OWNERS.keys() - names == set()


def test_kubernetes_job_names_what_exists():
    job = yaml.safe_load((REPOSITORY / "examples" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    subcommand, recipe, *settings = without_launcher(container["command"])
    assert subcommand == "train"
    load(recipe, settings)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_slurm_job_names_what_exists():
    file = REPOSITORY / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", file], timeout=30).returncode == 0
    text = file.read_text()
    (recipe,) = re.findall(r"RECIPE:-(.+?)}", text)
    load(REPOSITORY / recipe, re.findall(r'"((?:data|run)\.\w+=)', text))
    assert set(re.findall(r"\S+\.py", text)) == {"train/pretrain.py"}
    assert (REPOSITORY / "train" / "pretrain.py").is_file()


def test_sweep_gives_settings_that_a_run_takes():
    """By the agent's own code, each value of a parameter as one trial; each has a directory of its own."""
    sweep = yaml.safe_load((REPOSITORY / "examples" / "sweep.yaml").read_text())
    chosen = {}
    for key, parameter in sweep["parameters"].items():
        chosen[key] = parameter.get("values", [parameter.get("value", parameter.get("min"))])
    for trial in range(max(map(len, chosen.values()))):
        values = {key: {"value": of_key[trial % len(of_key)]} for key, of_key in chosen.items()}
        arguments = utils.create_sweep_command_args({"args": values})
        words = []
        for word in utils.create_sweep_command(list(sweep["command"])):
            words += arguments[word[2:-1]] if word.startswith("${") else [word]
        shell, option, script, *rest = words
        script = script.replace("exec dino", "printf '%s\\n'")
        environment = {"WANDB_RUN_ID": f"trial-{trial}", "PATH": os.environ["PATH"]}
        printed = subprocess.run([shell, option, script, *rest], env=environment, capture_output=True, text=True)
        subcommand, *settings = printed.stdout.splitlines()
        assert subcommand == "train"
        config = load(None, settings)
        assert config.run.dir == f"runs/trial-{trial}"
        assert {key: get(config, key) for key in values} == {key: value["value"] for key, value in values.items()}
    assert sweep["metric"]["name"] in {indicator.name for indicator in INDICATORS}


def test_every_example_is_shown():
    shown = {name for page in PAGES for name in re.findall(r'^--8<-- "examples/(.+)"$', page.read_text(), re.M)}
    assert shown == {path.name for path in (REPOSITORY / "examples").iterdir() if path.is_file()}
