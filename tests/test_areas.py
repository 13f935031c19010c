"""Regions with prompts of their own, and edits kept to a mask."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import csd_exp
from csd_exp import methods
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.images import pad_to
from csd_exp.particles import Generated, Images, Panorama
from csd_exp.particles.areas import ramp, read_masks, read_regions
from csd_exp.priors import GaussianMixture
from csd_exp.priors.base import ViewShape
from csd_exp.run import check_run
from csd_exp.schedules import Draw
from csd_exp.svgd import RBF, NoKernel

examples = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def write_mask(tmp_path):
    """Write a boolean array [height, width] as an 8-bit PNG, white where True, and return its path."""

    def write(inside: np.ndarray, name: str = "mask") -> str:
        Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(tmp_path / f"{name}.png")
        return str(tmp_path / f"{name}.png")

    return write


# Regions


@st.composite
def pictures(draw):
    """A picture, how it is seen, and regions in it: boxes in pixels or fractions, and masks."""
    height, width = draw(st.integers(3, 30)), draw(st.integers(3, 50))
    window = draw(st.integers(1, 6))
    regions = []
    for k in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            seed, density = draw(st.integers(0, 99)), draw(st.sampled_from([0.02, 0.5, 1.0]))
            inside = np.random.default_rng(seed).random((height, width)) < density
            inside[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
        else:
            left, right = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
            top, bottom = sorted(draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
            inside = np.zeros((height, width), bool)
            inside[top:bottom, left:right] = True
        regions.append((f"prompt {k}", inside))
    return {
        "regions": regions,
        "size": (height, width),
        "factor": draw(st.sampled_from([1, 2, 3])),
        "window": window,
        "stride": draw(st.integers(1, window)),
        "wrap": draw(st.booleans()),
        "jitter": draw(st.booleans()),
        "prompt": draw(st.sampled_from(["", "ground"])),
    }


def box_of(inside: np.ndarray) -> list[int] | None:
    """The box that an array is True on, None where it is no box; never one that reads as fractions."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    full = inside[box[1] : box[3], box[0] : box[2]].all()
    return box if full and max(box) > 1 else None


@examples
@given(case=pictures(), step=st.integers(0, 1000))
def test_the_weights_of_a_window_are_the_areas_in_it_and_sum_to_one(write_image, write_mask, case, step):
    regions, (height, width) = case.pop("regions"), case.pop("size")
    given = [
        {"prompt": prompt, "box": box}
        if (box := box_of(inside))
        else {"prompt": prompt, "mask": write_mask(inside, str(k))}
        for k, (prompt, inside) in enumerate(regions)
    ]
    panorama = Panorama(write_image(height, width), regions=given, **case)
    ids = panorama.choose(Draw(0, step))
    panorama.latent = torch.zeros(1, 3, *panorama.grid)

    claims = np.stack([inside for _, inside in regions]).astype(float)
    count = claims.sum(0)
    pixels = np.concatenate([claims / np.maximum(count, 1), (count == 0)[None]])
    factor, side = case["factor"], case["window"] * case["factor"]
    down, right = (n * factor for n in panorama.grid)
    if case["wrap"]:  # what goes round has whole latents, each pixel the nearest of the mask
        whole = -(-width // factor) * factor
        pixels = pixels[..., [column * width // whole for column in range(whole)]]
    padded = pad_to(torch.from_numpy(pixels), down, right, circular=case["wrap"]).numpy()
    names = [*(prompt for prompt, _ in regions), case["prompt"] or None]
    for (top, left), found in zip(panorama.corners(ids), panorama.prompts(ids), strict=True):
        columns = np.arange(left * factor, left * factor + side) % right
        expected = padded[:, top * factor : top * factor + side][:, :, columns].mean((1, 2))
        assert sum(alpha for alpha, _ in found) == pytest.approx(1, abs=1e-12)
        assert min(alpha for alpha, _ in found) > 0
        assert {p: a for a, p in found} == pytest.approx(
            {p: a for a, p in zip(expected, names, strict=True) if a > 0}, abs=1e-12
        )


def test_windows_that_nothing_edits_are_left_out(write_image):
    def lefts(**settings):
        panorama = Panorama(write_image(8, 80), 1, 8, stride=8, **settings)
        return [left for _, left in panorama.corners(panorama.choose(Draw(0, 0)))]

    right = [{"prompt": "red", "box": [44, 0, 80, 8]}]
    assert lefts(regions=right) == [40, 48, 56, 64, 72]
    assert lefts(regions=right, prompt="all") == list(range(0, 80, 8))
    assert lefts(mask=[44, 0, 60, 8], prompt="all") == [40, 48, 56]
    assert lefts(mask=[44, 0, 60, 8], regions=[{"prompt": "red", "box": [52, 0, 80, 8]}]) == [48, 56]


@pytest.fixture
def quarters(write_image):
    """The compositional example: 1920 x 512 px, 12 windows of 64 latents, four regions side by side."""
    regions = [{"prompt": f"season {k}", "box": [k / 4, 0, (k + 1) / 4, 1]} for k in range(4)]
    return Panorama(write_image(512, 1920), 8, 64, stride=16, regions=regions)


class EightToOne(GaussianMixture):
    factor = 8

    def encode(self, image, noise=None):
        return torch.nn.functional.avg_pool2d(super().encode(image), 8)


def test_four_regions_take_72_rows_where_six_for_every_window_and_region_are_288(quarters, build, fit):
    texts = {f"season {k}": [1.0, k + 2.0] for k in range(4)}
    prior = EightToOne(prompts=texts, guidance_scale=15.0, image_guidance_scale=5.0)
    module = build(prior, quarters, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(module, 1)
    touched = [len(view) for view in quarters.prompts(quarters.choose(Draw(0, 0)))]
    assert 12 * 4 * 6 == 288
    assert touched == [2] * 12
    assert module.rows == sum(touched) + 12 * 4 == 72


def test_a_window_under_two_prompts_has_their_residuals_weighted(write_image, build, fit):
    texts = {"red": [0.2, 3.0], "blue": [5.0, 0.1]}
    halves = [{"prompt": "red", "box": [0, 0, 2, 6]}, {"prompt": "blue", "box": [2, 0, 6, 6]}]
    kernel = NoKernel(normalize="none")

    def step(**settings):
        prior = GaussianMixture(prompts=texts, guidance_scale=7.5, image_guidance_scale=5.0)
        particles = Images(write_image(6, 6), 1, 1, dtype="float64", **settings)
        module = build(prior, particles, kernel=kernel)
        fit(module, 1)
        return module.particles.latent.detach() - module.particles.source_latent

    red, blue = step(prompt="red"), step(prompt="blue")
    torch.testing.assert_close(step(regions=halves), red / 3 + 2 * blue / 3, rtol=1e-12, atol=1e-12)
    overlapping = [{"prompt": "red", "box": [0, 0, 6, 6]}, {"prompt": "blue", "box": [0, 0, 6, 6]}]
    torch.testing.assert_close(step(regions=overlapping), (red + blue) / 2, rtol=1e-12, atol=1e-12)
    with_ground = step(regions=halves[:1], prompt="blue")
    torch.testing.assert_close(with_ground, red / 3 + 2 * blue / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [methods.sds, methods.dds])
def test_without_a_prompt_what_no_region_has_does_not_move(write_image, build, fit, residual):
    prior = GaussianMixture(prompts={"red": [0.2, 3.0]}, guidance_scale=7.5, image_guidance_scale=5.0)
    region = [{"prompt": "red", "box": [9, 2, 20, 6]}]
    panorama = Panorama(write_image(8, 40), 1, 8, stride=2, jitter=True, regions=region)
    module = build(prior, panorama, residual=residual, kernel=RBF(normalize="rms"))
    fit(module, 3)
    moved = (panorama.latent.detach() != panorama.source_latent)[0].any(0)
    expected = torch.zeros(8, 40, dtype=torch.bool)
    expected[2:6, 9:20] = True
    assert torch.equal(moved, expected)


def test_of_a_hundred_regions_only_those_that_touch_a_window_are_evaluated(write_image, build, fit):
    regions = [{"prompt": f"prompt {k}", "box": [4 * k, 0, 4 * k + 4, 8]} for k in range(100)]
    texts = {f"prompt {k}": [1.0, k + 2.0] for k in range(100)}
    prior = GaussianMixture(prompts=texts, guidance_scale=7.5, image_guidance_scale=5.0)
    panorama = Panorama(write_image(8, 400), 1, 8, stride=8, regions=regions)
    module = build(prior, panorama)
    fit(module, 1)
    assert [len(view) for view in panorama.prompts(panorama.choose(Draw(0, 0)))] == [2] * 50
    assert module.rows == 50 * (4 + 2)


def test_regions_of_an_image_set_are_the_same_in_every_image(write_image):
    paths = [str(write_image(6, 8, seed)) for seed in range(3)]
    regions = [{"prompt": "red", "box": [0, 0, 2, 6]}]
    images = Images(paths, 1, 1, regions=regions, prompt="ground")
    images.start(images.pixels, None)
    assert images.prompts(torch.tensor([2, 0])) == [[(0.25, "red"), (0.75, "ground")]] * 2


def test_fractions_are_of_the_images_own_sides():
    (region,) = read_regions([{"prompt": "x", "box": [0.25, 0, 1, 0.5]}], (10, 20))
    assert (region.left, region.top, *region.inside.shape) == (5, 0, 5, 15)


# The mask


@examples
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    feather=st.integers(0, 4),
    seed=st.integers(0, 99),
    wrap=st.booleans(),
)
def test_blend_weights_rise_with_the_distance_from_outside(height, width, feather, seed, wrap):
    mask = np.random.default_rng(seed).random((height, width)) < 0.8
    outside = [
        (i, j + turn) for i, j in np.argwhere(~mask) for turn in ((-width, 0, width) if wrap else (0,))
    ]
    weights = ramp(torch.from_numpy(mask)[None], feather, wrap)[0, 0].numpy()
    for i in range(height):
        for j in range(width):
            distance = min((max(abs(i - row), abs(j - column)) for row, column in outside), default=np.inf)
            assert weights[i, j] == pytest.approx(min(distance / (feather + 1), 1), abs=1e-6)


def test_latents_move_by_the_mask_averaged_over_them_and_their_neighbours(write_image, write_mask):
    inside = np.random.default_rng(0).random((15, 26)) < 0.3
    panorama = Panorama(write_image(15, 26), 4, 4, stride=1, mask=write_mask(inside), prompt="x")
    padded = pad_to(torch.from_numpy(inside).double(), 16, 28).numpy()
    panorama.latent = torch.zeros(1, 3, 4, 7)
    whole = panorama.editable(torch.tensor([0, 3]))[:, 0]
    for top in range(4):
        for left in range(7):
            near = padded[max(4 * top - 4, 0) : 4 * top + 8, max(4 * left - 4, 0) : 4 * left + 8]
            found = whole[0, top, left] if left < 4 else whole[1, top, left - 3]
            assert float(found) == pytest.approx(near.mean(), abs=1e-6)


@pytest.mark.parametrize("modality", ["panorama", "images"])
def test_outside_of_the_mask_not_one_pixel_of_any_saved_picture_changes(
    write_image, write_mask, tmp_path, monkeypatch, modality
):
    monkeypatch.chdir(tmp_path)
    inside = np.zeros((37, 53), bool)
    inside[5:20, 10:40] = inside[18:30, 30:45] = True
    picture = write_image(37, 53)
    result = csd_exp.edit(
        f"experiment={modality}",
        *("prior=analytic", "prior.window=16", "prior.guidance_scale=4", "+prior.prompts.warm=[0,1]"),
        *("prompt=warm", "steps=4", "logger=csv", "callbacks.media.every_n_steps=2", "modality.feather=2"),
        **{"modality.path": picture, "modality.mask": write_mask(inside)},
    )
    original = np.asarray(Image.open(picture))
    saved = sorted((result.run_dir / "media").glob("edited*.png"))
    assert [f.stem for f in saved] == ["edited", "edited_000002"]
    for file in saved:
        changed = (np.asarray(Image.open(file)) != original).any(-1)
        assert not (changed & ~inside).any()
        assert changed[8:17, 13:37].mean() > 0.9


def test_each_image_has_its_mask(write_image, write_mask):
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :2], right[:, 4:] = True, True
    masks = [write_mask(left, "left"), write_mask(right, "right")]
    images = Images([str(write_image(4, 6, s)) for s in range(2)], 1, 1, mask=masks, feather=0, prompt="x")
    images.start(images.pixels, None)
    white = SimpleNamespace(decode=torch.ones_like)
    for i, inside in enumerate((left, right)):
        (image,) = images.pictures(white, slice(i, i + 1))
        assert (image != images.pixels[i]).any(0).numpy().tolist() == inside.tolist()
    with pytest.raises(InputError, match=r"modality.mask=.* holds 2 masks for 3 images"):
        Images([str(write_image(4, 6, s)) for s in range(3)], 1, 1, mask=masks)


def test_what_is_transparent_or_darker_than_half_is_outside(tmp_path):
    pixels = np.full((2, 4, 4), 255, np.uint8)
    pixels[0, 1, 3], pixels[0, 2, :3], pixels[0, 3, :3] = 0, 127, 128
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = read_masks(str(tmp_path / "mask.png"), (2, 4))
    assert mask.tolist() == [[[True, False, False, True], [True] * 4]]


# Mistakes


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([{"prompt": "x"}], r"modality.regions\[0\] must say where it is by one of box and mask; neither"),
        ([{"prompt": "x", "box": [0, 0, 1, 1], "mask": "m.png"}], r"regions\[0\] must say .* both is given"),
        ([{"prompt": "x", "box": [0, 0, 4, 4]}, {"box": [0, 0, 1, 1]}], r"regions\[1\].prompt must be"),
        ([{"prompt": " ", "box": [0, 0, 1, 1]}], r"regions\[0\].prompt must be the instruction"),
        ([{"prompt": "x", "bx": [0, 0, 1, 1]}], r"regions\[0\].bx is no key .* prompt, box, mask"),
        ([{"prompt": "x", "box": [0, 0, 9, 4]}], r"regions\[0\].box=.* outside .* has 8 x 6 pixels"),
        ([{"prompt": "x", "box": [-1, 0, 4, 4]}], r"regions\[0\].box=.* outside"),
        ([{"prompt": "x", "box": [5, 0, 4, 4]}], r"regions\[0\].box=.* holds no pixel .* left must be below"),
        ([{"prompt": "x", "box": [4, 2, 8, 2]}], r"regions\[0\].box=.* holds no pixel"),
        ([{"prompt": "x", "box": [0.5, 0, 0.51, 1]}], r"regions\[0\].box=.* holds no pixel"),
        ([{"prompt": "x", "box": [0, 0, 4]}], r"regions\[0\].box must be \[left, top, right, bottom\]"),
        ([{"prompt": "x", "box": [0, 0, 4.5, 4]}], r"regions\[0\].box must be .* whole pixels or"),
        ([{"prompt": "x", "box": [0, 0, float("nan"), 4]}], r"regions\[0\].box must be"),
        ([{"prompt": "x", "box": "left"}], r"regions\[0\].box must be"),
        ([{"prompt": "x", "mask": "none.png"}], r"regions\[0\].mask=none.png is no file"),
    ],
)
def test_regions_that_cannot_be_used_are_refused_by_key(regions, message):
    with pytest.raises(InputError, match=message):
        read_regions(regions, (6, 8))


def test_masks_that_cannot_be_used_are_refused_by_key(write_image, write_mask, tmp_path):
    def refusal(mask, **settings) -> str:
        with pytest.raises(InputError) as error:
            Panorama(write_image(6, 8), 1, 4, mask=mask, **settings)
        return str(error.value)

    assert "has 5 x 6 pixels; it must have the 8 x 6 of" in refusal(write_mask(np.ones((6, 5), bool), "a"))
    assert "is black all over" in refusal(write_mask(np.zeros((6, 8), bool), "b"))
    Path(tmp_path / "c.png").write_bytes(b"no picture")
    assert "modality.mask=" in (message := refusal(str(tmp_path / "c.png")))
    assert "cannot be read as an image" in message
    assert refusal([0, 0, 9, 6]).startswith("modality.mask=[0, 0, 9, 6] reaches outside")
    assert "modality.feather must be at least 0" in refusal([0, 0, 4, 6], feather=-1)
    elsewhere = [{"prompt": "x", "box": [7, 0, 8, 6]}]
    assert "no pixel in common" in refusal([0, 0, 2, 6], regions=elsewhere, feather=0)


# Prompts of their own for every image, and pictures from noise


def test_each_image_has_its_prompt_or_one_line_of_a_file(write_image, tmp_path):
    paths = [str(write_image(6, 8, seed)) for seed in range(3)]
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n\n", encoding="utf-8-sig")
    for prompts in (["one", "two", "three"], str(tmp_path / "prompts.txt")):
        images = Images(paths, 1, 1, prompts=prompts, prompt="all")
        assert images.prompts(torch.tensor([2, 0])) == [[(1.0, "three")], [(1.0, "one")]]


def test_prompts_that_do_not_fit_are_refused_by_key(write_image, tmp_path):
    def refusal(prompts) -> str:
        with pytest.raises(InputError) as error:
            Images([str(write_image(6, 8, seed)) for seed in range(3)], 1, 1, prompts=prompts)
        return str(error.value)

    assert refusal(["one", "two"]) == "modality.prompts has 2 prompts for 3 images; give one for each image."
    assert "of 3 one is empty" in refusal(["one", " ", "three"])
    assert "cannot be read as UTF-8 text" in refusal(str(tmp_path / "none.txt"))
    assert refusal([]).startswith("modality.prompts must hold")


TEXTS = {"": [1.0, 1.0], "dark": [1.0, 0.0], "light": [0.0, 1.0]}


def test_generated_pictures_start_at_the_seeds_noise_and_come_to_their_prompts(build, fit):
    prior = GaussianMixture(means=[[-0.6, -0.6, -0.6], [0.5, 0.5, 0.5]], prompts=TEXTS, guidance_scale=1.0)
    particles = Generated(1, 1, window=6, prompts=["dark", "light", "dark"], seed=3, dtype="float64")
    module = build(
        prior,
        particles,
        residual=methods.sds,
        kernel=RBF(repulsion="off"),
        weight="one",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    noise = torch.stack([Draw(3, 0).normal("start", i, (3, 6, 6)) for i in range(3)])
    assert torch.equal(particles.latent.detach(), noise.double())
    assert particles.condition(torch.arange(3)) == [None] * 3
    fit(module, 400)
    dark, light, other = (float(view.mean()) for view in particles.latent.detach())
    assert dark == pytest.approx(-0.6, abs=0.1)
    assert light == pytest.approx(0.5, abs=0.1)
    assert other == pytest.approx(-0.6, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "modality.count must be at least 1"),
        ({"size": 0}, "modality.size must be at least 1"),
        ({"count": 3, "prompts": ["x", "y"]}, "modality.prompts has 2 prompts for 3 images"),
    ],
)
def test_generated_pictures_that_cannot_be_are_refused_by_key(settings, message):
    with pytest.raises(InputError, match=message):
        Generated(1, 1, window=8, **settings)


def test_a_picture_can_be_of_any_size_and_number():
    coder = SimpleNamespace(views=ViewShape(factor=8, channels=4, window=16, multiple=4))
    for particles, shape in (
        (Generated(8, 4, window=16, prompt="x", count=2), (2, 4, 16, 16)),
        (Generated(8, 4, window=16, prompt="x", size=50), (1, 4, 8, 8)),
    ):
        particles.begin(coder, Draw(0, 0))
        assert particles.latent.shape == shape
    assert particles.finish(torch.zeros(1, 3, 64, 64))[0].shape == (3, 50, 50)
    assert particles.source(torch.tensor([0])) is None
    assert list(particles.originals()) == []


# The command line's own checks


def refused(*overrides: str) -> str:
    with pytest.raises(InputError) as error:
        check_run(composed(["prior=analytic", *overrides]))
    return str(error.value)


def test_a_run_is_refused_before_it_begins_where_its_areas_cannot_be_used(write_image):
    path = f"modality.path={write_image(6, 8)}"
    box = "modality.regions=[{prompt: x, box: [0, 0, 4, 3]}, {prompt: y, box: [0, 0, 9, 6]}]"
    assert refused("experiment=panorama", path, box).startswith(
        "modality.regions[1].box=[0, 0, 9, 6] reaches"
    )
    assert refused("experiment=panorama", path, "prompt=x", "modality.mask=none.png").startswith(
        "modality.mask=none.png is no file"
    )
    assert refused("experiment=panorama", path).startswith("prompt is empty")
    assert "method=csd or method=sds" in refused("experiment=generate", "method=csd_edit")


def test_regions_or_prompts_of_their_own_need_no_prompt(write_image):
    path = f"modality.path={write_image(6, 8)}"
    for own in ("modality.regions=[{prompt: x, box: [0, 0, 4, 3]}]", "modality.prompts=[x]"):
        modality = "images" if "prompts" in own else "panorama"
        config = composed([f"experiment={modality}", "prior=analytic", path, own])
        check_run(config)
        assert config.prompt == ""
