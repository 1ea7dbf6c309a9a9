"""Runs side by side: what differs is shown, what does not is not, and a run that cannot be read hides none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dino.commands import report, runs
from dino.config.auto import PoolFacts, resolve
from dino.errors import UserError
from dino.run import RunDirectory
from dino.training.resume import prepare
from dino.training.settings import load


def make(folder: Path, *settings: str, steps: int = 40, knn: tuple[float, ...] = (0.2, 0.9, 0.4)) -> Path:
    config = load(None, ["train.steps=100", "train.batch_size=10", f"run.dir={folder}", *settings])
    config, _ = resolve(config, PoolFacts(200, 3, "folder"))
    prepare(RunDirectory(folder), config, 0)
    lines = []
    for number, value in enumerate(knn, 1):
        line = {"step": steps * number // len(knn), "loss/dino": 5.0 / number, "time/images_per_second": 20.0}
        lines.append(line | {"health/knn": value, "health/verdict": "healthy"})
    RunDirectory(folder).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def called(command, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dino", *map(str, arguments)])
    command.main()


def test_a_page_of_two_runs_holds_what_differs_between_them(tmp_path, monkeypatch, capsys):
    first = make(tmp_path / "runs" / "first", "optim.lr=0.001")
    second = make(tmp_path / "runs" / "second", "optim.lr=0.002", steps=100)
    results = {"caption": "10 labels", "columns": ["features", "1-NN"], "rows": [["<b>raw</b>", "91.2 %"]]}
    (second / "results.json").write_text(json.dumps(results), encoding="utf-8")
    called(report, monkeypatch, first, second)
    path = tmp_path / "runs" / "comparison.html"
    assert str(path) in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    differ = page.split("Settings that differ")[1].split("</table>")[0]
    assert '>optim.lr</td><td class="figure">0.001</td><td class="figure">0.002<' in differ
    assert "train.batch_size" not in differ
    assert "run.dir" not in differ
    assert "&lt;b&gt;raw" in page
    losses = page.split("<h2>Losses</h2>")[1].split("</section>")[0]
    assert losses.count("<polyline") == 2
    assert "first 5 (step 13)" in losses
    assert "second 5 (step 33)" in losses
    assert "http" not in page


def test_runs_of_different_methods_and_no_curves_yet(tmp_path, monkeypatch):
    first = make(tmp_path / "one", knn=())
    second = make(tmp_path / "two", "objective.koleo_weight=0.1")
    called(report, monkeypatch, first, second, "--out", tmp_path / "new" / "page.html")
    assert "objective.koleo_weight" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_the_list_has_state_best_figure_time_and_speed_of_every_run(tmp_path, monkeypatch, capsys):
    """40 steps of 10 images at 20 images a second: 20 seconds."""
    make(tmp_path / "group" / "stopped")
    make(tmp_path / "whole", steps=100)
    broken = make(tmp_path / "broken")
    (broken / "config.yaml").write_text("train: [", encoding="utf-8")
    called(runs, monkeypatch, tmp_path)
    output = capsys.readouterr().out
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert "stopped, 40 of 100 steps" in lines["group/stopped"]
    assert "90.0% knn at step 26" in lines["group/stopped"]
    assert "20 seconds" in lines["group/stopped"]
    assert "20 images/s" in lines["group/stopped"]
    assert "finished" in lines["whole"]
    assert f"{broken} cannot be read" in output


def test_a_run_that_another_process_trains_is_running(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "alive")
    code = "import pathlib, sys; from dino.run_lock import held\n"
    code += "with held(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        called(runs, monkeypatch, tmp_path)
        process.communicate(b"\n")
    assert "running, 40 of 100 steps" in capsys.readouterr().out
    called(runs, monkeypatch, tmp_path)
    assert "stopped, 40 of 100 steps" in capsys.readouterr().out


@pytest.mark.parametrize("command", [report, runs])
def test_where_there_is_no_run_the_message_says_what_to_name(tmp_path, monkeypatch, command):
    with pytest.raises(UserError, match="no run"):
        called(command, monkeypatch, tmp_path)


def test_one_page_of_one_run_has_its_place(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--out is for several"):
        called(report, monkeypatch, make(tmp_path / "one"), "--out", tmp_path / "x.html")
