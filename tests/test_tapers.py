"""Tapered windows: weights and shares against loops in float64, over every draw that there is."""

from itertools import combinations
from math import exp, pi, sin

import numpy as np
import pytest
import torch

from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.particles import Panorama
from csd_exp.particles.tapers import profile
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.samplers import MultiDiffusion, SamplingModule
from csd_exp.schedules import Draw
from csd_exp.svgd import NoKernel

TAPERS = ("none", "hann", "gaussian")
WRAPPED = {"wrap": True}
PRIOR = GaussianMixture(prompts={"red": [0.2, 3.0]}, std=0.4, image_std=0.7, window=4)


def started(write_image, height=5, width=11, **settings) -> Panorama:
    defaults = {"window": 4, "stride": 2, "prompt": "red", "dtype": "float64"}
    panorama = Panorama(write_image(height, width), 1, **defaults | settings)
    panorama.start(panorama.pixels, None)
    return panorama


def along(panorama: Panorama, axis: int, start: int) -> list[float]:
    """The weights of a window along one axis, from the definition."""
    side, of = panorama.window, panorama.grid[axis]
    borders = not (panorama.wrap and axis == 1)
    weights = []
    for i in range(side):
        u = (i + 0.5) / side
        weight = {"none": 1.0, "hann": sin(pi * u) ** 2, "gaussian": exp(-50 * (u - 0.5) ** 2)}[
            panorama.taper
        ]
        at_border = (u < 0.5 and start == 0) or (u > 0.5 and start + side == of)
        weights.append(1.0 if borders and at_border else weight)
    return weights


def weighed(panorama: Panorama, id: int) -> np.ndarray:
    """The weights [h, w] of one window, where it lies on the canvas."""
    top, left = divmod(id, panorama.grid[1])
    canvas = np.zeros(panorama.grid)
    for i, down in enumerate(along(panorama, 0, top)):
        for j, right in enumerate(along(panorama, 1, left)):
            canvas[top + i, (left + j) % panorama.grid[1]] = down * right
    return canvas


def summed(panorama: Panorama, chosen: torch.Tensor) -> np.ndarray:
    """The shares of a step's windows, added up where they lie."""
    return panorama.added(panorama.share(chosen, chosen), chosen)[0, 0].numpy()


def draws(panorama: Panorama) -> list[tuple[float, torch.Tensor]]:
    """Every step that there may be, with its probability."""
    offsets = range(panorama.stride if panorama.jitter else 1)
    found = []
    for down in offsets:
        for right in offsets:
            ids = panorama._windows(down, right)
            n = len(ids) if panorama.batch is None else min(panorama.batch, len(ids))
            subsets = list(combinations(ids.tolist(), n))
            found += [(1 / len(offsets) ** 2 / len(subsets), torch.tensor(s)) for s in subsets]
    return found


def test_profiles_are_those_of_their_names():
    u = [0.125, 0.375, 0.625, 0.875]
    assert profile("none", 4).tolist() == [1, 1, 1, 1]
    assert profile("hann", 4).tolist() == pytest.approx([sin(pi * x) ** 2 for x in u])
    assert profile("gaussian", 4).tolist() == pytest.approx([exp(-((x - 0.5) ** 2) / 0.02) for x in u])
    for taper in TAPERS:
        for side in (1, 2, 7, 16):
            weights = profile(taper, side)
            torch.testing.assert_close(weights, weights.flip(0))
            assert 0 < weights.min() <= weights.max() <= 1
            assert (weights.diff()[: (side - 1) // 2] >= 0).all()


def test_towards_the_border_of_the_picture_a_window_does_not_fall():
    inside = profile("hann", 6)
    assert torch.equal(profile("hann", 6, (False, True)), torch.cat([torch.ones(3), inside[3:]]).double())
    assert torch.equal(profile("hann", 6, (True, False)), torch.cat([inside[:3], torch.ones(3)]).double())
    assert profile("gaussian", 5, (False, False)).tolist() == [1] * 5


@pytest.mark.parametrize("settings", [{}, WRAPPED, {"batch": 3}, {"batch": 3, "jitter": True} | WRAPPED])
@pytest.mark.parametrize("taper", TAPERS)
def test_over_the_steps_windows_shares_are_weights_over_their_sum(write_image, taper, settings):
    panorama = started(write_image, taper=taper, **settings)
    for step in range(4):
        chosen = panorama.choose(Draw(0, step))
        weights = np.stack([weighed(panorama, int(i)) for i in chosen])
        total = weights.sum(0)
        for i, share in zip(chosen, panorama.share(chosen, chosen), strict=True):
            expected = panorama.crop(
                torch.from_numpy(weighed(panorama, int(i)) / np.where(total > 0, total, 1))[None, None],
                i[None],
            )
            torch.testing.assert_close(share[None], expected, rtol=1e-12, atol=0)
        # So a constant residual gives a constant step wherever the step looks.
        np.testing.assert_allclose(summed(panorama, chosen)[total > 0], 1, rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        WRAPPED,
        {"batch": 2},
        {"batch": 2} | WRAPPED,
        {"jitter": True},
        {"batch": 2, "jitter": True},
        {"batch": 3, "jitter": True, "width": 9} | WRAPPED,
        {"batch": 2, "jitter": True, "mask": [0, 0, 5, 5]},
        {"batch": 2, "stride": 4},
    ],
)
@pytest.mark.parametrize("taper", TAPERS)
def test_by_expected_coverage_sums_are_as_near_to_one_as_they_can_be(write_image, taper, settings):
    panorama = started(write_image, taper=taper, coverage="expected", **settings)
    free = panorama.areas.free
    free = np.ones(panorama.grid) if free is None else free[0, 0].numpy()
    sums, mean, square, nearest = {}, 0.0, 0.0, 0.0
    for chance, chosen in draws(panorama):
        weights = sums.setdefault(tuple(chosen.tolist()), sum(weighed(panorama, int(i)) for i in chosen))
        mean, square = mean + chance * weights, square + chance * weights**2
    divisor = np.where(mean > 0, square / np.where(mean > 0, mean, 1), 1)
    for chance, chosen in draws(panorama):
        weights = sums[tuple(chosen.tolist())]
        np.testing.assert_allclose(summed(panorama, chosen), free * weights / divisor, rtol=1e-11, atol=0)
        # The derivative of E[(a S - 1)^2] in a, at a = 1 / P.
        nearest = nearest + chance * (weights / divisor - 1) * weights
    np.testing.assert_allclose(nearest, 0, atol=1e-12)
    if "batch" not in settings and "jitter" not in settings:  # so a constant residual gives a constant step
        np.testing.assert_allclose(summed(panorama, panorama.every()), 1, rtol=1e-12)


def test_what_one_window_alone_shows_takes_what_its_weight_says_of_expected_coverage(write_image):
    settings = {"height": 4, "width": 12, "batch": 1, "taper": "hann"}
    whole, part = (started(write_image, coverage=c, **settings) for c in ("step", "expected"))
    ids = torch.tensor([4])
    assert torch.equal(whole.share(ids, ids), torch.ones(1, 1, 4, 4, dtype=torch.float64))
    # With one window in a step S is one of two weights at each latent, sin^2 or cos^2, or none.
    p = profile("hann", 4)
    expected = p * (p + (1 - p)) / (p**2 + (1 - p) ** 2)
    torch.testing.assert_close(part.share(ids, ids)[0, 0, 0], expected, rtol=1e-12, atol=0)


def test_at_the_border_of_the_picture_the_only_window_takes_all_of_it(write_image):
    """A tapered window has its whole weight there: what no other window may ever show."""
    for coverage in ("step", "expected"):
        panorama = started(write_image, 4, 12, batch=2, taper="gaussian", coverage=coverage)
        for ids, column in ((torch.tensor([0, 4]), 0), (torch.tensor([2, 8]), -1)):
            share = panorama.share(ids, ids)[0 if column == 0 else 1, 0]
            torch.testing.assert_close(
                share[:, column], torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0
            )


@pytest.mark.parametrize("coverage", ["step", "expected"])
@pytest.mark.parametrize("taper", TAPERS)
def test_windows_that_go_round_have_shares_that_go_round(write_image, taper, coverage):
    panorama = started(write_image, 6, 12, taper=taper, coverage=coverage, wrap=True, batch=3)
    _, width = panorama.grid
    chosen = panorama.choose(Draw(0, 0))
    for shift in (2, 4, 10):  # of whole strides
        turned = torch.tensor(
            [top * width + (left + shift) % width for top, left in panorama.corners(chosen)]
        )
        assert torch.equal(panorama.share(turned, turned), panorama.share(chosen, chosen))
        np.testing.assert_array_equal(summed(panorama, turned), np.roll(summed(panorama, chosen), shift, 1))


@pytest.mark.parametrize("coverage", ["step", "expected"])
def test_outside_of_mask_and_regions_nothing_changes_inside_all_of_it_does(write_image, coverage):
    regions = [{"prompt": "red", "box": [0, 0, 6, 5]}]
    for areas in ({"mask": [0, 0, 6, 5]}, {"regions": regions, "prompt": ""}):
        panorama = started(write_image, 5, 14, taper="hann", coverage=coverage, **areas)
        chosen = panorama.every()
        free = panorama.areas.free[0, 0].numpy()
        np.testing.assert_allclose(summed(panorama, chosen), free, rtol=1e-12, atol=0)
        assert torch.equal(panorama.touched(chosen)[0, 0], torch.from_numpy(free > 0))


def test_a_step_descends_the_tapered_average_of_its_residuals(write_image, build, fit):
    """One step, and what it has moved, against the sum over windows by loops."""
    kept = []

    def residual(score, views):
        kept.append((views.ids, Draw(9, 0).normal("r", 0, tuple(views.x.shape)).to(views.x)))
        return views.x, kept[-1][1]

    panorama = started(write_image, taper="gaussian", batch=3, jitter=True)
    module = build(PRIOR, panorama, residual=residual, kernel=NoKernel(), weight="one")
    start = panorama.latent.detach().clone().numpy()[0]
    fit(module, 1)
    ids, r = kept[0]
    total = sum(weighed(panorama, int(i)) for i in ids)
    step = np.zeros_like(start)
    for i, window in zip(ids, r.numpy(), strict=True):
        top, left = divmod(int(i), panorama.grid[1])
        place = (slice(None), slice(top, top + 4), slice(left, left + 4))
        step[place] += (weighed(panorama, int(i)) / np.where(total > 0, total, 1))[place[1:]] * window
    moved = module.particles.latent.detach().numpy()[0] - start
    np.testing.assert_allclose(moved, -2.0 * step, rtol=1e-10, atol=1e-12)


def test_samplers_average_by_count_whatever_the_taper(write_image, fit):
    ends = []
    for taper, coverage in (("none", "step"), ("hann", "step"), ("gaussian", "expected")):
        module = SamplingModule(
            PRIOR, started(write_image, taper=taper, coverage=coverage), MultiDiffusion(steps=3)
        )
        fit(module, 3)
        ends.append(module.particles.latent.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_the_public_code_counts_whatever_an_experiment_says(tmp_path):
    (tmp_path / "experiment").mkdir()
    said = "# @package _global_\ndefaults: [panorama]\ntaper: hann\ncoverage: expected\n"
    (tmp_path / "experiment/tapered.yaml").write_text(said)

    def averaged(*overrides):
        modality = composed([*overrides, f"hydra.searchpath=[file://{tmp_path}]"]).modality
        return modality.jitter, modality.taper, modality.coverage

    assert averaged("experiment=tapered") == (True, "hann", "expected")
    for preset in ("official", "official_nosvgd", "paper"):
        assert averaged("experiment=tapered", f"preset={preset}") == (False, "none", "step")
        assert "taper" not in composed(["experiment=video", f"preset={preset}"]).modality
    assert averaged("experiment=tapered", "preset=official", "modality.taper=hann") == (False, "hann", "step")


@pytest.mark.parametrize("key", ["taper", "coverage"])
def test_an_unknown_taper_is_refused_by_key(write_image, key):
    with pytest.raises(InputError, match=rf"modality.{key} must be one of .*, not .wide"):
        started(write_image, **{key: "wide"})
