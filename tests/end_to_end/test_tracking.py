"""Weights & Biases without a key: offline, without a prompt, one run for one run directory."""

import json
import struct
from pathlib import Path

import pytest
from launching import metrics, steps_logged

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


def test_without_a_key_one_offline_run_holds_the_metrics_of_all_starts(runs, tmp_path):
    run = tmp_path / "run"
    command = ["tracking.backends=[wandb]", "tracking.project=letters", "train.steps=6", f"run.dir={run}"]
    runs.finish(*command, "train.time_limit=0.0001", launcher="fork")
    runs.finish(*command, launcher="fork", page=True)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]

    identity = (run / "wandb_id").read_text()
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
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
