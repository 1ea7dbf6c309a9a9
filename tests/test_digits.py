"""`dino digits`: what it writes down, and what W&B gets of it where that is asked for."""

import json
import sys

import numpy as np
import pytest

from dino.commands import digits


@pytest.mark.parametrize("option", [[], ["--wandb", "letters"]])
def test_wandb_gets_the_figures_that_are_written_down_and_only_where_asked(option, tmp_path, monkeypatch):
    features = np.random.default_rng(0).normal(size=(150, 2))
    labels = np.arange(150) % 10
    sent = []
    monkeypatch.setattr(digits, "SEEDS", 2)
    monkeypatch.setattr(digits, "features_of", lambda directory: ({"raw pixels": features}, labels))
    monkeypatch.setattr(digits, "write_report", lambda directory: None)
    monkeypatch.setattr(digits, "log_evaluations", lambda accelerator, *what: sent.append(what))
    monkeypatch.setattr(sys, "argv", ["dino digits", "--run", str(tmp_path), *option])
    digits.main()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(sent) == bool(option)
    for project, _, tables, figures in sent:
        assert project == "letters"
        assert [list(tables["evaluation/digits"].columns), list(tables["evaluation/digits"].rows)] == [
            results["columns"],
            results["rows"],
        ]
        of_pixels = results["accuracy"]["raw pixels"]
        assert figures == {
            str(tmp_path): {f"digits/raw pixels: {probe}": of_pixels[probe]["mean"] for probe in ("knn", "logistic")}
        }
