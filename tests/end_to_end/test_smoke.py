"""One run of four steps: what it leaves, what starting it again does, and what `--help` and `--dry-run` do."""

import re

import pytest
import torch
from launching import checkpoints, contents, metrics

import dino
from dino.config import read as configuration
from dino.training.settings import load


@pytest.fixture(scope="module")
def smoke(runs, tmp_path_factory):
    run = tmp_path_factory.mktemp("smoke") / "run"
    settings = [f"run.dir={run}", "train.steps=4"]
    before = runs.finish("--dry-run", *settings)
    assert "nothing was written" in before.stdout
    assert not run.exists(), "the dry run wrote something"
    return run, settings, runs.finish(*settings)


def test_run_directory_holds_what_the_contract_says(smoke):
    run, _, done = smoke
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "backbone.safetensors",
        "report.html",
    }
    assert checkpoints(run) == [2, 3, 4]
    assert all(re.fullmatch(r"step-\d{8}", path.name) for path in (run / "checkpoints").iterdir())
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert f"{run / 'backbone.safetensors'}" in done.stdout


def test_config_of_the_run_is_resolved_and_can_be_loaded(smoke):
    run, _, _ = smoke
    config = load(run / "config.yaml")
    assert config.train.steps == 4
    unresolved = [key for key, _ in configuration.leaves() if configuration.get(config, key) == "auto"]
    assert set(unresolved) <= {"train.resume", "train.precision"}


def test_block_before_the_first_step_says_what_will_run(smoke):
    _, _, done = smoke
    for said in ("1,797", "4 = 0.07123 epochs", "32 = 1 process(es) × 1 micro-batch(es) × 32", "fp32", "2 global 8²"):
        assert said in done.stdout


def test_report_is_one_self_contained_page(smoke):
    run, _, _ = smoke
    page = (run / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 7
    )  # progress, health, schedules, crops, attention, patches, neighbours
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)


def test_load_backbone_gives_class_tokens(smoke):
    run, _, _ = smoke
    model = dino.load_backbone(run)
    images = torch.randint(0, 256, (3, 1, 20, 28), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = model(model.preprocess(images))
    assert tokens.shape == (3, 32)
    assert tokens.isfinite().all()


def test_started_again_it_is_done_and_changes_nothing(runs, smoke):
    run, settings, _ = smoke
    before = contents(run)
    again = runs.finish(*settings)
    assert "done: " in again.stdout
    after = contents(run)
    assert after.keys() == before.keys()
    for name in before.keys() - {"report.html"}:
        assert after[name] == before[name], name


def test_help_lists_every_key(runs):
    done = runs.finish("--help")
    for key, field in configuration.leaves():
        assert f"  {key} (" in done.stdout
        assert field.metadata["meaning"] in done.stdout
