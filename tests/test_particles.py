"""Views, shares and exact pixels of image sets and panoramas of any size."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from csd_exp.errors import InputError
from csd_exp.images import read_image
from csd_exp.particles import Canvas, Images, Panorama, Particles
from csd_exp.schedules import Draw

settings.register_profile("files", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
files = settings(settings.get_profile("files"), max_examples=60)


def encode(factor: int, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as latents without loss: a factor x factor patch becomes channels."""
    return torch.nn.functional.pixel_unshuffle(pixels, factor)


def started(particles: Particles, factor: int = 1) -> Particles:
    latent = encode(factor, particles.pixels)
    particles.start(latent, 10 + latent)
    return particles


@st.composite
def panoramas(draw, wrap=(False, True)):
    window = draw(st.integers(1, 6))
    return {
        "height": draw(st.integers(1, 40)),
        "width": draw(st.integers(1, 60)),
        "factor": draw(st.sampled_from([1, 2, 3, 8])),
        "window": window,
        "stride": draw(st.integers(1, window)),
        "wrap": draw(st.sampled_from(wrap)),
        "jitter": draw(st.booleans()),
    }


def make(write_image, height, width, factor, **settings) -> Panorama:
    return started(Panorama(write_image(height, width), factor, **settings), factor)


# Panorama


@files
@given(case=panoramas())
def test_a_panorama_comes_back_with_exactly_its_pixels(write_image, case):
    panorama = make(write_image, **case)
    (image,) = panorama.finish(torch.nn.functional.pixel_shuffle(panorama.render(), case["factor"]))
    wanted, resampled = (
        read_image(write_image(case["height"], case["width"])),
        case["wrap"] and case["width"] % case["factor"],
    )
    torch.testing.assert_close(image, wanted, rtol=0, atol=2e-6 if resampled else 0)


def test_what_goes_round_is_resampled_to_whole_latents_without_a_seam(tmp_path):
    """A wave has the same phase and height at all columns, of which it has a few more."""

    def wave(columns):
        phase = 2 * np.pi * 3 * np.arange(columns) / columns
        return np.broadcast_to(128 + 100 * np.cos(phase), (8, columns))

    Image.fromarray(np.repeat(wave(45).round()[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "wave.png")
    pixels = Panorama(tmp_path / "wave.png", 8, 1, wrap=True).pixels[0, 0]
    np.testing.assert_allclose(255 * pixels.numpy(), wave(48), atol=1)


@files
@given(case=panoramas(), step=st.integers(0, 1000))
def test_windows_cover_every_latent_and_shares_sum_to_one(write_image, case, step):
    panorama = make(write_image, **case)
    ids = panorama.choose(Draw(0, step))
    assert len(set(ids.tolist())) == len(ids)
    total = covered(panorama, ids, panorama.share(ids, ids))
    torch.testing.assert_close(total, torch.ones_like(total))


def covered(panorama: Panorama, ids: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The shares added up where their windows lie, by plain loops."""
    total = torch.zeros(panorama.grid)
    for (top, left), window in zip(panorama.corners(ids), share, strict=True):
        for i in range(panorama.window):
            for j in range(panorama.window):
                column = (left + j) % panorama.grid[1] if panorama.wrap else left + j
                total[top + i, column] += window[0, i, j]
    return total


@files
@given(case=panoramas(), step=st.integers(0, 1000), batch=st.integers(1, 5))
def test_shares_of_a_drawn_batch_sum_to_one_where_it_looks(write_image, case, step, batch):
    panorama = make(write_image, batch=batch, **case)
    ids = panorama.choose(Draw(0, step))
    assert len(ids) == len(set(ids.tolist())) <= batch
    total = covered(panorama, ids, panorama.share(ids, ids))
    torch.testing.assert_close(total[total > 0], torch.ones_like(total[total > 0]))


@files
@given(case=panoramas(), step=st.integers(0, 1000))
def test_the_gradient_of_the_surrogate_is_the_overlap_average(write_image, case, step):
    panorama = make(write_image, **case)
    ids = panorama.choose(Draw(0, step))
    x = panorama.views(ids)
    g = Draw(1, step).normal("g", 0, x.shape)
    (x * panorama.share(ids, ids) * g).sum().backward()
    value, count = torch.zeros_like(panorama.latent[0]), torch.zeros(panorama.grid)
    for (top, left), view in zip(panorama.corners(ids), g, strict=True):
        for j in range(panorama.window):
            column = (left + j) % panorama.grid[1]
            value[:, top : top + panorama.window, column] += view[:, :, j]
            count[top : top + panorama.window, column] += 1
    torch.testing.assert_close(panorama.latent.grad[0], value / count, rtol=1e-5, atol=1e-6)


@files
@given(case=panoramas(wrap=[True]), step=st.integers(0, 1000))
def test_wrapped_windows_are_crops_of_the_rolled_canvas(write_image, case, step):
    panorama = make(write_image, **case)
    ids = panorama.choose(Draw(0, step))
    size = panorama.window
    for (top, left), view in zip(panorama.corners(ids), panorama.views(ids), strict=True):
        rolled = panorama.latent[0].roll(-left, dims=-1)
        assert torch.equal(view, rolled[:, top : top + size, :size])


@files
@given(case=panoramas(wrap=[False]))
def test_the_last_windows_are_flush_to_the_border(write_image, case):
    panorama = make(write_image, **case)
    corners = panorama.corners(panorama.choose(Draw(0, 0)))
    assert {min(c) for c in zip(*corners, strict=True)} == {0}
    ends = [max(c) + panorama.window for c in zip(*corners, strict=True)]
    assert ends == list(panorama.grid)


@files
@given(case=panoramas())
def test_the_canvas_is_the_smallest_that_holds_the_image_and_a_window(write_image, case):
    panorama = make(write_image, **case)
    for side, pixels in zip(panorama.grid, (case["height"], case["width"]), strict=True):
        needed = max(case["window"], -(-pixels // case["factor"]))
        assert side == needed
    assert panorama.latent.shape[-2:] == panorama.grid


def test_windows_of_a_known_panorama(write_image):
    panorama = make(write_image, 8, 21, 1, window=8, stride=4)
    assert panorama.corners(panorama.choose(Draw(0, 0))) == [(0, 0), (0, 4), (0, 8), (0, 12), (0, 13)]
    wrapped = make(write_image, 8, 21, 1, window=8, stride=8, wrap=True)
    assert wrapped.corners(wrapped.choose(Draw(0, 0))) == [(0, 0), (0, 8), (0, 16)]
    assert torch.equal(wrapped.views(torch.tensor([16]))[0, :, :, 5:], wrapped.latent[0, :, :, :3])


def test_the_stride_is_a_quarter_of_the_window_unless_given(write_image):
    assert Panorama(write_image(16, 40), 1, 16).stride == 4
    assert Panorama(write_image(16, 40), 1, 1).stride == 1


def test_padding_reflects_and_wrapping_continues_round(write_image):
    path = write_image(5, 6)
    image = read_image(path)
    padded = Panorama(path, 4, 2).pixels
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[0, :, 5:, :6], image[:, [3, 2, 1]])
    assert torch.equal(padded[0, :, :5, 6:], image[:, :, [4, 3]])
    wrapped = Panorama(path, 1, 4, wrap=True)
    assert wrapped.margin == 2
    assert torch.equal(wrapped.pixels[0, :, :5], image[:, :, [4, 5, 0, 1, 2, 3, 4, 5, 0, 1]])


def test_source_and_condition_are_the_same_crops_and_stay(write_image):
    panorama = make(write_image, 9, 30, 1, window=6, batch=3)
    ids = panorama.choose(Draw(0, 0))
    before = panorama.views(ids).detach().clone()
    assert torch.equal(panorama.source(ids), before)
    panorama.latent.data += 1
    assert torch.equal(panorama.source(ids), before)
    assert torch.equal(torch.stack(panorama.condition(ids)), 10 + before)
    assert panorama.prompts(ids) == [[(1.0, "")]] * 3
    assert list(panorama.state_dict()) == ["latent"]


def test_without_a_condition_every_view_has_none(write_image):
    panorama = Panorama(write_image(4, 12), 1, 4)
    panorama.start(panorama.pixels, None)
    assert panorama.condition(panorama.choose(Draw(0, 0))) == [None] * 9


@pytest.mark.parametrize("wrap", [False, True])
def test_jitter_moves_every_seam_that_can_move(write_image, wrap):
    panorama = make(write_image, 8, 61, 1, window=8, stride=4, wrap=wrap, jitter=True)
    edges = [
        {
            (left + shift) % 61
            for _, left in panorama.corners(panorama.choose(Draw(0, step)))
            for shift in (0, 8)
        }
        for step in range(40)
    ]
    # Only a window at the border can cover the border's first latent, so its inner edge cannot move.
    fixed = set() if wrap else {0, 8, 61 - 8}
    assert set.intersection(*edges) == fixed
    assert set.union(*edges) == set(range(61))


def test_without_jitter_windows_stay(write_image):
    panorama = make(write_image, 8, 61, 1, window=8)
    assert len({tuple(panorama.choose(Draw(0, step)).tolist()) for step in range(10)}) == 1


def test_a_batch_is_seeded_and_reaches_every_window(write_image):
    panorama = make(write_image, 8, 40, 1, window=8, stride=4, batch=3)
    draws = [panorama.choose(Draw(7, step)).tolist() for step in range(60)]
    assert draws == [panorama.choose(Draw(7, step)).tolist() for step in range(60)]
    assert draws != [panorama.choose(Draw(8, step)).tolist() for step in range(60)]
    assert {i for ids in draws for i in ids} == set(range(0, 33, 4))
    assert len({tuple(sorted(ids)) for ids in draws}) > 30


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": 6, "multiple": 4}, "modality.window must be a positive multiple of 4"),
        ({"window": 0}, "modality.window must be a positive multiple of 1"),
        ({"window": 4, "stride": 5}, "modality.stride must lie between 1 and the window"),
        ({"window": 4, "stride": 0}, "modality.stride must lie between 1 and the window"),
        ({"window": 4, "batch": 0}, "modality.batch must be at least 1"),
        ({"window": 4, "dtype": "float8"}, "modality.dtype must be one of float32, float64"),
    ],
)
def test_impossible_panoramas_are_refused_by_key(write_image, setting, message):
    with pytest.raises(InputError, match=message):
        Panorama(write_image(8, 8), 1, **setting)


# Images


@files
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    n=st.integers(1, 3),
    factor=st.sampled_from([1, 3, 8]),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_images_come_back_with_exactly_their_pixels(write_image, height, width, n, factor, multiple):
    paths = [write_image(height, width, seed) for seed in range(n)]
    images = started(Images(paths, factor, multiple), factor)
    for side, pixels in zip(images.latent.shape[-2:], (height, width), strict=True):
        assert side % multiple == 0
        assert 0 <= side * factor - pixels < factor * multiple
    finished = images.finish(torch.nn.functional.pixel_shuffle(images.render(), factor))
    for image, path in zip(finished, paths, strict=True):
        assert torch.equal(image, read_image(path))


def test_images_are_views_named_by_their_place(write_image):
    images = started(Images([write_image(4, 6, seed) for seed in range(5)], 1, 1, prompt="red"))
    ids = images.choose(Draw(0, 0))
    assert ids.tolist() == [0, 1, 2, 3, 4]
    some = torch.tensor([3, 1])
    assert torch.equal(images.views(some), images.pixels[[3, 1]])
    assert torch.equal(torch.stack(images.condition(some)), 10 + images.pixels[[3, 1]])
    assert images.prompts(some) == [[(1.0, "red")]] * 2
    assert torch.equal(images.share(some, ids), torch.ones(2, 1, 4, 6))


def test_a_batch_of_images_is_seeded_distinct_and_reaches_all(write_image):
    images = started(Images([write_image(4, 4, seed) for seed in range(6)], 1, 1, batch=2))
    draws = [images.choose(Draw(0, step)).tolist() for step in range(50)]
    assert draws == [images.choose(Draw(0, step)).tolist() for step in range(50)]
    assert all(len(set(ids)) == 2 for ids in draws)
    assert {i for ids in draws for i in ids} == set(range(6))
    everything = started(Images([write_image(4, 4, seed) for seed in range(3)], 1, 1, batch=9))
    assert everything.choose(Draw(0, 0)).tolist() == [0, 1, 2]


def test_a_batch_of_no_image_is_refused(write_image):
    with pytest.raises(InputError, match=r"modality.batch must be at least 1"):
        Images(write_image(4, 4), 1, 1, batch=0)


def test_a_modality_must_say_what_it_has_chooses_and_shows():
    particles, ids = Particles(), torch.tensor([0])
    canvas = Canvas()
    for missing in (
        lambda: particles.count,
        partial(particles.choose, Draw(0, 0)),
        partial(particles.views, ids),
        partial(particles.pictures, None),
        partial(canvas.crop, torch.zeros(1), ids),
        partial(canvas.finish, torch.zeros(1)),
    ):
        with pytest.raises(NotImplementedError):
            missing()


def test_exif_rotation_decides_the_sides(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: display rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    panorama = started(Panorama(tmp_path / "turned.png", 1, 4))
    assert panorama.size == (9, 4)
    (image,) = panorama.finish(panorama.render())
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1) / 255
    assert torch.equal(image, expected)
