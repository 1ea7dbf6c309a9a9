"""backbone.safetensors gives the network back as it was, says of itself what it is, and is never guessed at."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dino
from dino.errors import UserError
from dino.models import ResNet, ResNetSpec, ViTSpec, build, load_backbone, save_backbone
from dino.models.weights import load_strictly

PREPROCESSING = {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
TRAINING = {"objective": "dino", "steps": 10, "batch_size": 8, "seed": 0}
BACKBONES = {
    "dino": ViTSpec(16, 2, 2, 4, 16),
    "dinov2 with registers": ViTSpec(16, 2, 2, 4, 16, layer_scale=1e-5, registers=3, mask_token=True),
    "swiglu, offset": ViTSpec(16, 1, 2, 8, 24, ffn="swiglu", position_interpolation="offset"),
    "five channels": ViTSpec(16, 1, 2, 4, 16, in_chans=5),
    "resnet18": ResNetSpec("resnet18"),
    "grey resnet18": ResNetSpec("resnet18", in_chans=1),
    "rotary": ViTSpec(16, 2, 2, 4, 16, registers=1, positions="rotary"),
    "conv stem": ViTSpec(16, 1, 2, 4, 16, mask_token=True, stem="conv"),
}


def preprocessing(backbone) -> dict:
    channels = backbone.spec.in_chans
    return PREPROCESSING if channels == 3 else {"image_size": 16, "mean": [0.5] * channels, "std": [0.25] * channels}


@pytest.fixture
def saved(tmp_path):
    """A run directory with a small ViT's backbone, and the ViT."""
    backbone = build(BACKBONES["dino"])
    save_backbone(tmp_path / "backbone.safetensors", backbone, PREPROCESSING, TRAINING)
    return tmp_path / "backbone.safetensors", backbone


def header(path) -> dict:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


class TestRoundTrip:
    @pytest.mark.parametrize("name", BACKBONES)
    def test_gives_the_same_network(self, name, tmp_path, randomise):
        backbone = randomise(build(BACKBONES[name]))
        if isinstance(backbone, ResNet):  # running statistics are part of it
            backbone.train()(torch.randn(4, backbone.spec.in_chans, 32, 32))
        path = tmp_path / "backbone.safetensors"
        save_backbone(path, backbone, preprocessing(backbone), TRAINING)
        loaded = load_backbone(path)
        assert type(loaded) is type(backbone)
        assert loaded.spec == backbone.spec
        assert not loaded.training
        for key, value in backbone.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        images = torch.randn(2, backbone.spec.in_chans, 24, 48)
        with torch.no_grad():
            assert torch.equal(loaded(images), backbone.eval()(images))

    def test_a_run_directory_or_its_file(self, saved):
        path, _ = saved
        for weights in (path, str(path), path.parent, str(path.parent)):
            loaded = dino.load_backbone(weights)
            assert loaded.embed_dim == 16

    def test_half_precision_weights_keep_their_values(self, tmp_path):
        """A file holds what it was given, and a model of fp32 takes it up without loss."""
        backbone = build(BACKBONES["dino"]).to(torch.bfloat16)
        save_backbone(tmp_path / "b.safetensors", backbone, PREPROCESSING, TRAINING)
        loaded = load_backbone(tmp_path / "b.safetensors")
        for key, value in backbone.state_dict().items():
            assert torch.equal(loaded.state_dict()[key].float(), value.float())

    def test_preprocessing_comes_along(self, saved):
        """Shorter side to 16, centre crop, [0, 1], minus mean, over deviation."""
        loaded = load_backbone(saved[0])
        image = torch.full((3, 20, 40), 255, dtype=torch.uint8)
        result = loaded.preprocess(image)
        assert result.shape == (3, 16, 16)
        for channel, (mean, std) in enumerate(zip(PREPROCESSING["mean"], PREPROCESSING["std"], strict=True)):
            torch.testing.assert_close(result[channel], torch.full((16, 16), (1 - mean) / std))


class TestFile:
    @pytest.mark.parametrize("name", BACKBONES)
    def test_the_same_weights_give_the_same_bytes(self, name, tmp_path):
        backbone = build(BACKBONES[name])
        shuffled = dict(reversed(TRAINING.items()))
        for file, training in (("one", TRAINING), ("two", TRAINING), ("three", shuffled)):
            save_backbone(tmp_path / file, backbone, preprocessing(backbone), training)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()

    def test_all_metadata_sits_in_one_key_as_sorted_json(self, saved):
        metadata = header(saved[0])["__metadata__"]
        assert len(metadata) == 1
        (text,) = metadata.values()
        description = json.loads(text)
        assert text == json.dumps(description, sort_keys=True)
        assert (description["patch_size"], description["in_chans"], description["image_size"]) == (4, 3, 16)
        assert (description["mean"], description["std"]) == (PREPROCESSING["mean"], PREPROCESSING["std"])
        assert description["training"] == TRAINING

    def test_only_other_positions_and_stems_than_the_first_are_mentioned(self, tmp_path):
        """Files of before there were others have no such entry, and stay what they were."""
        specs = {}
        for name in ("dino", "rotary", "conv stem"):
            save_backbone(tmp_path / name, build(BACKBONES[name]), PREPROCESSING, TRAINING)
            specs[name] = json.loads(header(tmp_path / name)["__metadata__"]["dino"])["spec"]
        assert not {"positions", "stem"} & specs["dino"].keys()
        for key in ("positions", "stem"):  # digests are made of it
            assert key not in repr(BACKBONES["dino"])
        assert (specs["rotary"]["positions"], specs["conv stem"]["stem"]) == ("rotary", "conv")

    def test_names_and_values_are_those_of_the_module(self, saved):
        path, backbone = saved
        stored = load_file(path)
        assert stored.keys() == backbone.state_dict().keys()
        assert "blocks.0.attn.qkv.weight" in stored

    def test_nothing_else_is_left_in_the_folder(self, saved):
        assert list(saved[0].parent.iterdir()) == [saved[0]]

    def test_an_earlier_file_stays_whole_when_writing_fails(self, saved, monkeypatch):
        path, backbone = saved
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("dino.files.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_backbone(path, backbone, PREPROCESSING, {"steps": 11})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"no weights at '.*missing'"):
            load_backbone(tmp_path / "missing")
        with pytest.raises(UserError, match=r"backbone\.safetensors"):
            load_backbone(tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "text"])
    def test_a_damaged_file(self, saved, damage):
        path, _ = saved
        content = path.read_bytes()
        damaged = {"truncated": content[:-100], "empty": b"", "garbage": bytes(500), "text": b"{}" * 50}[damage]
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"backbone\.safetensors cannot be read"):
            load_backbone(path)

    def test_a_file_of_somebody_else(self, tmp_path):
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="holds no ViT or ResNet of a known layout"):
            load_backbone(tmp_path / "other.safetensors")

    def rewrite(self, path, change) -> None:
        """Store the same tensors with another description."""
        with safe_open(path, framework="pt") as archive:
            description = json.loads(archive.metadata()["dino"])
        change(description)
        save_file(load_file(path), path, metadata={"dino": json.dumps(description)})

    @pytest.mark.parametrize("key", ["family", "spec", "image_size", "mean", "std"])
    def test_a_description_that_lacks_something(self, saved, key):
        path, _ = saved
        self.rewrite(path, lambda description: description.pop(key))
        with pytest.raises(UserError, match=key):
            load_backbone(path)

    def test_a_description_of_a_later_version(self, saved):
        path, _ = saved
        self.rewrite(path, lambda description: description["spec"].update(unheard_of=True))
        with pytest.raises(UserError, match="unheard_of"):
            load_backbone(path)

    def test_a_description_that_is_no_json(self, saved):
        path, _ = saved
        save_file(load_file(path), path, metadata={"dino": "{'single': quotes}"})
        with pytest.raises(UserError, match="cannot be read"):
            load_backbone(path)

    def test_tensors_of_another_model(self, saved):
        path, _ = saved
        self.rewrite(path, lambda description: description["spec"].update(depth=3))
        with pytest.raises(UserError, match=r"12 missing: blocks\.2\."):
            load_backbone(path)


def test_every_mismatch_is_named_and_nothing_is_loaded():
    extra = {f"extra{index}": torch.ones(1) for index in range(50)}
    module = torch.nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(UserError) as caught:
        load_strictly(module, {"weight": torch.ones(3, 2)} | extra, "there.safetensors")
    text = str(caught.value)
    assert "there.safetensors does not fit the model" in text
    assert "1 missing: bias" in text
    assert "50 unexpected: extra0, extra1, extra10 …" in text
    assert "weight is (3, 2), not (2, 3)" in text
    assert torch.equal(module.weight, before)
