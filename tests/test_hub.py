"""An export that is sent to the Hub: what a server gets, and what is said where it refuses or nobody is known."""

import base64
import json
import math
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from dino.commands import hub
from dino.config.auto import PoolFacts, resolve
from dino.errors import UserError
from dino.models import Preprocess, VisionTransformer, ViTSpec
from dino.report.card import model_card, snippet
from dino.run import RunDirectory
from dino.training.resume import prepare
from dino.training.settings import load


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `create_repo` and `upload_folder` ask for; small files come within the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        if self.path.endswith("/create"):
            return self.answer(self.server.status, {"url": f"{constants.ENDPOINT}/me/backbone", "error": "no"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(self.server.status, {"files": files})
        return self.answer(
            200, {"commitUrl": f"{constants.ENDPOINT}/me/backbone/commit/1", "commitOid": "1", "success": True}
        )

    def do_GET(self):
        self.answer(200, {"sha": "0", "siblings": [], "id": "me/backbone"})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen, server.status = [], 200
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    for name in ("README.md", "config.json", "private.txt"):
        (tmp_path / name).write_text(f"content of {name}", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("public", [False, True])
def test_the_files_named_and_no_others_are_sent_and_the_repository_is_private_unless_told(server, folder, public):
    hub.check("me/backbone")
    hub.push(folder, "me/backbone", ["README.md", "config.json", "model.onnx.data"], public)
    assert {token for _, token, _ in server.seen} == {"Bearer hf_test"}
    created = json.loads(server.seen[0][2])
    assert created["name"] == "backbone"
    assert created.get("private", created.get("visibility") == "private") is not public
    commit = next(body for path, _, body in server.seen if "/commit/" in path)
    files = [json.loads(line)["value"] for line in commit.splitlines() if json.loads(line)["key"] == "file"]
    sent = {file["path"]: base64.b64decode(file["content"]).decode() for file in files}
    assert sent == {name: f"content of {name}" for name in ("README.md", "config.json")}


def test_a_refusal_is_one_line_and_the_export_stays(server, folder):
    server.status = 403
    with pytest.raises(UserError, match=r"me/backbone could not be written on the Hub \(.*\); the export is whole in"):
        hub.push(folder, "me/backbone", ["README.md"], public=False)
    assert (folder / "README.md").exists()


def test_without_a_token_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        hub.check("me/backbone")


@pytest.mark.parametrize("repo", ["backbone", "me/back bone", "a/b/c", "../x", "me/"])
def test_a_name_that_cannot_be_one_is_told_before_any_work(repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(UserError, match="OWNER/NAME"):
        hub.check(repo)


class TestCard:
    backbone = VisionTransformer(ViTSpec(16, 2, 2, 4, 16)).eval()
    backbone.preprocess = Preprocess(16, (0.5,) * 3, (0.5,) * 3)

    def card(self, weights: str, licence: str | None = None) -> str:
        lines = snippet("huggingface", "me/backbone", True)
        return model_card(weights, self.backbone, "huggingface", "me/backbone", lines, licence)

    @pytest.fixture
    def run(self, tmp_path):
        folder = tmp_path / "secret" / "run"
        folder.parent.mkdir()
        config = load(None, [f"data.root={tmp_path}/secret/images", "train.steps=20", "train.batch_size=10",
                             f"run.dir={folder}", f"data.labels={tmp_path}/secret/labels.csv",
                             f"train.resume={tmp_path}/secret/checkpoint"])  # fmt: skip
        config, _ = resolve(config, PoolFacts(200, 3, "folder"))
        directory = RunDirectory(folder)
        prepare(directory, config, 0)
        line = {"step": 20, "epoch": 1.0, "time/images_per_second": 2.0, "health/knn": 0.5}
        directory.metrics.write_text(json.dumps(line) + "\n", encoding="utf-8")
        results = {"caption": "Ten labels a class.", "columns": ["features", "1-NN"], "rows": [["a|b <i>", "91 %"]]}
        directory.results.write_text(json.dumps(results), encoding="utf-8")
        return folder

    def test_of_a_run_it_tells_training_figures_and_their_protocol_but_no_path(self, run):
        card = self.card(str(run), "mit")
        assert "secret" not in card
        assert "license: mit" in card
        for part in ("| images | 200 |", "20 of 20 at batch 10, 1.0 epochs", "100 seconds at 2 images/s", "Ten labels"):
            assert part in card
        assert "| a\\|b &lt;i> | 91 % |" in card
        assert "50.0%" in card
        assert "train.batch_size=10" in card

    @pytest.mark.parametrize("content", ["{}", "[1", '{"caption": "a", "columns": ["b"], "rows": [[1]]}'])
    def test_damaged_results_are_named(self, run, content):
        RunDirectory(run).results.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"results\.json"):
            self.card(str(run))

    @pytest.mark.parametrize("epoch", [{}, {"epoch": 0}, {"epoch": math.nan}, {"epoch": math.inf}, {"epoch": 5e-324}])
    def test_epochs_that_cannot_be_leave_the_number_of_images_open(self, run, epoch):
        RunDirectory(run).metrics.write_text(json.dumps({"step": 20, **epoch}) + "\n", encoding="utf-8")
        assert "| images | unknown |" in self.card(str(run))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_who_has_to_make_images_grey_is_told(self, channels):
        spec = replace(self.backbone.spec, in_chans=channels)
        backbone = VisionTransformer(spec)
        backbone.preprocess = Preprocess(16, (0.5,) * channels, (0.5,) * channels)
        for kind in ("huggingface", "timm"):
            card = model_card("some.pth", backbone, kind, "me/backbone", "", None)
            assert ('convert("L")' in card) == (channels == 1)

    def test_of_released_weights_the_licence_is_that_of_the_release(self):
        assert "license: apache-2.0" in self.card("dinov2_vits14")

    def test_of_a_file_nothing_is_made_up(self, tmp_path):
        card = self.card(str(tmp_path / "some.pth"))
        assert "license:" not in card.split("---")[1]
        assert "Figures" not in card
        assert "Not stated yet" in card
