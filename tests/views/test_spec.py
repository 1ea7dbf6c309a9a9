"""Presets are those that were published."""

from dataclasses import replace

import pytest
from material import preset

from dino.config.schema import Config
from dino.views import multi_crop


class TestPresets:
    """Published numbers: reference/meta-systems.md §1 and §2a, from the repositories' code."""

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_probabilities(self, name):
        spec = preset(name)
        for view in (*spec.globals_, *spec.locals_):
            assert (view.flip, view.jitter, view.grey) == (0.5, 0.8, 0.2)
            assert view.blur_sigma == (0.1, 2.0)
            assert view.affine == 0
            assert view.stroke == 0
        assert [view.blur for view in spec.globals_] == [1.0, 0.1]
        assert [view.solarize for view in spec.globals_] == [0.0, 0.2]
        assert {(view.blur, view.solarize) for view in spec.locals_} == {(0.5, 0.0)}

    def test_dinov2_blurs_with_9_pixels_and_dino_with_three_sigma(self):
        """DINO blurs with PIL's Gaussian of any extent: its kernel must hold 3 × the largest sigma of 2 each side."""
        assert {view.blur_kernel for view in preset("dinov2").views} == {9}
        assert min(view.blur_kernel for view in preset("dino").views) >= 2 * 3 * 2 + 1

    def test_inverted_blur_is_what_the_released_weights_had(self):
        spec = preset("dinov2", inverted_blur=True)
        assert [view.blur for view in spec.globals_] == [0.0, 0.9]
        assert {view.blur for view in spec.locals_} == {0.5}
        assert [replace(view, blur=0) for view in spec.views] == [
            replace(view, blur=0) for view in preset("dinov2").views
        ]

    def test_defaults_are_dinos_crops(self):
        views = Config().views
        assert (views.global_size, views.local_size, views.local_crops) == (224, 96, 8)
        assert (views.global_scale, views.local_scale) == ([0.4, 1.0], [0.05, 0.4])

    def test_sizes_and_scales_are_taken_as_given(self):
        spec = multi_crop("dinov2", 98, (0.32, 1.0), 42, (0.05, 0.32), 5)
        assert [(view.size, view.scale) for view in spec.globals_] == [(98, (0.32, 1.0))] * 2
        assert [(view.size, view.scale) for view in spec.locals_] == [(42, (0.05, 0.32))] * 5
        assert spec.views == spec.globals_ + spec.locals_

    def test_handwriting_is_neither_flipped_nor_coloured(self):
        for view in preset("line_art").views:
            assert (view.flip, view.jitter, view.grey, view.blur, view.solarize) == (0, 0, 0, 0, 0)
            assert view.affine > 0
            assert view.stroke > 0

    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    @pytest.mark.parametrize("changes", [{"affine": 0.3}, {"stroke": 0.2}, {"affine": 0.0, "stroke": 0.0}])
    def test_affine_and_stroke_can_be_set_and_change_nothing_else(self, name, changes):
        assert preset(name, **changes).views == tuple(replace(view, **changes) for view in preset(name).views)
