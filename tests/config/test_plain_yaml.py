"""Config files from strangers: nothing is looked up, nothing grows, nothing hangs, nothing ends in a traceback."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import dino.methods  # noqa: F401  # whose settings are part of a config
from dino.config.bounds import out_of_bounds
from dino.config.plain_yaml import load
from dino.config.read import dump, get, read
from dino.config.schema import Config
from dino.errors import UserError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))
SECRET = "${oc.env:DINO_SECRET}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases are not understood"),
        ("train: &all {seed: 1, rest: *all}", "aliases are not understood"),
        ("train: " + "[" * 100_000 + "]" * 100_000, "levels deep"),
        ("train: " + "{a: " * 1000 + "}" * 1000, "levels deep"),
        ("train: {seed: 1, seed: 2}", "'seed' is there twice"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "'train' is there twice"),
        ("train: {seed: !!timestamp 2024-13-45}", "month"),
        ("train: {seed: !!int x}", "invalid literal"),
        ("train: {seed: !!float x}", "could not convert"),
        ("train: {seed: " + "9" * 10_000 + "}", "4300 digits"),
        ("train: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("? [a]\n: b", "a key is no name"),
        ("? {a: 1}\n: b", "a key is no name"),
        ("train: {bf16: !!bool perhaps}", "perhaps"),
    ],
)
def test_what_is_not_plain_is_refused_at_once(text, said):
    began = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=said):
        load(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["12:30", "~", "1e3", "{a: [1, {b: yes}]}", "'2024-01-01'", "|\n  a\n  b"])
def test_everything_else_is_as_yaml_has_it(text):
    assert load(text) == yaml.safe_load(text)


def test_dates_are_text():
    assert load("[2024-13-45, 2024-01-01, 2024-01-01 10:00:00]") == ["2024-13-45", "2024-01-01", "2024-01-01 10:00:00"]


class TestInterpolation:
    """OmegaConf would look up `${…}`, in the environment too, and write it into config.yaml, report and tracker."""

    @pytest.fixture(autouse=True)
    def secret(self, monkeypatch):
        monkeypatch.setenv("DINO_SECRET", "s3cr3t")

    @pytest.mark.parametrize("text", [SECRET, f"a {SECRET} b", "${train.seed}", "${", "a${b", r"\${a}", r"\\${a}"])
    @pytest.mark.parametrize("key", ["tracking.name", "data.root", "run.dir"])
    def test_is_text(self, text, key, tmp_path):
        file = tmp_path / "config.yaml"
        group, name = key.split(".")
        file.write_text(yaml.safe_dump({group: {name: text}}))
        for config in (read(Config, None, [f"{key}={text}"]), read(Config, None, {key: text}), read(Config, file)):
            assert get(config, key) == text
            written = dump(config)
            assert "s3cr3t" not in written
            file.write_text(written)
            assert read(Config, file) == config

    def test_is_text_in_lists_and_names_too(self):
        config = read(Config, None, {"tracking.backends": [SECRET], "objective.terms": {SECRET: 1.0}})
        assert config.tracking.backends == [SECRET]
        assert config.objective.terms == {SECRET: 1.0}

    def test_is_no_number(self):
        with pytest.raises(UserError, match=r"train.seed must be a whole number, got '\${train.steps}'"):
            read(Config, None, ["train.seed=${train.steps}"])


class TestFiles:
    def refusal(self, path: Path) -> str:
        with pytest.raises(UserError) as refused:
            read(Config, path)
        return str(refused.value)

    def test_what_is_no_ordinary_file_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.yaml")
        (tmp_path / "endless.yaml").symlink_to("/dev/zero")
        for name in ("pipe.yaml", "endless.yaml"):
            assert "it is no ordinary file" in self.refusal(tmp_path / name)

    def test_what_is_larger_than_any_config_is_not_read(self, tmp_path):
        with (tmp_path / "large.yaml").open("wb") as file:
            file.truncate(10**12)  # sparse
        assert "larger than" in self.refusal(tmp_path / "large.yaml")

    def test_a_value_of_any_length_gives_a_short_message(self):
        with pytest.raises(UserError) as refused:
            read(Config, None, ["train.seed=" + "x" * 100_000])
        assert len(str(refused.value)) < 200


def test_a_config_is_written_as_omegaconf_would_write_it():
    """Earlier versions did; a run directory's config.yaml is to stay the same to the byte."""
    assert dump(Config()) == OmegaConf.to_yaml(OmegaConf.structured(Config()))


@pytest.mark.parametrize("key", ["run.dir", "data.root", "model.init", "train.resume"])
def test_the_home_directory_is_meant_by_its_sign(key, monkeypatch, tmp_path):
    """Shells leave it alone after a `=`; a folder of that name was made otherwise."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert get(read(Config, None, [f"{key}=~/runs/x"]), key) == "/home/someone/runs/x"
    assert get(read(Config, None, {key: "~/runs/x"}), key) == "/home/someone/runs/x"
    assert get(read(Config, None, [f"{key}=a~/x"]), key) == "a~/x"
    assert get(read(Config, None, [f"{key}=~x"]), key) == "~x"


KINDS = (
    "data.range",
    "views.augment",
    "train.phases",
    "train.steps",
    "tracking.backends",
    "tracking.name",
    "model.arch",
)


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("value", [SECRET, f"[{SECRET}]", f"{{a: {SECRET}}}", "${"])
def test_what_others_would_look_up_is_text_or_refused(key, value, monkeypatch, tmp_path):
    monkeypatch.setenv("DINO_SECRET", "of mine")
    group, name = key.split(".")
    (tmp_path / "config.yaml").write_text(f"{group}: {{{name}: {json.dumps(value)}}}")
    for source, given in ((tmp_path / "config.yaml", ()), (None, [f"{key}={value}"])):
        try:
            config = read(Config, source, given)
        except UserError as error:
            assert key in str(error)  # noqa: PT017
            assert "of mine" not in str(error)  # noqa: PT017
        else:
            assert "${" in str(get(config, key))
            assert "of mine" not in dump(config)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400", "9" * 400, "[0.1, .inf]", "{blur: .nan}"])
@pytest.mark.parametrize("key", ["optim.lr", "train.steps", "views.global_scale", "views.augment"])
def test_numbers_without_end_are_no_settings(key, value):
    try:
        config = read(Config, None, [f"{key}={value}"])
    except UserError as error:
        assert key in str(error)  # noqa: PT017
    else:
        assert [problem for problem in out_of_bounds(config) if problem.startswith(f"{key} must be")]
