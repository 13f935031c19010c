"""A video as overlapping clips: where they lie, what they share, how they are encoded and decoded."""

import pytest
import torch
from PIL import Image

import csd_exp
from csd_exp import methods
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.module import CSDModule
from csd_exp.particles import Clips
from csd_exp.parts import check_parts
from csd_exp.priors import GaussianClips
from csd_exp.samplers import Downscaled, SamplingModule
from csd_exp.schedules import Draw, Timesteps
from csd_exp.svgd import RBF


class Causal(GaussianClips):
    """A lossless autoencoder with a memory: each latent has a half of the one before, so none is a crop."""

    def encode(self, image, noise=None):
        latents = list(super().encode(image).unbind(2))
        for k in range(1, len(latents)):
            latents[k] = latents[k] + latents[k - 1] / 2
        return torch.stack(latents, dim=2)

    def decode(self, latent):
        before = torch.cat([torch.zeros_like(latent[:, :, :1]), latent[:, :, :-1]], dim=2)
        return super().decode(latent - before / 2)


@pytest.fixture
def film(write_image, tmp_path):
    """The folder of a film of n frames of a height and a width."""

    def film(n, height=6, width=7):
        (tmp_path / "film").mkdir()
        for i in range(n):
            write_image(height, width, i, f"film/{i:02}.png")
        return tmp_path / "film"

    return film


def clips(path, window=8, frames=5, period=2, **settings):
    return Clips(str(path), 1, 1, window, frames, period, dtype="float64", **{"prompt": "x"} | settings)


def begun(particles, prior=None):
    prior = prior or Causal(frames=5, period=2)
    particles.begin(prior, Draw(0, 0))
    return particles, prior


@pytest.mark.parametrize(
    ("count", "frames", "period", "hop", "starts", "length"),
    [
        (8, 5, 2, 2, [0, 2, 4], 5),  # to 9 pictures, of which the last is shown twice
        (9, 5, 2, None, [0, 2, 4], 5),
        (9, 5, 4, None, [0, 4], 5),
        (8, 5, 1, None, [0, 2, 3], 5),
        (8, 5, 1, 5, [0, 3], 5),
        (4, 16, 1, None, [0], 4),
        (4, 81, 4, None, [0], 5),
        (1, 81, 4, None, [0], 1),
    ],
)
def test_clips_cover_a_video_and_the_last_ends_with_it(film, count, frames, period, hop, starts, length):
    particles, prior = clips(film(count), 8, frames, period, hop=hop), Causal(frames=5, period=period)
    begun(particles, prior)
    assert (particles.starts, particles.length, particles.count) == (starts, length, count)
    shown = list(particles.pictures(prior))
    assert len(shown) == count
    torch.testing.assert_close(torch.stack(shown).float(), torch.stack(list(particles.originals())))


def test_each_clip_is_encoded_by_itself(film):
    particles, prior = begun(clips(film(9)))
    frames = torch.stack(list(particles.frames), dim=1)[None]
    alone = torch.cat([prior.encode(frames[:, :, s : s + 5]) for s in (0, 2, 4)])
    torch.testing.assert_close(particles.views(particles.every()), alone.double())
    torch.testing.assert_close(particles.source(particles.every()), alone.double())
    torch.testing.assert_close(torch.stack(list(particles.condition(particles.every()))), alone)
    whole = prior.encode(frames)
    assert not torch.allclose(alone[1], whole[0, :, 1:4])  # no crop of the long video's latents
    assert particles.latent.shape == (5 + 2, 6, 6, 7)


def test_clips_share_what_they_overlap_in_but_for_their_first_latents(film):
    particles, _ = begun(clips(film(9)))
    ids = particles.every()
    cells = torch.arange(7.0)[:, None, None, None].expand_as(particles.latent)
    assert particles.crop(cells, ids)[:, 0, :, 0, 0].tolist() == [[0, 1, 2], [5, 2, 3], [6, 3, 4]]
    share = particles.share(ids, ids)[:, 0, :, 0, 0]
    assert share.tolist() == [[1, 1, 0.5], [1, 0.5, 0.5], [1, 0.5, 1]]
    # One picture to a latent: there is one kind of latent, and all that is shown twice is shared.
    flat, _ = begun(clips(particles.frames.path, period=1), Causal(frames=5))
    assert flat.latent.shape[0] == 9


def test_a_change_shows_where_its_clips_do_and_is_blended(film):
    particles, prior = begun(clips(film(9, 2, 2)), GaussianClips(frames=5, period=2))
    before = torch.stack(list(particles.pictures(prior)))
    with torch.no_grad():
        particles.latent[5] += 0.1  # the first latent of the second clip: frame 2, which the first shows too
    moved = torch.stack(list(particles.pictures(prior))) - before
    assert moved[[0, 1, 3, 4, 5, 6, 7, 8]].abs().max() == 0
    # 0.1 of a latent is 0.05 of a picture; the clips' weights are 3, its middle, and 1, its end.
    inside = (before[2] > 0.05) & (before[2] < 0.95)
    torch.testing.assert_close(moved[2][inside], torch.full_like(moved[2][inside], 0.05 / 4))
    assert inside.any()


def test_only_the_clips_that_are_asked_for_are_decoded(film, monkeypatch):
    particles, prior = begun(clips(film(9)))
    every, decoded, decode = list(particles.pictures(prior)), [], prior.decode
    monkeypatch.setattr(prior, "decode", lambda x: decoded.append(1) or decode(x))
    for which, count in ((slice(1), 1), (slice(7, 9), 1), (slice(2, 4), 2), (slice(None), 3)):
        decoded.clear()
        shown = list(particles.pictures(prior, which))
        assert len(decoded) == count
        assert torch.equal(torch.stack(shown), torch.stack(every[which]))
    decoded.clear()
    assert len(list(particles.preview(prior))) == len(decoded) == 1


def test_frames_larger_than_the_window_are_seen_through_windows(film):
    particles, _ = begun(clips(film(5, 6, 9), window=4))
    ids = particles.every()
    assert [divmod(i, 9) for i in ids.tolist()] == [(t, left) for t in (0, 2) for left in (0, 2, 4, 5)]
    assert particles.views(ids).shape == (8, 6, 3, 4, 4)
    canvas = torch.randn(particles.latent.shape, dtype=torch.float64)
    assert torch.equal(particles.crop(canvas, ids)[5], canvas[:3, :, 2:6, 2:6].transpose(0, 1))
    assert torch.equal(particles.began(ids)[5], particles.clip_latent[0, :, :, 2:6, 2:6])
    # A frame that is lower than the window is seen over its whole height.
    low, _ = begun(clips(particles.frames.path, window=7))
    assert low.views(low.every()).shape == (2, 6, 3, 6, 7)


def test_masks_of_frames_are_averaged_over_what_a_latent_spans(film, tmp_path):
    masks = []
    for i in range(9):
        masks.append(str(tmp_path / f"mask{i}.png"))
        Image.new("L", (7, 6), 255).save(masks[-1])
    black = Image.new("L", (7, 6), 0)
    black.putpixel((0, 0), 255)
    black.save(masks[3])
    particles, _ = begun(clips(film(9), mask=masks))
    free = particles.areas.free[:, 0, 5, 6]
    # Frames 1 and 2, then 3 and 4, of which one is closed; the first latents of the others are of 2 and 4.
    assert free.tolist() == [1, 1, 0.5, 1, 1, 1, 1]


def test_an_edit_of_clips_runs_and_is_the_same_for_every_pass(film, fit):
    particles = clips(film(9), batch=2)
    prior = Causal(frames=5, period=2, prompts={"x": [0.1, 3]}, image_guidance_scale=2.0, guidance_scale=3.0)
    module = CSDModule(
        *(prior, particles, methods.dds, RBF(), Timesteps(t_min=20, t_max=500)),
        lambda p: torch.optim.SGD(p, lr=0.5),
    )
    fit(module, 2)
    assert particles.latent.abs().max() > 0
    assert module.rows == 2 * 2 * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 4}, r"modality\.frames must be at least 1 and a multiple of 2.*not 4"),
        ({"frames": 0, "period": 1}, r"modality\.frames must be at least 1, as this prior takes, not 0"),
        (
            {"hop": 3},
            r"modality\.hop must lie between 1 and the 5 pictures of a clip, in multiples of 2, not 3",
        ),
        ({"hop": 6}, r"modality\.hop .*not 6"),
        ({"window": 0}, r"modality\.window must be a positive multiple of 1 latents, not 0"),
        ({"stride": 9}, r"modality\.stride must lie between 1 and the window \(8 latents\), not 9"),
    ],
)
def test_clips_that_cannot_be_are_refused(film, settings, message):
    with pytest.raises(InputError, match=message):
        clips(film(9), **settings)


def test_priors_and_modalities_of_other_kinds_of_views_are_refused(film):
    path = f"modality.path={film(3)}"
    for words, message in (
        (["prior=analytic", "modality=clips"], r"has clips, and .* scores single pictures.*prior=lucy_edit"),
        (
            ["prior=analytic_clips", "modality=video"],
            r"has single pictures.* scores clips; choose modality=c",
        ),
    ):
        config = composed(["experiment=video", *words, path])
        config.dir = "new"
        with pytest.raises(InputError, match=message):
            check_parts(config)


def test_clips_are_not_resized_in_one_piece(film):
    with pytest.raises(InputError, match=r"method=downscaled resizes single pictures"):
        SamplingModule(GaussianClips(frames=3), clips(film(3)), Downscaled(steps=2))


def test_a_run_of_clips_from_the_command_line(film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = csd_exp.edit(
        *("experiment=video", "prior=analytic_clips", "prior.frames=3", "prior.period=2", "prior.window=4"),
        *("modality=clips", f"modality.path={film(6, 16, 16)}", "modality.batch=2", "prompt=x", "steps=2"),
        *("callbacks=none", "logger=csv", "metrics=video"),
    )
    assert len(result.images) == 6
    assert result.metrics
