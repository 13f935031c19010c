"""ControlNet on tiny random parts, held against diffusers' own pipelines."""

import json
import shutil
from functools import cache

import cv2
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers_folder import save_control, save_pipeline, save_xl
from pipelines import NEGATIVE, PROMPT, T, latent, picture, relative

import csd_exp
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.images import read_image
from csd_exp.particles import Generated, Images, Panorama, Video
from csd_exp.parts import check_parts
from csd_exp.priors import ControlNet, ControlNetXL
from csd_exp.priors.base import Query, predict, row_count
from csd_exp.samplers import Downscaled, PerView, SamplingModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a random base and of two ControlNets for it, folder(large), made once for each."""

    @cache
    def make(large=False):
        path = tmp_path_factory.mktemp("prior")
        base = save_xl(path / "base", False) if large else save_pipeline(path / "base", False)
        return base, save_control(path / "one", base), save_control(path / "two", base, seed=2)

    return make


@pytest.fixture(scope="module")
def held(folder):
    """The prior of folder(large) with edges and the picture itself, and diffusers' own pipeline of it."""

    @cache
    def make(large=False):
        base, one, two = folder(large)
        nets = [ControlNetModel.from_pretrained(net) for net in (one, two)]
        if large:
            pipe = StableDiffusionXLControlNetPipeline.from_pretrained(base, controlnet=nets)
        else:
            kind = {"safety_checker": None, "requires_safety_checker": False}
            pipe = StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=nets, **kind)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.set_progress_bar_config(disable=True)
        controls = [
            {"path": str(one), "kind": "canny", "weight": 0.8, "low": 20, "high": 60},
            {"path": str(two), "kind": "tile", "weight": 0.4},
        ]
        return (ControlNetXL if large else ControlNet)(base, controls, guidance_scale=4.0), pipe

    return make


def edges(image):
    """[3, H, W] in [0, 1]: what OpenCV says of a picture."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    found = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 20, 60)
    return torch.from_numpy(found)[None].expand(3, -1, -1) / 255


def answer(pipe, noise, image, negative, steps, **place):
    controls = [edges(image[0])[None], image]
    sized = {"height": image.shape[-2], "width": image.shape[-1], "num_inference_steps": steps}
    call = {"negative_prompt": negative, "guidance_scale": 4.0, "output_type": "latent", **place}
    scales = {"controlnet_conditioning_scale": [0.8, 0.4]}
    return pipe(PROMPT, image=controls, latents=noise, **sized, **call, **scales).images


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("large", [False, True])
def test_sampling_ends_in_the_pipelines_latents(held, write_image, fit, large, negative):
    prior, pipe = held(large)
    image = str(write_image(32, 48))
    particles = Images(image, prior.views.factor, prior.views.multiple, prompt=PROMPT)
    module = SamplingModule(prior, particles, PerView(steps=4), 5, negative or "")
    module.begin()
    noise = module.x_t.clone()
    fit(module, 4)
    assert relative(particles.latent, answer(pipe, noise, particles.pixels, negative, 4)) < 1e-4


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("large", [False, True])
def test_one_guided_estimate_equals_diffusers_own_pipeline(held, monkeypatch, large, negative):
    (prior, pipe), x_t, image, clean = held(large), latent(), picture(), []

    def set_timesteps(steps, device=None):
        pipe.scheduler.num_inference_steps, pipe.scheduler.timesteps = 1000, torch.tensor([T])

    def step(*arguments, **_):
        clean.append(DDIMScheduler.step(pipe.scheduler, *arguments).pred_original_sample)
        return (clean[0],)

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", set_timesteps)
    monkeypatch.setattr(pipe.scheduler, "step", step)
    place = {"original_size": (96, 200), "crops_coords_top_left": (12, 40)} if large else {}
    guidance = prior.placed(
        prior.guidance(PROMPT, prior.condition(image)[0], negative or ""), (96, 200, 12, 40)
    )
    (ours,) = predict(prior, [Query(x_t, T, [guidance], clean=True)])
    if large:
        place |= {"negative_original_size": (96, 200), "negative_crops_coords_top_left": (12, 40)}
        place |= {"negative_target_size": (32, 32)}
    assert relative(ours, answer(pipe, x_t, image, negative, 1, **place)) < 1e-5


@pytest.mark.parametrize(("source", "negative", "rows"), [("", "", 3), ("a lake", "", 4), ("", NEGATIVE, 4)])
def test_a_csd_edit_view_costs_three_rows(held, source, negative, rows):
    prior, _ = held()
    condition = prior.condition(picture())[0]
    queries = [Query(latent(), T, [prior.guidance(text, condition, negative)]) for text in (PROMPT, source)]
    assert row_count(queries) == rows
    assert all(cond["control"] is condition for q in queries for _, cond in q.guidance[0])


def test_windows_cut_the_control_of_the_whole_picture(held, write_image, monkeypatch, build, fit):
    prior, _ = held()
    file = write_image(32, 80)
    panorama = Panorama(str(file), 4, 8, 2, stride=6, prompt=PROMPT)
    seen = []
    embedding = prior.nets[0].controlnet_cond_embedding
    hook = embedding.register_forward_hook(lambda _, inputs, __: seen.extend(inputs[0]))
    module = build(prior, panorama)
    fit(module, 1)
    hook.remove()
    assert module.rows == 3 * 3
    whole = edges(read_image(file))
    windows = [whole[..., left : left + 32] for left in (0, 24, 48)]
    assert all(any(torch.equal(one, window) for window in windows) for one in seen)
    assert all(any(torch.equal(one, window) for one in seen) for window in windows)


def given(folder, kinds=("given", "gray")):
    return [{"path": str(net), "kind": kind} for net, kind in zip(folder()[1:], kinds, strict=True)]


def test_controls_that_are_given_are_cut_like_the_views(folder, write_image, tmp_path):
    prior = ControlNet(folder()[0], given(folder, ("given", "given")))
    file, one, two = (str(write_image(30, 52, seed)) for seed in range(3))
    panorama = Panorama(file, 4, 8, 2, controls=[one, two], wrap=True)
    panorama.begin(prior, Draws())
    shown = torch.nn.functional.pixel_shuffle(panorama.condition_latent, 4)
    assert shown.shape == (1, 6, 32, 52)
    assert torch.equal(shown[0, :3, :30], read_image(one))
    assert torch.equal(shown[0, 3:, :30], read_image(two))

    for name in ("frames", "masks"):
        (tmp_path / name).mkdir()
        for i in range(3):
            shutil.copy(write_image(8, 8, 10 * len(name) + i), tmp_path / name / f"{i}.png")
    for cls, path in ((Images, str), (Video, str)):
        particles = cls(path(tmp_path / "frames"), 4, 2, controls=[path(tmp_path / "masks")] * 2)
        particles.begin(prior, Draws())
        shown = torch.nn.functional.pixel_shuffle(particles.condition_latent, 4)
        assert torch.equal(shown[2, :3], read_image(tmp_path / "masks/2.png"))
    small = Downscaled(steps=1).seen(Panorama(file, 4, 8, 2, controls=[one, two]), 16)
    small.begin(prior, Draws())
    assert small.condition_latent.shape == (1, 96, 4, 4)
    (tmp_path / "masks/2.png").unlink()
    short = Video(str(tmp_path / "frames"), 4, 2, controls=[str(tmp_path / "masks")] * 2)
    with pytest.raises(InputError, match=r"modality\.controls has only 2 pictures"):
        short.begin(prior, Draws())


class Draws:
    """Noise is not looked at, as posteriors are encoded to their mode."""

    def normal(self, purpose, particle, shape):
        return torch.zeros(shape)


def test_kinds_are_what_they_say(folder):
    gray, tile = (ControlNet(folder()[0], given(folder, (kind, "tile"))) for kind in ("gray", "tile"))
    image = picture()
    shown = torch.nn.functional.pixel_shuffle(gray.condition(image), 4)
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * image[0]).sum(0)
    torch.testing.assert_close(shown[0, :3], luma.expand(3, -1, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.nn.functional.pixel_shuffle(tile.condition(image), 4)[:, :3], image)
    assert gray.fingerprint == tile.fingerprint


def test_the_experiment_edits(folder, write_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    control = {"path": str(folder()[1]), "kind": "canny"}
    result = csd_exp.edit(
        *("experiment=controlnet", f"modality.path={write_image(32, 40)}", "modality.window=8"),
        *("metrics=none", "callbacks=none", "logger=csv", "trainer.fast_dev_run=true", "prompt=x"),
        **{"prior.path": str(folder()[0]), "prior.controls": [control]},
    )
    assert result.images[0].shape == (3, 32, 40)


def refused(base, controls):
    with pytest.raises(InputError) as e:
        ControlNet.check({"path": str(base), "controls": controls})
    assert str(e.value).count("\n") == 0
    return str(e.value)


def test_controls_that_cannot_be_used_are_one_sentence(folder, tmp_path):
    base, one, _ = folder()
    for controls, message in (
        ([], "prior.controls is empty"),
        ([{"kind": "canny"}], "prior.controls[0] has no path"),
        ([{"path": str(one), "wieght": 1}], "prior.controls[0].wieght is no key, did you mean weight"),
        ([{"path": str(one), "weight": "much"}], "weight must be a number, not 'much'"),
        ([{"path": str(one), "kind": "depth"}], "must be one of canny, gray, tile, given, not 'depth'"),
        ([{"path": "/nope"}], "prior.controls[0].path=/nope is no folder"),
        ([{"path": str(base / "unet")}], "is no ControlNet: its config.json says UNet2DConditionModel"),
        ([{"path": str(folder(True)[1])}], "is for another prior: its cross_attention_dim is 56"),
    ):
        assert message in refused(base, controls)
    ControlNet.check({"path": str(base), "controls": [{"path": str(one)}]})
    coarse = save_control(tmp_path / "coarse", base, steps=1)
    assert "its control has 2 pixels to a latent" in refused(base, [{"path": str(coarse)}])
    copy = shutil.copytree(one, tmp_path / "copy")
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"prior\.controls\[0\]\.path=.*cannot be loaded"):
        ControlNet(base, [{"path": str(copy)}])
    config = json.loads((copy / "config.json").read_text()) | {"global_pool_conditions": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert "pools its control" in refused(base, [{"path": str(copy)}])
    weights.unlink()
    assert "lacks its weights" in refused(base, [{"path": str(copy)}])


def test_given_controls_must_be_as_many_and_as_large(folder, write_image):
    def attempt(*overrides):
        path = write_image(8, 8)
        config = composed(
            ["experiment=controlnet", f"prior.path={folder()[0]}", f"modality.path={path}", *overrides]
        )
        config.prior.controls, config.dir = [{"path": str(folder()[1]), "kind": "given"}], "new"
        check_parts(config)

    with pytest.raises(InputError, match=r"modality\.controls has 0 entries, and 1 of prior\.controls"):
        attempt()
    with pytest.raises(InputError, match=r"has 12 x 8 pixels and modality\.path 8 x 8; both must be alike"):
        attempt(f"modality.controls=[{write_image(8, 12)}]")


def test_what_has_no_picture_cannot_be_controlled(held, build, fit):
    prior, _ = held()
    with pytest.raises(InputError, match=r"prior=controlnet needs a picture"):
        prior.guidance(PROMPT)
    with pytest.raises(InputError, match=r"prior=controlnet needs a picture"):
        fit(build(prior, Generated(4, 2, 8, prompt=PROMPT)), 1)
