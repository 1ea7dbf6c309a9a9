"""Presets are those that were published, and settings change what they say."""

from dataclasses import replace

import pytest
from material import PRESETS, drawn, keys_of, preset

from dino.config.read import get, leaves
from dino.config.schema import Config
from dino.errors import UserError
from dino.training.settings import load
from dino.views.ops import AUGMENTATIONS
from dino.views.ops.jitter import CHANGES
from dino.views.spec import PRESETS as TABLE
from dino.views.spec import Preset

COLOURS = {"flip": 0.5, "jitter": 0.8, "grey": 0.2}


class TestPresets:
    """Published numbers: reference/meta-systems.md §1 and §2a, from the repositories' code."""

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_probabilities(self, name):
        spec = preset(name)
        first, second = spec.globals_
        assert first.amounts == {**COLOURS, "blur": 1.0}
        assert second.amounts == {**COLOURS, "blur": 0.1, "solarize": 0.2}
        assert [view.amounts for view in spec.locals_] == [{**COLOURS, "blur": 0.5}] * 3

    @pytest.mark.parametrize(
        ("name", "jitter", "strengths"),
        [
            ("simclr", "jitter_strong", (0.8, 0.8, 0.8, 0.2)),  # Chen et al. 2020, appendix A, s = 1
            ("swav", "jitter_strong", (0.8, 0.8, 0.8, 0.2)),
            ("moco_v2", "jitter_moco", (0.4, 0.4, 0.4, 0.1)),
        ],
    )
    def test_views_of_contrastive_methods_are_all_alike(self, name, jitter, strengths):
        spec = preset(name)
        assert [view.amounts for view in spec.views] == [{"flip": 0.5, jitter: 0.8, "grey": 0.2, "blur": 0.5}] * 5
        draw = drawn([spec.views[0]], keys_of(4000))[jitter]
        middles = (1, 1, 1, 0)
        for what, strength, middle in zip(CHANGES, strengths, middles, strict=True):
            assert draw[what].min() == pytest.approx(middle - strength, abs=0.01)
            assert draw[what].max() == pytest.approx(middle + strength, abs=0.01)
        assert [view.amounts for view in preset(name, jitter=0.0).views] == [
            {"flip": 0.5, jitter: 0.0, "grey": 0.2, "blur": 0.5}
        ] * 5

    def test_byols_are_those_that_dino_took_over(self):
        """But for the blur's kernel of 23 pixels."""
        assert [view.amounts for view in preset("byol").globals_] == [view.amounts for view in preset("dino").globals_]
        assert {view.blur_kernel for name in ("byol", "simclr") for view in preset(name).views} == {23}

    def test_dinov2_blurs_with_9_pixels_and_dino_with_three_sigma(self):
        """DINO blurs with PIL's Gaussian of any extent: its kernel must hold 3 × the largest sigma of 2 each side."""
        assert {view.blur_kernel for view in preset("dinov2").views} == {9}
        assert min(view.blur_kernel for view in preset("dino").views) >= 2 * 3 * 2 + 1

    def test_inverted_blur_is_what_the_released_weights_had(self):
        views, published = preset("dinov2", inverted_blur=True).views, preset("dinov2").views
        assert [view.amounts["blur"] for view in views] == [0.0, 0.9, 0.5, 0.5, 0.5]
        for view, other in zip(views, published, strict=True):
            assert replace(view, amounts={**view.amounts, "blur": other.amounts["blur"]}) == other
        assert preset("line_art", inverted_blur=True) == preset("line_art")

    def test_defaults_are_dinos_crops(self):
        views = Config().views
        assert (views.global_size, views.local_size, views.local_crops) == (224, 96, 8)
        assert (views.global_scale, views.local_scale) == ([0.4, 1.0], [0.05, 0.4])

    def test_sizes_and_scales_are_taken_as_given(self):
        scales = {"global_scale": [0.32, 1.0], "local_scale": [0.05, 0.32]}
        spec = preset("dinov2", global_size=98, local_size=42, local_crops=5, **scales)
        assert [(view.size, view.scale) for view in spec.globals_] == [(98, (0.32, 1.0))] * 2
        assert [(view.size, view.scale) for view in spec.locals_] == [(42, (0.05, 0.32))] * 5
        assert spec.views == spec.globals_ + spec.locals_

    def test_handwriting_is_neither_flipped_nor_coloured(self):
        assert [view.amounts for view in preset("line_art").views] == [{"affine": 1.0, "stroke": 0.5}] * 5

    def test_a_new_preset_is_one_entry(self, monkeypatch):
        monkeypatch.setitem(TABLE, "grey", Preset({"grey": 1.0}, {}, {"grey": 0.5}))
        assert [view.amounts for view in preset("grey", local_crops=1).views] == [{"grey": 1.0}, {}, {"grey": 0.5}]

    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize(
        ("settings", "amounts"),
        [
            ({"affine": 0.3}, {"affine": 0.3}),
            ({"flip": 0.0, "vertical_flip": 0.5, "rotate": 0.75}, {"flip": 0.0, "vertical_flip": 0.5, "rotate": 0.75}),
            ({"jitter": 0.1, "grey": 0.0, "blur": 0.3}, {"jitter": 0.1, "grey": 0.0, "blur": 0.3}),
            ({"solarize": 0.4, "augment": {"solarize": 0.1}}, {"solarize": 0.1}),
            ({"blur": 0.3, "inverted_blur": True}, {"blur": 0.3}),
            ({"stroke": 0.0, "affine": 0.0}, {"affine": 0.0, "stroke": 0.0}),
            ({"augment": {"blur": 0.7, "jitter": 0.0}}, {"blur": 0.7, "jitter": 0.0}),
            ({"augment": {"blur": 0.7}, "inverted_blur": True}, {"blur": 0.7}),
            ({"augment": {"stroke": 0.1}, "stroke": 0.2}, {"stroke": 0.1}),
        ],
    )
    def test_amounts_can_be_set_and_change_nothing_else(self, name, settings, amounts):
        expected = tuple(replace(view, amounts={**view.amounts, **amounts}) for view in preset(name).views)
        assert preset(name, **settings).views == expected

    def test_every_augmentation_has_a_setting_whose_meaning_tells_the_presets_values(self):
        settings = leaves(Config())
        for name in AUGMENTATIONS.keys() - {"jitter_moco", "jitter_strong"}:  # kinds of jitter that presets choose
            setting, meaning = settings[f"views.{name}"], settings[f"views.{name}"].metadata["meaning"]
            assert get(Config(), setting.key) is None
            amounts = [of.get(name, 0.0) for of in (TABLE["dino"].first, TABLE["dino"].second, TABLE["dino"].local)]
            assert all(f"{amount:g}" in meaning for amount in amounts), (name, meaning)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("{solarise: 0.2}", r"'solarise' is none of the augmentations affine, .*; did you mean 'solarize'\?"),
            ("{blur: 1.5}", r"blur must lie between 0 and 1, got 1\.5"),
            ("{affine: -1}", r"affine must lie between 0 and 4, got -1"),
            ("{blur: .nan}", r"blur must lie between 0 and 1, got nan"),
        ],
    )
    def test_what_cannot_be_is_refused_before_any_work(self, setting, message):
        with pytest.raises(UserError, match=r"views\.augment: " + message):
            load(None, [f"views.augment={setting}"])
