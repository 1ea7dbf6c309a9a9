"""Weights & Biases, offline without a key and online with a server of our own: one run for one run directory.

What is wrong with W&B never ends a training.
"""

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import REPOSITORY, backbone, checkpoints, metrics, steps_logged, write_images
from pyarrow.parquet import read_table
from wandb_server import Server, history, summary

pytestmark = pytest.mark.slow

BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, in which W&B writes its records


def records(path: Path) -> list:
    """The records of an offline W&B run file."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, position, parts, found = path.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # no room for a header: the rest of the block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + HEADER])
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # full, last
            found.append(internal.Record.FromString(parts))
            parts = b""
    return found


@pytest.fixture(scope="module")
def tracked(runs, tmp_path_factory) -> Path:
    """A run of two starts, without a key."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    command = ["tracking.backends=[wandb]", "tracking.project=letters", "train.steps=6", f"run.dir={run}"]
    runs.finish(*command, "train.time_limit=0.0001", launcher="fork")
    runs.finish(*command, launcher="fork", page=True)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    return run


def files_of(run: Path) -> list[Path]:
    """The files of its starts, by time."""
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def summary_of(content: list) -> dict:
    """What an offline run's file puts into the summary."""
    items = [item for record in content for item in record.summary.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def artifacts_of(content: list) -> dict:
    """Name to artifact."""
    sent = [record.artifact for record in content if record.WhichOneof("record_type") == "artifact"]
    requests = [record.request.log_artifact.artifact for record in content if record.request.HasField("log_artifact")]
    return {artifact.name: artifact for artifact in sent + requests}


def table_of(file: Path, summary: dict, name: str) -> dict:
    """A table of a summary, its cells by the names of columns."""
    table = json.loads((file.parent / "files" / summary[name]["path"]).read_text())
    return {column: [row[number] for row in table["data"]] for number, column in enumerate(table["columns"])}


def test_without_a_key_one_offline_run_holds_the_metrics_of_all_starts(tracked):
    run, identity = tracked, (tracked / "wandb_id").read_text()
    files = files_of(run)[:2]  # a third is that of an evaluation
    assert [path.name for path in files] == [f"run-{identity}.wandb"] * 2

    logged = {}
    for path in files:
        content = records(path)
        started = next(record.run for record in content if record.WhichOneof("record_type") == "run")
        assert (started.run_id, started.project, started.display_name) == (identity, "letters", "run")
        changes = [*started.config.update, *(item for record in content for item in record.config.update)]
        settings = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in changes}
        assert settings["train.batch_size"] == 32
        assert settings["objective.centering"] == "sinkhorn"
        for record in content:
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                logged[json.loads(items["_step"])] = {
                    name: json.loads(value) for name, value in items.items() if not name.startswith(("_", "pictures/"))
                }
    pictures = {path.name.split("_")[0] for path in run.glob("wandb/offline-run-*/files/media/images/pictures/*.png")}
    assert pictures == {"crops", "attention", "pca", "neighbours"}
    assert logged == {line.pop("step"): line for line in metrics(run)}
    (artifact,) = [
        of for path in files for name, of in artifacts_of(records(path)).items() if name.startswith("backbone")
    ]
    assert (artifact.name, artifact.type) == (f"backbone-{identity}", "model")
    assert json.loads(artifact.metadata)["steps"] == 6
    assert [entry.local_path for entry in artifact.manifest.contents] == [str(run / "backbone.safetensors")]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Two classes of noise."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in ("dark", "bright"):
        write_images(folder / name, 8)
    return folder


def test_evaluations_are_tables_of_the_run_that_trained_the_weights(runs, tracked, labelled):
    done = runs.fork([REPOSITORY / "eval/knn.py", "--weights", tracked, "--data", labelled, "--wandb"])
    assert done.returncode == 0, done.stderr
    file = files_of(tracked)[-1]
    assert file.name == f"run-{(tracked / 'wandb_id').read_text()}.wandb"
    summary = summary_of(records(file))
    table = table_of(file, summary, "evaluation/knn")
    assert set(table["weights"]) == {str(tracked)}
    accuracies = dict(zip(table["figure"], table["accuracy"], strict=True))
    assert list(accuracies) == ["knn/top1_k10", "chance: always the largest class", "untrained: knn/top1_k10"]
    assert 0.5 <= accuracies["chance: always the largest class"] < 1
    assert summary["knn/top1_k10"] == accuracies["knn/top1_k10"]


def test_a_curation_has_tables_pictures_and_its_manifest(runs, tracked, labelled, tmp_path):
    curated = tmp_path / "curated"
    words = [f"data.root={labelled}", f"weights={tracked}", f"run.dir={curated}", "clusters.counts=[2]"]
    words += ["tracking.backends=[wandb]", "tracking.project=letters"]
    done = runs.fork([REPOSITORY / "train/curate.py", *words])  # W&B's file is whole once the process has ended
    assert done.returncode == 0, done.stderr
    (file,) = files_of(curated)
    content = records(file)
    started = next(record.run for record in content if record.WhichOneof("record_type") == "run")
    assert (started.project, started.job_type) == ("letters", "curation")
    summary = summary_of(content)
    assert summary["curation/images"] == 16
    table = table_of(file, summary, "curation/What became of the images")
    manifest = read_table(curated / "manifest.parquet").to_pydict()
    kept = sum(manifest["kept"])
    assert (summary["curation/kept"], table["images"][table[""].index("kept")]) == (kept, str(kept))
    assert any((file.parent / "files" / "media" / "images" / "curation").iterdir())
    artifact = artifacts_of(content)[f"manifest-{(curated / 'wandb_id').read_text()}"]
    assert artifact.type == "dataset"
    assert [entry.path for entry in artifact.manifest.contents] == ["manifest.parquet"]


STEPS = 30
TRACKED = ("tracking.backends=[wandb]", "tracking.project=letters", f"train.steps={STEPS}", "train.checkpoint_every=5")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_killed_online_the_same_run_goes_on_with_every_step_once(runs, server, tmp_path):
    """Whether W&B has got more steps than the checkpoint has, or fewer."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    for last, received in ((7, 7), (17, 10)):
        process = runs.start(*TRACKED, f"run.dir={run}", **server.environment())
        process.wait_until(lambda last=last: len(steps_logged(run)) >= last)
        process.end(signal.SIGKILL)
        lines = [{"_step": line.pop("step"), **line} for line in metrics(run)[:received]]
        (online,) = server.runs.values()
        online["files"]["wandb-history.jsonl"] = [json.dumps(line) for line in lines]
    assert max(checkpoints(run)) < STEPS
    done = runs.finish(*TRACKED, f"run.dir={run}", launcher="fork", **server.environment())
    assert "Steps must be" not in done.stderr, "what W&B has already is not sent again"

    runs.finish(*TRACKED, "tracking.backends=[]", f"run.dir={whole}")
    assert backbone(run) == backbone(whole)
    ((identity, online),) = server.runs.items()
    assert identity == (run / "wandb_id").read_text()
    assert (online["project"], online["title"], online["kind"]) == ("letters", "run", "pre-training")
    assert online["has_finished"]
    lines = metrics(run)
    assert [row["step"] for row in history(online)] == [line["step"] for line in lines]
    assert without_times(history(online)) == without_times(lines)
    assert summary(online)["loss/dino"] == lines[-1]["loss/dino"]

    name = f"backbone-{identity}"
    assert server.files[f"{name}/backbone.safetensors"] == backbone(run)
    about = server.artifacts[name]
    assert about["kind"] == "model"
    expected = {"objective": "DINO", "arch": "vit_tiny", "steps": STEPS, "batch_size": 32, "seed": 0}
    expected["best/health/knn"] = max(line.get("health/knn", 0) for line in lines)
    assert {key: about["metadata"][key] for key in expected} == expected


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "pictures/"))} for row in rows]


def test_a_server_that_is_gone_during_the_run_does_not_end_it(runs, tmp_path):
    server, run = Server(), tmp_path / "run"
    settings = [*TRACKED, "tracking.artifacts=false", f"run.dir={run}"]
    process = runs.start(*settings, **server.environment(), WANDB_FINISH_TIMEOUT="2")
    process.wait_until(lambda: bool(steps_logged(run)))
    server.close()
    assert process.wait(100) == 0
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert "done: " in process.output.read_text()
    assert "wandb is given up, the run goes on without it: " in process.errors.read_text()
    assert "`wandb sync` sends later what it lacks" in process.errors.read_text()


def test_where_the_key_is_refused_the_run_is_kept_offline(runs, tmp_path):
    server, run = Server(refuses=True), tmp_path / "run"
    done = runs.finish(*TRACKED, f"run.dir={run}", launcher="fork", **server.environment())
    server.close()
    (warning,) = [line for line in done.stderr.splitlines() if "W&B cannot be reached" in line]
    assert "no such key" in warning
    assert "`wandb sync` sends it later" in warning
    assert "Traceback" not in done.stderr
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert sum(record.WhichOneof("record_type") == "history" for record in records(file)) == STEPS
