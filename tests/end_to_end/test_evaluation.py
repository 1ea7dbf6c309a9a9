"""Evaluations as a user starts them, on one process and on two: same figures, every image once, plain words on failure.

Most of a short run is the import of torch: commands that need no process of their own run in this one.
"""

import importlib.util
import io
import json
import re
import sys
import warnings
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from launching import REPOSITORY, Runs, error_of, write_images
from PIL import Image
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

import dino
from dino import cli
from dino.models import ResNet, ResNetSpec, VisionTransformer, ViTSpec, save_backbone

pytestmark = pytest.mark.slow

COLOURS = {"ant": (190, 60, 60), "bee": (60, 190, 60), "cow": (60, 60, 190)}
BROKEN = ("ant/03-cut.png", "cow/text.png")
COUNT = 8  # images of each class
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))


def start(runs: Runs, *words: object, two: bool = False, **variables: str) -> CompletedProcess:
    """A command of eval/ in a process of its own, or in two."""
    script, *arguments = words
    return runs.fork([REPOSITORY / str(script), *arguments], two, **{"OMP_NUM_THREADS": "1", **variables})


def finish(runs: Runs, *words: object, **options) -> CompletedProcess:
    """`start`; the test fails unless the exit code is 0."""
    done = start(runs, *words, **options)
    assert done.returncode == 0, done.stderr
    return done


def command(folder: Path, *words: object, missing: str = "") -> CompletedProcess:
    """`dino …` in this process.

    Args:
        folder: of the cache.
        missing: a library that is not installed for it.
    """
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        patch.setattr(sys, "argv", ["dino", *map(str, words)])
        patch.setenv("DINO_CACHE", str(folder / "cache-of-commands"))
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        if missing:
            patch.setitem(sys.modules, missing, None)
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # A progress bar ends with a return to the line's beginning.
    return CompletedProcess(words, code, out.getvalue(), errors.getvalue().replace("\r", "\n"))


class Place(NamedTuple):
    """What the commands here are given.

    Attributes:
        folder: for what they write.
        images: a folder for each of three classes; two of the files are none.
        weights: a run directory with a small ViT of 4 blocks.
    """

    folder: Path
    images: Path
    weights: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    found = Place(*(tmp_path_factory.mktemp("evaluation") / name for name in ("out", "images", "weights")))
    for path in found:
        path.mkdir(parents=True)
    labelled_images(found.images, COUNT)
    whole = (found.images / "ant" / "02.png").read_bytes()
    (found.images / BROKEN[0]).write_bytes(whole[: len(whole) // 2])
    (found.images / BROKEN[1]).write_text("These are notes.\n")
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTSpec(16, 4, 2, 4, 16), initialisation="fan_in")
    preprocessing = {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    save_backbone(found.weights / "backbone.safetensors", backbone, preprocessing, {})
    return found


def labelled_images(root: Path, count: int, *classes: str) -> Path:
    """`count` images of each class, of noise around a colour more or less the class's."""
    generator = np.random.default_rng(0)
    for name in classes or COLOURS:
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = np.array(COLOURS[name]) + generator.normal(0, 70, 3)
            pixels = colour + generator.normal(0, 60, (20, 18 + number, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def wanted(place) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the readable images in order, their class tokens and their mean patch tokens, one image at a time."""
    backbone = dino.load_backbone(place.weights)
    names = [f"{name}/{number:02d}.png" for name in COLOURS for number in range(COUNT)]
    class_tokens, patches = [], []
    for name in names:
        image = torch.from_numpy(np.array(Image.open(place.images / name).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            features = backbone.forward_features(backbone.preprocess(image)[None])
        class_tokens.append(features["x_norm_clstoken"][0].numpy())
        patches.append(features["x_norm_patchtokens"][0].mean(dim=0).numpy())
    return names, np.stack(class_tokens), np.stack(patches)


@pytest.fixture(scope="module")
def judged(runs, place) -> dict[str, tuple[CompletedProcess, dict]]:
    """knn.py and linear.py on one process: what they printed, and their --out."""
    results = {}
    (place.folder / "wandb").mkdir()
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(place.folder / "wandb"), "WANDB_SILENT": "true"}
    for name in ("knn", "linear"):
        out = place.folder / f"{name}.json"
        beside = () if name == "knn" else ("--no-untrained",)
        words = (f"eval/{name}.py", "--weights", place.weights, "--data", place.images, "--out", out, *beside)
        done = finish(runs, *words, "--wandb", "letters", **variables, DINO_CACHE=str(place.folder / "cache"))
        results[name] = done, json.loads(out.read_text())[str(place.weights)]
    return results


@pytest.fixture(scope="module")
def written(place) -> dict[str, CompletedProcess]:
    """What embed, visualize and export print on one process."""
    out, weights = place.folder, ("--weights", place.weights)
    images = (*weights, "--data", place.images)
    commands = {
        "both": ("embed", *images, "--out", out / "new" / "folder" / "both.npy", "--tokens", "both"),
        "patch": ("embed", *images, "--out", out / "patch.npy", "--tokens", "patch"),
        "parquet": ("embed", *images, "--out", out / "class.parquet"),
        "visualize": ("visualize", *images, "--rows", 4, "--out", out / "pictures"),
        "timm": ("export", *weights, "--to", "timm", "--out", out / "timm"),
        "huggingface": ("export", *weights, "--to", "huggingface", "--out", out / "huggingface"),
    }
    if HAS_ONNX:
        commands["onnx"] = ("export", *weights, "--to", "onnx", "--out", out / "onnx")
    return {name: command(out, *words) for name, words in commands.items()}


def assert_holds(path: Path, wanted: tuple[list[str], np.ndarray, np.ndarray]) -> None:
    """A parquet file has every readable image once, with its label and class token."""
    names, class_tokens, _ = wanted
    table = pq.read_table(path)
    assert table["path"].to_pylist() == names
    assert table["label"].to_pylist() == [name.split("/")[0] for name in names]
    assert np.array(table["embedding"].to_pylist()) == pytest.approx(class_tokens, abs=1e-5)


class TestProbes:
    def test_knn_is_that_of_the_class_tokens(self, judged, place, wanted):
        """By scikit-learn on features taken one image at a time, and its own split of every class alike."""
        names, tokens, _ = wanted
        labels = [name.split("/")[0] for name in names]
        train, test, of_train, truth = train_test_split(tokens, labels, test_size=0.3, random_state=0, stratify=labels)
        peer = KNeighborsClassifier(10, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
        done, results = judged["knn"]
        assert results == {"knn/top1_k10": pytest.approx(peer.fit(train, of_train).score(test, truth))}
        assert 1 / 3 < results["knn/top1_k10"] < 1
        assert f"{place.weights}: 16 to learn from, 8 to test, 3 classes\n  knn/top1_k10  " in done.stdout
        assert re.search(r"chance: always the largest class +37\.5 %\n  untrained: knn/top1_k10 +\d", done.stdout)

    def test_linear_gives_every_probe(self, judged):
        done, results = judged["linear"]
        few = {f"few/{count}_{probe}" for count in (1, 2) for probe in ("knn", "logistic")}
        assert set(results) == {"linear/sweep", "linear/sweep_chosen", "linear/logistic", *few}
        assert "block(s)" in results.pop("linear/sweep_chosen")
        assert all(1 / 3 < value <= 1 for value in results.values())
        assert all(name in done.stdout for name in results)

    def test_images_left_out_are_named(self, judged):
        for name in BROKEN:
            assert judged["knn"][0].stderr.count(f"left out: {name}: ") == 1

    def test_wandb_has_an_offline_run_with_the_figures(self, judged, place):
        files = sorted((place.folder / "wandb" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent)
        assert len(files) == 2
        for file, figure in zip(files, (b"knn/top1_k10", b"linear/sweep"), strict=True):
            assert figure in file.read_bytes()
            assert b"letters" in file.read_bytes()

    @pytest.mark.parametrize(
        ("name", "options"), [("knn", []), ("linear", ["--probes", "logistic", "few", "--no-untrained"])]
    )
    def test_two_processes_give_the_same(self, runs, place, judged, name, options):
        out = place.folder / f"{name}-of-two.json"
        words = (f"eval/{name}.py", "--weights", place.weights, "--data", place.images, "--out", out, *options)
        done = finish(runs, *words, two=True, DINO_CACHE=str(place.folder / f"cache-of-two-{name}"))
        expected = {what: value for what, value in judged[name][1].items() if not what.startswith("linear/sweep")}
        assert json.loads(out.read_text()) == {str(place.weights): pytest.approx(expected)}
        assert done.stdout.count("16 to learn from, 8 to test") == 1
        for broken in BROKEN:
            assert done.stderr.count(f"left out: {broken}: ") == 1


class TestEmbeddings:
    def test_parquet_has_every_image_once(self, written, place, wanted):
        assert written["parquet"].returncode == 0, written["parquet"].stderr
        assert_holds(place.folder / "class.parquet", wanted)
        assert written["parquet"].stdout == f"{place.folder / 'class.parquet'}: 24 × 16, 2 left out\n"

    @pytest.mark.parametrize("tokens", ["patch", "both"])
    def test_npy_has_the_tokens_asked_for_and_the_paths_beside(self, written, place, wanted, tokens):
        path = place.folder / ("patch.npy" if tokens == "patch" else "new/folder/both.npy")
        assert written[tokens].returncode == 0
        names, class_tokens, patches = wanted
        expected = patches if tokens == "patch" else np.hstack([class_tokens, patches])
        assert np.load(path) == pytest.approx(expected, abs=1e-5)
        assert path.with_suffix(".txt").read_text().splitlines() == names

    def test_nothing_unfinished_is_left(self, written, place):
        assert not list(place.folder.rglob("*.partial"))

    def test_two_processes_give_the_same(self, runs, place, wanted):
        out = place.folder / "class-of-two.parquet"
        words = ("eval/embed.py", "--weights", place.weights, "--data", place.images, "--out", out)
        done = finish(runs, *words, two=True)
        assert_holds(out, wanted)
        assert done.stdout == f"{out}: 24 × 16, 2 left out\n"
        for broken in BROKEN:
            assert done.stderr.count(f"left out: {broken}: ") == 1


class TestEmbedInPython:
    def test_gives_what_the_command_writes_twice_in_one_process(self, place, wanted):
        names, class_tokens, patch_means = wanted
        for weights in (place.weights, dino.load_backbone(place.weights)):
            features = dino.embed(weights, place.images)
            assert features.names == names
            assert features.labels == [name.split("/")[0] for name in names]
            assert features.class_tokens == pytest.approx(class_tokens, abs=1e-5)
            assert features.patch_means == pytest.approx(patch_means, abs=1e-5)
            assert features.left_out == len(BROKEN)

    def test_takes_a_data_set_of_the_users_own(self, place, wanted):
        images = [Image.open(place.images / name).convert("RGB") for name in wanted[0][:3]]
        features = dino.embed(place.weights, images)
        assert features.class_tokens == pytest.approx(wanted[1][:3], abs=1e-5)
        assert features.labels is None


class TestPictures:
    def test_all_are_there(self, written, place):
        assert written["visualize"].returncode == 0, written["visualize"].stderr
        page = (place.folder / "pictures" / "page.html").read_text()
        for name in ("attention", "pca", "foreground", "neighbours", "map"):
            path = place.folder / "pictures" / f"{name}.png"
            with Image.open(path) as picture:
                assert min(picture.size) > 50
                assert len(picture.convert("RGB").getcolors(10**6)) > 20
            assert str(path) in written["visualize"].stdout
        assert page.count("data:image/png") == 5
        assert "26 from" in page


class TestExports:
    @pytest.mark.parametrize("kind", ["timm", "huggingface", "onnx"])
    def test_serves_the_sizes_it_names(self, written, place, kind):
        done = written[kind]
        assert done.returncode == 0, done.stderr
        sizes = (16, 32) if "any size that patches of 4 divide" in done.stdout else (16,)
        for size in sizes:
            assert f"at {size}×{size}: class tokens differ by at most" in done.stdout
        assert len(sizes) == 2 or "square images of 16 pixels only" in done.stdout

    @pytest.mark.parametrize("kind", ["timm", "huggingface"])
    def test_has_every_parameter(self, written, place, kind):
        count = sum(tensor.numel() for tensor in dino.load_backbone(place.weights).state_dict().values())
        exported = dino.load_backbone(place.folder / kind).state_dict()
        assert sum(tensor.numel() for tensor in exported.values()) == count

    def test_timm_opens_its_arguments(self, written, place):
        timm = pytest.importorskip("timm")
        arguments = json.loads((place.folder / "timm" / "arguments.json").read_text())
        model = timm.models.vision_transformer.VisionTransformer(**arguments).eval()
        model.load_state_dict(load_file(place.folder / "timm" / "model.safetensors"))
        backbone = dino.load_backbone(place.weights)
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(model.forward_features(images)[:, 0], backbone(images), atol=1e-4)

    def test_timm_creates_the_model_from_the_folder(self, written, place):
        """As its users do, with a head of their own too."""
        timm = pytest.importorskip("timm")
        model = timm.create_model(f"local-dir:{place.folder / 'timm'}", pretrained=True).eval()
        backbone = dino.load_backbone(place.weights)
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(model(images), backbone(images), atol=1e-4)
        data = timm.data.resolve_model_data_config(model)
        assert list(data["mean"]) == pytest.approx(backbone.preprocess.mean)
        assert data["input_size"] == (3, 16, 16)
        headed = timm.create_model(f"local-dir:{place.folder / 'timm'}", pretrained=True, num_classes=5)
        assert headed(images).shape == (2, 5)

    def test_a_model_card_tells_how_it_is_loaded_and_nothing_of_the_machine(self, written, place):
        card = (place.folder / "timm" / "README.md").read_text(encoding="utf-8")
        assert "library_name: timm" in card
        assert "timm.create_model('local-dir:timm', pretrained=True)" in card
        assert f"local-dir:{place.folder / 'timm'}" in written["timm"].stdout
        assert str(place.folder) not in card
        assert "Weights that you train are yours" in card

    def test_hugging_face_opens_weights_and_preprocessing(self, written, place, wanted):
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModel.from_pretrained(place.folder / "huggingface").eval()
        processor = transformers.AutoImageProcessor.from_pretrained(place.folder / "huggingface")
        with Image.open(place.images / "ant" / "00.png") as image, torch.no_grad():
            found = model(**processor(image.convert("RGB"), return_tensors="pt")).last_hidden_state[0, 0]
        assert found.numpy() == pytest.approx(wanted[1][0], abs=0.15)  # its resampling rounds to grey levels
        assert np.abs(found.numpy() - wanted[1][COUNT]).max() > 0.3  # another image's

    @pytest.mark.skipif(not HAS_ONNX, reason="needs onnxscript and onnxruntime")
    def test_onnx_takes_any_batch_of_any_size(self, written, place):
        import onnxruntime

        session = onnxruntime.InferenceSession(place.folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
        backbone = dino.load_backbone(place.weights)
        for shape in ((1, 3, 16, 16), (5, 3, 24, 32)):
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            (found,) = session.run(["class_token"], {"images": images.numpy()})
            with torch.no_grad():
                assert found == pytest.approx(backbone(images).numpy(), abs=1e-4)


BAD = {  # a command and what its error says; the names in braces are those of `bad_places`
    "knn, no classes": ("knn --weights {vit} --data {flat}", "has no classes: put each class's images into a folder"),
    "knn, one class": ("knn --weights {vit} --data {one_class}", "has no classes"),
    "linear, no classes": ("linear --weights {vit} --data {flat}", "has no classes"),
    "knn, class of one image": ("knn --weights {vit} --data {lone}", "class 'bee' has 1 image(s), too few to split"),
    "linear, class of one image": ("linear --weights {vit} --data {lone}", "class 'bee' has 1 image(s), too few"),
    "knn, class of broken images": ("knn --weights {vit} --data {torn}", "class 'cow' has 0 image(s), too few"),
    "knn, test of other classes": ("knn --weights {vit} --data {lone} --test {images}", "were not learnt"),
    "knn, unknown weights": ("knn --weights dinov2_vits15 --data {images}", "did you mean dinov2_vits14"),
    "linear, unknown weights": ("linear --weights {out}/none --data {images}", "no weights at '"),
    "embed, unknown weights": ("embed --weights none --data {images} --out {out}/a.npy", "no weights at 'none'"),
    "visualize, unknown weights": ("visualize --weights none --data {images} --out {out}/a", "no weights at 'none'"),
    "export, unknown weights": ("export --weights none --to timm --out {out}/a", "no weights at 'none'"),
    "knn, no folder": ("knn --weights {vit} --data {out}/none", "does not exist"),
    "knn, empty folder": ("knn --weights {vit} --data {empty}", "no image in"),
    "linear, empty folder": ("linear --weights {vit} --data {empty}", "no image in"),
    "embed, empty folder": ("embed --weights {vit} --data {empty} --out {out}/a.npy", "no image in"),
    "visualize, empty folder": ("visualize --weights {vit} --data {empty} --out {out}/a", "no image in"),
    "embed, only broken images": ("embed --weights {vit} --data {broken} --out {out}/a.npy", "no image of 4 in"),
    "visualize, only broken images": ("visualize --weights {vit} --data {broken} --out {out}/a", "can be read"),
    "embed, another suffix": ("embed --weights {vit} --data {images} --out {out}/a.csv", "end in .parquet or .npy"),
    "export, ResNet": ("export --weights {resnet} --to timm --out {out}/a", "is a ResNet"),
    "export, library missing": ("export --weights {vit} --to timm --out {out}/a", "timm is needed"),
    "knn, more classes than the test has images": ("knn --weights {vit} --data {pairs}", "too few"),
    "knn, broken images to learn from": ("knn --weights {vit} --data {broken} --test {lone}", "can be read"),
    "knn, broken images to test on": ("knn --weights {vit} --data {images} --test {broken}", "can be read"),
    "linear, broken images to test on": ("linear --weights {vit} --data {images} --test {broken}", "can be read"),
    "knn, unknown kind": ("knn --weights {vit} --data {images} --kind omnigolt", "omniglot"),
    "embed, unknown kind": ("embed --weights {vit} --data {images} --kind omnigolt --out {out}/b.npy", "omniglot"),
    "embed, out is a folder": ("embed --weights {vit} --data {images} --out {out}/folder.npy", "folder.npy"),
    "export, half a patch, timm": ("export --weights {vit} --to timm --out {out}/c --image-size 18", "patch size 4"),
    "export, half a patch, huggingface": (
        "export --weights {vit} --to huggingface --out {out}/d --image-size 18",
        "patch size 4",
    ),
    "knn, out below a file": (
        "knn --weights {vit} --data {images} --out {resnet}/knn.json",
        "knn.json cannot be written",
    ),
    "linear, out is a folder": ("linear --weights {vit} --data {images} --out {out}/folder.npy", "name a file"),
}


@pytest.fixture(scope="module")
def refused(place) -> dict[str, CompletedProcess]:
    """All commands of BAD."""
    out = place.folder / "bad"
    places = {name: out / name for name in ("flat", "one_class", "lone", "torn", "pairs", "empty", "broken")}
    write_images(places["flat"], 4)
    labelled_images(places["one_class"], 4, "ant")
    labelled_images(places["lone"], 4, "ant")
    labelled_images(places["lone"], 1, "bee")
    labelled_images(places["torn"], 4)
    labelled_images(places["pairs"], 2)
    labelled_images(places["broken"], 2, "ant", "bee")
    for path in (*places["torn"].glob("cow/*"), *places["broken"].glob("*/*")):
        path.write_text("no image")
    for folder in (places["empty"], out / "folder.npy"):
        folder.mkdir()
    torch.manual_seed(0)
    preprocessing = {"image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    save_backbone(out / "resnet.safetensors", ResNet(ResNetSpec("resnet18")), preprocessing, {})
    places |= {"vit": place.weights, "images": place.images, "resnet": out / "resnet.safetensors", "out": out}
    results = {}
    for name, (line, _) in BAD.items():
        missing = "timm" if name == "export, library missing" else ""
        results[name] = command(out, *(word.format(**places) for word in line.split()), missing=missing)
    return results


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_ends_in_one_line_that_says_why(refused, place, name):
    message = error_of(refused[name])
    assert BAD[name][1] in message
    assert message.count("\n") == 1
    assert refused[name].stdout == ""
    assert not (place.folder / "bad" / "a.npy").exists()
