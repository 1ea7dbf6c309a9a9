"""One run of four steps, started as a user starts it: what it leaves, what starting it again and a dry run do."""

import re

import pytest
import torch
from launching import checkpoints, contents, metrics

import dino
from dino.config.read import get, leaves
from dino.training.settings import load


@pytest.fixture(scope="module")
def smoke(runs, tmp_path_factory):
    run = tmp_path_factory.mktemp("smoke") / "run"
    settings = [f"run.dir={run}", "train.steps=4"]
    before = runs.finish("--dry-run", *settings)
    assert "nothing was written" in before.stdout
    assert not run.exists(), "the dry run wrote something"
    return run, settings, runs.finish(*settings, launcher="accelerate")  # with the options of `make demo`


def test_run_directory_holds_what_the_contract_says(smoke):
    run, _, done = smoke
    files = {"config.yaml", "metrics.jsonl", "checkpoints", "backbone.safetensors", "report.html"}
    assert {path.name for path in run.iterdir()} == files
    assert checkpoints(run) == [2, 3, 4]
    assert all(re.fullmatch(r"step-\d{8}", path.name) for path in (run / "checkpoints").iterdir())
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert f"{run / 'backbone.safetensors'}" in done.stdout


def test_nothing_but_our_own_lines_is_printed(smoke):
    """No warning of a launcher or a library."""
    ours = r"decoding: .*|\s*\d+%\|.*|step \d+: .*"
    lines = [line for line in re.split(r"[\r\n]", smoke[2].stderr) if line.strip()]
    assert lines
    assert [line for line in lines if not re.fullmatch(ours, line)] == []


def test_config_of_the_run_is_resolved_and_can_be_loaded(smoke):
    config = load(smoke[0] / "config.yaml")
    assert config.train.steps == 4
    assert {key for key in leaves(config) if get(config, key) == "auto"} <= {"train.resume", "train.precision"}


def test_block_before_the_first_step_says_what_will_run(smoke):
    parts = ("1,797", "4 = 0.07123 epochs", "32 = 1 process(es) × 1 micro-batch(es) × 32", "fp32", "2 global 8²")
    assert [part for part in parts if part not in smoke[2].stdout] == []


def test_report_is_one_self_contained_page(smoke):
    page = (smoke[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # crops, attention, patches, neighbours
    assert [f"<h2>{title}</h2>" in page for title in ("Progress", "Health", "Schedules", "Use it")] == [True] * 4
    assert len(page) < 3e6
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)


def test_load_backbone_gives_class_tokens(smoke):
    model = dino.load_backbone(smoke[0])
    images = torch.randint(0, 256, (3, 1, 20, 28), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = model(model.preprocess(images))
    assert tokens.shape == (3, 32)
    assert tokens.isfinite().all()


def test_started_again_it_is_done_and_changes_nothing(runs, smoke):
    run, settings, _ = smoke
    before = contents(run)
    assert "done: " in runs.finish(*settings, page=True).stdout
    after = contents(run)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} <= {"report.html"}


def test_from_python_it_is_the_same_run(smoke, tmp_path):
    """`dino.train` with the settings of the command gives the same weights, and a `Run` to look at them."""
    given = load(smoke[0] / "config.yaml")
    settings = {key: get(given, key) for key in leaves(given) if not key.startswith("run.")}
    run = dino.train(run=tmp_path / "run", **settings)
    assert run.path == tmp_path / "run"
    assert (run.path / "backbone.safetensors").read_bytes() == (smoke[0] / "backbone.safetensors").read_bytes()
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert run.verdict in ("warming up", "healthy")
    assert run.config.train.steps == 4
    assert run.report.exists()
    assert repr(dino.Run(run.path)) == f"Run('{run.path}')"
