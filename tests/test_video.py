"""Video edits: frames as particles, one at a time, from a command line to files that players show."""

import os
import re
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from clips import numbered, write_clip
from PIL import Image

import csd_exp
from csd_exp.callbacks import Media
from csd_exp.errors import InputError
from csd_exp.images import read_image, saved_pictures, to_uint8, write_png
from csd_exp.particles import Images, Video
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.report import write_report
from csd_exp.schedules import Draw
from csd_exp.svgd import RBF, NoKernel
from csd_exp.videos import Frames, Sound, write_mp4

FPS = Fraction(30000, 1001)
SIZE = (11, 18)  # height and width, a multiple of nothing
EVEN = (14, 18)  # as H.264 has it


def picture(number: int, height: int = SIZE[0], width: int = SIZE[1]) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, (x + number / 10) % 1])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve frames that only natural order puts in order."""
    for number in range(12):
        write_png(picture(number), tmp_path / f"clip/frame_{number}.png")
    return tmp_path / "clip"


@pytest.fixture
def mp4(tmp_path) -> Path:
    write_mp4((picture(i, *EVEN) for i in range(12)), tmp_path / "clip.mp4", FPS)
    return tmp_path / "clip.mp4"


def prior(**settings) -> GaussianMixture:
    scales = {"guidance_scale": 4.0, "image_guidance_scale": 1.5}
    return GaussianMixture(prompts={"": [0, 1], "dark": [1, 0]}, **scales | settings)


def video(path: Path, **settings) -> Video:
    return Video(str(path), 1, 4, prompt="dark", **settings)


def test_a_video_is_the_set_of_its_frames(folder, build, fit):
    """Noise, batches, padding and coupling are those of the same frames as images."""
    files = [str(folder / f"frame_{i}.png") for i in range(12)]
    latents = []
    for particles in (video(folder, batch=5), Images(files, 1, 4, batch=5, prompt="dark")):
        module = build(prior(), particles, kernel=RBF(normalize="rms"))
        fit(module, 3)
        latents.append(module.particles.latent.detach())
    assert latents[0].shape == (12, 3, 12, 20)
    assert torch.equal(*latents)


def test_untouched_frames_come_out_with_the_pixels_that_went_in(folder, build):
    module = build(prior(), video(folder, start=1, stop=11, step=3))
    expected = [read_image(folder / f"frame_{i}.png") for i in (1, 4, 7, 10)]
    torch.testing.assert_close(list(module.images()), expected, atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(module.particles.originals(), expected, strict=True))
    (second,) = module.images(slice(1, 2))
    torch.testing.assert_close(second, expected[1], atol=1e-6, rtol=0)
    assert module.particles.film.times == [Fraction(i, 8) for i in range(5)]


def test_a_step_scores_its_batch_and_leaves_the_other_frames(folder, build, fit):
    module = build(prior(), video(folder, batch=3))
    start = module.particles.latent.detach().clone()
    fit(module, 1)
    moved = (module.particles.latent.detach() != start).flatten(1).any(1)
    assert sorted(module.particles.choose(Draw(0, 0)).tolist()) == moved.nonzero().flatten().tolist()
    assert (int(moved.sum()), module.rows) == (3, 3 * 5)


def test_a_video_of_one_frame_moves_as_without_a_kernel(folder, build, fit):
    one, alone = (build(prior(), video(folder, stop=1), kernel=k) for k in (RBF(), NoKernel()))
    fit(one, 3), fit(alone, 3)
    assert torch.equal(one.particles.latent, alone.particles.latent)
    assert not torch.equal(one.particles.latent, one.particles.source_latent)


def test_outside_of_a_mask_no_pixel_of_any_frame_changes(folder, tmp_path, build, fit):
    mask = torch.zeros(3, *SIZE)
    mask[:, 3:9, 4:12] = 1
    write_png(mask, tmp_path / "mask.png")
    module = build(prior(), video(folder, mask=str(tmp_path / "mask.png")))
    fit(module, 2)
    for edited, source in zip(module.images(), module.particles.originals(), strict=True):
        assert torch.equal(edited[mask == 0], source[mask == 0])
        assert not torch.allclose(edited[:, 5:7, 7:9], source[:, 5:7, 7:9])


def test_each_frame_may_have_a_mask_of_its_own(folder, tmp_path, build, fit):
    masks = torch.zeros(2, 3, *SIZE)
    masks[0, :, :5], masks[1, :, 5:] = 1, 1
    for i, mask in enumerate(masks):
        write_png(mask, tmp_path / f"mask_{i}.png")
    given = [str(tmp_path / f"mask_{i}.png") for i in range(2)]
    module = build(prior(), video(folder, mask=given, stop=2, feather=0))
    fit(module, 2)
    frames = zip(module.images(), module.particles.originals(), masks, strict=True)
    for i, (edited, source, mask) in enumerate(frames):
        assert torch.equal(edited[mask == 0], source[mask == 0])
        assert torch.equal(module.particles.facts(i)["outside"], mask[0] == 0)
    with pytest.raises(
        InputError, match=r"modality\.mask=.* holds 2 masks for 3 images; give one for all or"
    ):
        video(folder, mask=given, stop=3)


class Watched(GaussianMixture):
    """Keeps count of the pictures that are alive."""

    def __init__(self):
        super().__init__(prompts={"": [0, 1], "dark": [1, 0]})
        self.seen: list[weakref.ref] = []
        self.most = 0

    def watch(self, image: torch.Tensor) -> None:
        self.seen = [ref for ref in self.seen if ref() is not None] + [weakref.ref(image)]
        self.most = max(self.most, len(self.seen))

    def encode(self, image, noise=None):
        assert len(image) == 1
        self.watch(image)
        return super().encode(image, noise)

    def decode(self, latent):
        assert len(latent) == 1
        self.watch(image := super().decode(latent))
        return image


def test_few_pictures_of_a_long_video_exist_at_once(folder, build, fit, tmp_path):
    watched = Watched()
    module = build(watched, video(folder))
    fit(module, 2, callbacks=[Media(tmp_path / "run", every_n_steps=1)])
    assert len(saved_pictures(tmp_path / "run/media", "edited")) == 12
    assert 0 < watched.most <= 3


def probed(path: Path) -> tuple[Fraction, int, tuple[int, int]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.average_rate, sum(1 for _ in container.decode(stream)), (stream.width, stream.height)


def test_media_of_a_video_are_frames_and_what_plays_them(mp4, build, fit, tmp_path):
    module = build(prior(), video(mp4))
    fit(module, 2, callbacks=[Media(tmp_path / "run", every_n_steps=1)])
    media, saved = tmp_path / "run/media", {"pictures.json", "source", "edited", "edited_000001.png"}
    players = {f"{name}.{kind}" for name in ("source", "edited", "side_by_side") for kind in ("mp4", "gif")}
    assert {f.name for f in media.iterdir()} == players | saved
    for name, width in {"source": 18, "edited": 18, "side_by_side": 36}.items():
        assert probed(media / f"{name}.mp4") == (FPS, 12, (width, 14))
    edited = saved_pictures(media, "edited")
    assert [f.name for f in edited.files] == [f"{i:06d}.png" for i in range(12)]
    for saved, now in zip(edited, module.images(), strict=True):
        assert np.array_equal(to_uint8(saved), to_uint8(now))
    for saved, frame in zip(saved_pictures(media, "source"), Frames(mp4), strict=True):
        assert np.array_equal(to_uint8(saved), to_uint8(frame))
    for shown, saved in zip(Frames(media / "edited.mp4"), edited, strict=True):
        assert (shown - saved).abs().mean() < 0.05

    (tmp_path / "run/config.yaml").write_text("name: clip\nprompt: dark\n")
    page = write_report(tmp_path / "run").read_text()
    assert page.count('<video src="data:video/mp4;base64,') == 1
    assert "<b>12</b> frames at <b>29.97</b> a second of <b>18 × 14</b> px" in page
    assert page.count('<img class="edited"') == 1


def test_an_edit_keeps_the_times_and_the_sound_of_an_uneven_video(build, fit, tmp_path):
    times = [0, 33, 66, 1066, 1100, 2600]
    clip = write_clip(tmp_path / "clip.mkv", numbered(5, 12, 20), times, sound="aac", options={"bf": "0"})
    fit(build(prior(), video(clip, stop=4)), 1, callbacks=[Media(tmp_path / "run", every_n_steps=0)])
    for name in ("source", "edited", "side_by_side"):
        player = cv2.VideoCapture(str(tmp_path / f"run/media/{name}.mp4"))
        shown = [(player.read(), player.get(cv2.CAP_PROP_POS_MSEC))[1] for _ in range(4)]
        assert shown == pytest.approx(times[:4], abs=1)
        with av.open(str(tmp_path / f"run/media/{name}.mp4")) as container:
            lasts = [float(s.duration * s.time_base) for s in container.streams]
            assert [stream.type for stream in container.streams] == ["video", "audio"]
            assert lasts == pytest.approx([1.1, 1.1], abs=0.03)
        with Image.open(tmp_path / f"run/media/{name}.gif") as gif:
            delays = [(gif.seek(i), gif.info["duration"])[1] for i in range(gif.n_frames)]
            assert delays == pytest.approx([30, 40, 1000, 30], abs=10)


def test_sound_that_fails_takes_no_picture_along(build, fit, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "clip.mp4", numbered(4, 12, 20), sound="aac")

    def failing(sound, container):
        raise av.InvalidDataError(1, "Invalid data found")
        yield

    monkeypatch.setattr(Sound, "copied", failing)
    fit(build(prior(), video(clip)), 1, callbacks=[Media(tmp_path / "run", every_n_steps=0)])
    assert probed(tmp_path / "run/media/edited.mp4") == (24, 4, (20, 12))
    said = capsys.readouterr().err
    assert (
        said.count("csd: the sound of the video cannot be copied (Invalid data found), and is left out.") == 1
    )


def test_an_edit_of_more_frames_a_second_than_a_gif_holds_ends_well(build, fit, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", numbered(12, 12, 20), Fraction(240))
    fit(build(prior(), video(clip)), 1, callbacks=[Media(tmp_path / "run", every_n_steps=0)])
    assert probed(tmp_path / "run/media/edited.mp4") == (240, 12, (20, 12))
    with Image.open(tmp_path / "run/media/edited.gif") as gif:
        assert 1 < gif.n_frames <= 3
    assert not list(tmp_path.rglob("*.part"))


# The command line

RUN = [
    *("experiment=video", "prior=analytic", "prior.guidance_scale=4", "+prior.prompts.dark=[0,1]"),
    *("modality.path=clip.mp4", "modality.batch=4", "prompt=dark", "steps=6", "logger=csv"),
]


def csd(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, "-m", "csd_exp", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def latent(folder: Path) -> torch.Tensor:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


def test_a_video_is_edited_and_resumes_to_the_same_bits(mp4, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csd_exp.edit(*RUN, "metrics=none", "hydra.run.dir=run")
    media = tmp_path / "run/media"
    assert probed(media / "edited.mp4") == (FPS, 12, (18, 14))
    assert [len(saved_pictures(media, name)) for name in ("source", "edited")] == [12, 12]
    assert all(saved_pictures(media, "edited")[i].shape == (3, *EVEN) for i in (0, 11))
    assert not list((tmp_path / "run").rglob("*.part"))
    assert "<video" in (tmp_path / "run/report.html").read_text()

    class PowerCut(Exception):
        pass

    def cut(self, trainer, *_):
        if trainer.global_step == 4:
            raise PowerCut

    every = ["callbacks.checkpoint.every_n_steps=3", "metrics=none", "hydra.run.dir=half"]
    with monkeypatch.context() as patched:
        patched.setattr(Media, "on_train_batch_end", cut)
        with pytest.raises(PowerCut):
            csd_exp.edit(*RUN, *every)
    result = csd_exp.edit(*RUN, *every[:2], "ckpt_path=half/last.ckpt")
    assert torch.equal(latent(tmp_path / "half"), latent(tmp_path / "run"))
    assert len(result.images) == 12
    assert torch.equal(result.images[7], saved_pictures(media, "edited")[7])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: [f.unlink() for f in folder.iterdir()], "clip holds no image"),
        (
            lambda folder: write_png(picture(5, width=20), folder / "frame_5.png"),
            r"frame_5\.png has 20 x 11 pixels",
        ),
        (
            lambda folder: (folder / "frame_5.png").write_bytes(b"x"),
            r"frame_5\.png cannot be read as an image",
        ),
        (
            lambda folder: (folder / "frame_5.png").write_bytes((folder / "frame_5.png").read_bytes()[:-40]),
            r"frame_5\.png cannot be read as an image",
        ),
    ],
    ids=["empty", "of two sizes", "corrupt", "truncated"],
)
def test_frames_that_cannot_be_used_are_named_before_a_step_is_taken(folder, made, message, monkeypatch):
    made(folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=message) as refused:
        csd_exp.edit(*RUN, "modality.path=clip", "hydra.run.dir=run")
    assert len(re.findall(r"[.;] [A-Z]", str(refused.value))) == 0
    assert not (folder.parent / "run").exists()
