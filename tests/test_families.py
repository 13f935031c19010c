"""Every family from its folder: told by `prior=auto`, edited with by its experiment."""

import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers_folder import (
    save_3,
    save_animatediff,
    save_flow,
    save_flux,
    save_if,
    save_pipeline,
    save_wan,
    save_xl,
)
from public_folders import PUBLIC, write_public

import csd_exp
from csd_exp.config import check, composed
from csd_exp.errors import InputError
from csd_exp.families import family_of, named
from csd_exp.priors import (
    AnimateDiff,
    DeepFloydIF,
    FlowInstructPix2Pix,
    Flux,
    FluxKontext,
    InstructPix2Pix,
    InstructPix2PixXL,
    LucyEdit,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    UltraEdit,
    Wan,
)
from csd_exp.priors.base import Cond, Query, predict, row_count

SAVED = {
    "stable_diffusion": lambda path: save_pipeline(path, False),
    "instruct_pix2pix": save_pipeline,
    "instruct_pix2pix_flow": save_flow,
    "sdxl": lambda path: save_xl(path, False),
    "sdxl_instruct_pix2pix": save_xl,
    "cosxl_edit": lambda path: save_xl(path, True, True),
    "sd3": lambda path: save_3(path, False),
    "ultraedit": save_3,
    "flux": lambda path: save_flux(path, False),
    "kontext": save_flux,
    "deepfloyd_if": save_if,
    "animatediff": save_animatediff,
    "wan": lambda path: save_wan(path, False),
    "lucy_edit": save_wan,
}
CLASSES = {
    "stable_diffusion": StableDiffusion,
    "instruct_pix2pix": InstructPix2Pix,
    "instruct_pix2pix_flow": FlowInstructPix2Pix,
    "sdxl": StableDiffusionXL,
    "sdxl_instruct_pix2pix": InstructPix2PixXL,
    "sd3": StableDiffusion3,
    "ultraedit": UltraEdit,
    "flux": Flux,
    "kontext": FluxKontext,
    "deepfloyd_if": DeepFloydIF,
    "animatediff": AnimateDiff,
    "wan": Wan,
    "lucy_edit": LucyEdit,
}
EXPERIMENTS = {
    "river_sdxl": "sdxl_instruct_pix2pix",
    "river_cosxl": "cosxl_edit",
    "river_ultraedit": "ultraedit",
    "river_kontext": "kontext",
    "video_lucy": "lucy_edit",
    "video_animatediff": "animatediff",
}
OTHER_CURVES = {
    "river_cosxl": InstructPix2PixXL,
    "river_ultraedit": UltraEdit,
    "river_kontext": FluxKontext,
    "video_lucy": LucyEdit,
}
SMALL = ("modality.window=8", "modality.stride=8", "modality.batch=2", "trainer.fast_dev_run=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda family: SAVED[family](tmp_path_factory.mktemp(family) / "folder"))


@pytest.fixture(scope="module")
def priors(folder):
    return cache(lambda family: CLASSES[family](folder(family)))


def test_auto_takes_the_choice_of_the_family(folder):
    path = folder("sdxl_instruct_pix2pix")
    config = composed(["prior=auto", f"prior.path={path}", "prior.guidance_scale=2", "prompt=x"])
    assert config.prior._target_ == "csd_exp.priors.InstructPix2PixXL"
    assert (config.prior.guidance_scale, config.prior.image_guidance_scale) == (2, 1.5)
    assert config.prior.path == str(path)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_configurations_of_public_models_pass(tmp_path, name):
    family, path = write_public(tmp_path / name, name), f"prior.path={tmp_path / name}"
    assert named(["prior=auto", path]) == [f"prior={family}", path]
    config = {"path": str(tmp_path / name)}
    CLASSES[family].check(config)
    with pytest.raises(InputError, match=rf"as of {family}; use it with prior={family}\."):
        CLASSES["flux" if family == "sdxl" else "sdxl"].check(config)


@pytest.mark.parametrize("family", CLASSES)
def test_rows_are_held_to_one_device(folder, family):
    """On torch's device `meta`, where no operation may meet a tensor of another one."""
    assert family_of(folder(family))[0] == family == CLASSES[family].family
    prior = CLASSES[family](folder(family))
    image = torch.rand(1, 3, *[5] * prior.clips, 32, 32)
    conditions = prior.condition(image)
    guidance = prior.guidance("x", None if conditions is None else conditions[0])
    elsewhere = torch.device("meta")
    prior.to(elsewhere)
    denoiser = next(network for name, network in prior.networks.items() if name != "vae")
    assert denoiser.device.type == "cpu"  # texts are embedded first
    assert all(net.device.type == "meta" for name, net in prior.networks.items() if name == "vae")
    placed = [
        (weight, Cond(**{name: tensor.to(elsewhere) for name, tensor in cond.items()}))
        for weight, cond in guidance
    ]
    x_t = torch.zeros(1, *prior.encode(image.to(elsewhere)).shape[1:], device=elsewhere)
    for clean in (False, True):
        queries = [Query(x_t, 421, [prior.placed(placed, (64, 64, 0, 32))], clean)]
        (out,) = predict(prior, queries)
        assert out.device == denoiser.device == elsewhere
    assert prior.decode(x_t).device == elsewhere
    check_of_particles_here(prior, image, placed)


def check_of_particles_here(prior, image, guidance):
    """Particles on the CPU give what they have and get what they asked for; the networks lie elsewhere."""
    came = []

    def returned(out, caller):
        came.append((out.device.type, caller.device.type))
        return torch.zeros(out.shape, device=caller.device)

    prior.returned = returned
    x_t, condition = prior.encode(image), prior.condition(image)
    assert prior.decode(x_t).shape == image.shape
    images = {} if condition is None else {"image": condition[0]}
    mixed = [(weight, Cond(**(dict(cond) | images))) for weight, cond in guidance]
    outs = [predict(prior, [Query(x_t, 421, [mixed], clean)])[0] for clean in (False, True)]
    assert {out.device.type for out in (x_t, *images.values(), *outs)} == {"cpu"}
    assert set(came) == {("meta", "cpu")}
    assert len(came) >= (4 if "vae" in prior.networks else 2)


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("stable_diffusion", (3, 4)),
        ("sdxl", (3, 4)),
        ("sd3", (3, 4)),
        ("flux", (2, 2)),
        ("deepfloyd_if", (3, 4)),
        ("animatediff", (3, 4)),
        ("wan", (3, 4)),
    ],
)
def test_rows_of_a_csd_edit_view_under_a_text_to_image_prior(priors, family, rows):
    """Where the source prompt is the negative one, and where it is not."""
    x_t = torch.zeros(1, 1, 2, 2)
    for source, expected in zip(("", "a lake"), rows, strict=True):
        queries = [Query(x_t, 421, [priors(family).guidance(text)]) for text in ("a lake at night", source)]
        assert row_count(queries) == expected


def test_commands_of_the_page_are_accepted():
    page = (Path(__file__).parents[1] / "docs/priors.md").read_text(encoding="utf-8")
    lines = page.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("csd ")]
    assert len(commands) >= 9
    for words in commands:
        config = composed(words)
        config.dir = "new"
        check(config)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_layers_that_are_brought_one_by_one_say_the_same(folder, family):
    plain, prior = (CLASSES[family](folder(family), offload=offload) for offload in (False, True))
    prior.to(torch.device("cpu"))
    x_t = torch.randn(1, prior.views.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    query = Query(x_t, 421, [plain.guidance("x")])
    for _ in range(2):
        assert torch.equal(predict(prior, [query])[0], predict(plain, [query])[0])
    assert prior.fingerprint == plain.fingerprint
    with pytest.raises(InputError, match=r"prior\.compile and prior\.offload do not go together"):
        CLASSES[family](folder(family), offload=True, compile=True)


def test_a_folder_of_no_family_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("[")
    with pytest.raises(InputError, match=r"is of no family that prior=auto knows; choose one with"):
        named(["prior=auto", f"prior.path={tmp_path}"])
    with pytest.raises(InputError, match=r"prior=auto needs the folder.*prior\.path=FOLDER"):
        named(["prior=auto"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(InputError, match=r"prior\.path=nobody/nothing is no folder here"):
        composed(["prior=auto", "prior.path=nobody/nothing"])
    assert named(["prior=embedded", "prior.path=x"]) == ["prior=embedded", "prior.path=x"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_edits_with_its_family(folder, experiment, write_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_image(32, 40)
    own = []
    if experiment.startswith("video"):
        path = tmp_path / "film"
        path.mkdir()
        for i in range(7):
            write_image(32, 40, i, f"film/{i}.png")
        own = ["prior.frames=5"] + ["prior.motion=null"] * (experiment == "video_animatediff")
    result = csd_exp.edit(
        *(f"experiment={experiment}", f"prior.path={folder(EXPERIMENTS[experiment])}", *SMALL, *own),
        *(f"modality.path={path}", "metrics=none", "callbacks=none", "logger=csv"),
    )
    assert result.images[0].shape == (3, 32, 40)
    assert len(result.images) == (7 if own else 1)


def test_a_scene_is_made_from_text_under_pixels(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = csd_exp.edit(
        *("experiment=text_to_3d", "prior=deepfloyd_if", f"prior.path={folder('deepfloyd_if')}"),
        *("modality.render=null", "modality.frames=2", "modality.field.resolutions=[6]", "method=csd"),
        *("trainer.fast_dev_run=true", "metrics=none", "callbacks=none", "logger=csv"),
    )
    assert [image.shape for image in result.images] == [(3, 8, 8)] * 2


def test_timesteps_of_other_curves_have_the_signal_to_noise_ratios_of_the_public_code(folder):
    table = StableDiffusion(folder("stable_diffusion")).alphas_cumprod
    for experiment, cls in OTHER_CURVES.items():
        config = composed([f"experiment={experiment}", "prior.path=x", "modality.path=x"])
        own, timestep = cls(folder(EXPERIMENTS[experiment])).alphas_cumprod, config.schedule.timestep
        for t, theirs in ((timestep.t_min, 20), (timestep.t_max, 500)):
            ratio, expected = (a / (1 - a) for a in (own[t], table[theirs]))
            assert float(ratio / expected) == pytest.approx(1, rel=0.03)
