"""Every image goes through the backbone once, and a cache gives back nothing but what it was asked for."""

import itertools
import logging
import shutil

import numpy as np
import pytest
import torch

from dino import files, precision
from dino.data import UnreadableImage
from dino.evaluation import features
from dino.evaluation.features import Features, cached, content_digest, extract, read_batches
from dino.models import Preprocess, ResNet, ResNetSpec, VisionTransformer, ViTSpec

SPEC = ViTSpec(16, 5, 2, 4, 16, registers=2)
PREPROCESS = Preprocess(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Pool:
    """Images of noise, of several sizes; some cannot be read."""

    channels, kind, labels = 3, "folder", None

    def __init__(self, count: int = 11, broken: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(0)
        sizes = [(16 + index % 3, 17) for index in range(count)]
        self.pixels = [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
        self.names = [f"image-{index}.png" for index in range(count)]
        self.broken = broken
        self.reads: list[int] = []

    def read(self, index: int, enough: float | None = None) -> torch.Tensor:
        self.reads.append(index)
        if index in self.broken:
            raise UnreadableImage("it is torn")
        return self.pixels[index]


def vit_of(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(SPEC, initialisation="fan_in").eval()


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return vit_of(0)


def alone(backbone, pool: Pool, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Class token and mean patch token of one image by itself."""
    with torch.no_grad():
        outputs = backbone.forward_features(PREPROCESS(pool.pixels[index])[None])
    return outputs["x_norm_clstoken"][0].numpy(), outputs["x_norm_patchtokens"][0].mean(dim=0).numpy()


def assert_are_of(features: Features, backbone, pool: Pool, indices: list[int]) -> None:
    """Row by row the features of these images."""
    for class_token, patch_mean, index in zip(features.class_tokens, features.patch_means, indices, strict=True):
        expected = alone(backbone, pool, index)
        assert class_token == pytest.approx(expected[0], abs=1e-5)
        assert patch_mean == pytest.approx(expected[1], abs=1e-5)


class TestReadBatches:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_gives_each_batch_in_order_and_says_why_what_is_missing(self, workers):
        batches = [[3, 1], [4], [0, 5, 2]]
        read = list(read_batches(Pool(6, broken=(1, 4)), batches, torch.Tensor.sum, workers))
        assert [batch.positions for batch in read] == [[0], [], [0, 1, 2]]
        assert [batch.reasons for batch in read] == [{1: "it is torn"}, {4: "it is torn"}, {}]
        expected = [[Pool(6).pixels[index].sum() for index in indices] for indices in ([3], [], [0, 5, 2])]
        assert [batch.inputs for batch in read] == expected


class TestExtract:
    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_rows_are_the_images_asked_for_each_once(self, vit, batch_size):
        pool, indices = Pool(), [7, 2, 10, 0, 5]
        features = extract(vit, pool, indices, PREPROCESS, batch_size)
        assert features.rows.tolist() == [0, 1, 2, 3, 4]
        assert sorted(pool.reads) == sorted(indices)
        assert features.blocks.shape == (5, 1, 16)
        assert features.blocks.dtype == features.patch_means.dtype == np.float32
        assert_are_of(features, vit, pool, indices)
        assert np.array_equal(features.both, np.hstack([features.class_tokens, features.patch_means]))

    def test_images_differ_so_that_a_mix_up_would_be_seen(self, vit):
        pool = Pool()
        tokens = np.stack([alone(vit, pool, index)[0] for index in range(len(pool.names))])
        distances = np.linalg.norm(tokens[:, None] - tokens[None], axis=2) + 10 * np.eye(len(tokens))
        assert distances.min() > 0.01

    @pytest.mark.parametrize("batch_size", [1, 3, 100])  # 1: batches in which no image is left
    def test_unreadable_images_are_left_out_each_with_a_warning(self, vit, caplog, batch_size):
        """Rows count among the images asked for."""
        pool, indices = Pool(broken=(0, 4, 5)), [*range(1, 11), 0]
        features = extract(vit, pool, indices, PREPROCESS, batch_size)
        assert features.rows.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
        assert_are_of(features, vit, pool, [indices[row] for row in features.rows])
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == [f"left out: image-{index}.png: it is torn" for index in (4, 5, 0)]

    @pytest.mark.parametrize("blocks", [1, 4])
    def test_no_image_can_be_read(self, vit, blocks):
        features = extract(vit, Pool(3, broken=(0, 1, 2)), range(3), PREPROCESS, blocks=blocks)
        assert features.blocks.shape == (0, blocks, 16)
        assert features.patch_means.shape == (0, 16)
        assert features.rows.shape == (0,)

    @pytest.mark.parametrize("blocks", [2, 5])
    def test_last_blocks_are_those_of_dinov2_with_the_norm_the_last_one_last(self, vit, blocks):
        """Against each block's output taken with a hook, brought through the norm by hand."""
        pool = Pool(6)
        outputs: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in vit.blocks]
        with torch.no_grad():
            images = torch.stack([PREPROCESS(image) for image in pool.pixels])
            layers = vit.get_intermediate_layers(images, n=blocks, return_class_token=True, norm=True)
            tokens = [vit.norm(output.view(6, -1, 16)) for output in outputs[-blocks:]]
        for hook in hooks:
            hook.remove()
        features = extract(vit, pool, range(6), PREPROCESS, blocks=blocks)
        assert features.blocks.shape == (6, blocks, 16)
        for block in range(blocks):
            assert features.blocks[:, block] == pytest.approx(layers[block][1].numpy(), abs=1e-5)
            assert features.blocks[:, block] == pytest.approx(tokens[block][:, 0].numpy(), abs=1e-5)
        assert_are_of(features, vit, pool, list(range(6)))  # class token of the last block, patches as with one block

    def test_resnet_gives_pooled_features_and_the_mean_of_its_last_map(self):
        torch.manual_seed(0)
        backbone, pool = ResNet(ResNetSpec("resnet18")).eval(), Pool(3)
        features = extract(backbone, pool, [2, 0], PREPROCESS)
        with torch.no_grad():
            pooled = backbone(torch.stack([PREPROCESS(pool.pixels[index]) for index in (2, 0)])).numpy()
        assert features.blocks.shape == (2, 1, 512)
        assert features.class_tokens == pytest.approx(pooled, abs=1e-4)
        assert features.patch_means == pytest.approx(pooled, abs=1e-4)

    def test_bf16_gives_nearly_the_same_in_fp32(self, vit):
        pool = Pool()
        exact, rounded = (extract(vit, pool, range(11), PREPROCESS, precision=asked) for asked in ("fp32", "bf16"))
        assert rounded.class_tokens.dtype == rounded.patch_means.dtype == np.float32
        differences = np.linalg.norm(rounded.both - exact.both, axis=1) / np.linalg.norm(exact.both, axis=1)
        assert 0 < differences.max() < 0.02

    def test_backbone_is_left_as_it_was(self, vit):
        before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        extract(vit, Pool(3), range(3), PREPROCESS)
        assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in vit.parameters())


def assert_equal(first: Features, second: Features) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


class TestCached:
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture(autouse=True)
    def extracted(self, monkeypatch) -> list[Features]:
        """What `extract` has given so far: other features at every call."""
        calls: list[Features] = []

        def extract(*given, **options) -> Features:
            blocks = np.random.default_rng(len(calls)).normal(size=(40, 2, 16)).astype(np.float32)
            calls.append(Features(blocks, 2 * blocks[:, 0], np.arange(40)[::-1].copy()))
            return calls[-1]

        monkeypatch.setattr(features, "extract", extract)
        return calls

    def ask(self, backbone, content: str = "data", preprocessing: str = "way", precision: str = "auto") -> Features:
        texts = {"content": content, "preprocessing": preprocessing}
        return cached(backbone, Pool(), range(11), PREPROCESS, precision=precision, **texts)

    def test_computes_once(self, vit, directory, extracted):
        for backbone in (vit, vit, vit_of(0)):  # the last: the same weights, loaded anew
            assert_equal(self.ask(backbone), extracted[0])
        assert len(extracted) == 1
        assert len([path for path in directory.rglob("*") if path.is_file()]) == 1

    def test_what_a_device_made_in_bf16_is_another_entry(self, vit, extracted, monkeypatch):
        self.ask(vit)
        monkeypatch.setattr(precision, "prefers_bf16", lambda device: True)
        for asked in ("auto", "bf16"):
            assert_equal(self.ask(vit, precision=asked), extracted[1])
        assert_equal(self.ask(vit, precision="fp32"), extracted[0])

    @pytest.mark.parametrize("other", ["weights", "one weight", "architecture", "data", "preprocessing", "border"])
    def test_anything_else_is_another_entry(self, vit, other, extracted):
        backbone = vit_of(1) if other == "weights" else vit_of(0)
        if other == "one weight":
            with torch.no_grad():
                backbone.norm.bias[3] += 1e-6
        if other == "architecture":  # the same tensors, but positions are resampled in another way
            backbone = VisionTransformer(ViTSpec(16, 5, 2, 4, 16, registers=2, position_interpolation="offset"))
            backbone.load_state_dict(vit.state_dict())
        texts = {"data": ("other", "way"), "preprocessing": ("data", "other"), "border": ("dat", "away")}
        self.ask(vit)
        assert_equal(self.ask(backbone, *texts.get(other, ("data", "way"))), extracted[1])
        assert_equal(self.ask(vit), extracted[0])

    @pytest.mark.parametrize("damage", ["empty", "half", "one byte", "text"])
    def test_damaged_entry_is_computed_anew(self, vit, directory, damage, extracted):
        self.ask(vit)
        (file,) = directory.rglob("*.npz")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        damaged = {"empty": b"", "half": content[: len(content) // 2], "one byte": content, "text": b"not found\n" * 99}
        file.write_bytes(damaged[damage])
        assert_equal(self.ask(vit), extracted[1])
        assert_equal(self.ask(vit), extracted[1])  # mended

    @pytest.mark.parametrize("changed", ["another entry's file", "a number", "the order", "an earlier version's"])
    def test_a_whole_file_of_other_content_is_computed_anew(self, vit, directory, changed, extracted, caplog):
        self.ask(vit)
        (file,) = directory.rglob("*.npz")
        arrays = dict(np.load(file))
        self.ask(vit, "other data")
        (other,) = set(directory.rglob("*.npz")) - {file}
        if changed == "another entry's file":
            shutil.copyfile(other, file)
        else:
            arrays["patch_means"][3, 5] += changed == "a number"
            if changed == "the order":
                arrays["rows"] = arrays["rows"][::-1]
            if changed == "an earlier version's":
                del arrays["seal"]
            np.savez(file, **arrays)
        assert_equal(self.ask(vit), extracted[2])
        assert f"{file} is " in caplog.text
        assert_equal(self.ask(vit), extracted[2])

    def test_write_that_was_cut_off_is_not_taken_for_an_entry(self, vit, monkeypatch, extracted):
        def cut_off(file, **arrays):
            file.write(b"PK\x03\x04")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(features.np, "savez", cut_off)
            with pytest.raises(KeyboardInterrupt):
                self.ask(vit)
        assert_equal(self.ask(vit), extracted[1])
        assert_equal(self.ask(vit), extracted[1])

    def test_folder_that_cannot_be_written_costs_no_features(self, vit, directory, extracted):
        directory.write_text("a file where the directory should be")
        assert_equal(self.ask(vit), extracted[0])

    def test_another_process_that_writes_the_same_entry_is_no_obstacle(self, vit, monkeypatch, extracted):
        """As two processes of a launch do, at the same moment: while one writes, the other comes through."""
        plain, processes = np.savez, itertools.count()
        monkeypatch.setattr(files.os, "getpid", lambda: next(processes))

        def meanwhile(file, **arrays):
            monkeypatch.setattr(features.np, "savez", plain)
            self.ask(vit)
            plain(file, **arrays)

        monkeypatch.setattr(features.np, "savez", meanwhile)
        assert_equal(self.ask(vit), extracted[0])
        assert_equal(self.ask(vit), extracted[0])
        assert len(extracted) == 2


class TestContentDigest:
    def test_same_pixels_same_digest_whatever_their_names(self):
        pool, renamed = Pool(), Pool()
        renamed.names = [name.replace("image", "picture") for name in pool.names]
        assert content_digest(pool, range(11)) == content_digest(renamed, range(11))

    def test_everything_that_changes_features_changes_it(self):
        pool, changed, turned, torn, torn_elsewhere = Pool(), Pool(), Pool(), Pool(broken=(4,)), Pool(broken=(5,))
        changed.pixels[4] = changed.pixels[4].clone()
        changed.pixels[4][0, 0, 0] ^= 1
        turned.pixels[4] = turned.pixels[4].transpose(1, 2).contiguous()  # it is square
        digests = [content_digest(other, range(11)) for other in (pool, changed, turned, torn, torn_elsewhere)]
        digests += [content_digest(pool, indices) for indices in (range(10), [1, 0, *range(2, 11)], range(10, -1, -1))]
        assert len(set(digests)) == len(digests)

    def test_same_bytes_in_another_shape_are_other_images(self):
        flat, high = Pool(1), Pool(1)
        pixels = torch.arange(96, dtype=torch.uint8)
        flat.pixels, high.pixels = [pixels.view(3, 4, 8)], [pixels.view(3, 8, 4)]
        assert content_digest(flat, [0]) != content_digest(high, [0])
