"""One list of all priors, residuals, kernels, modalities and samplers, and laws over all that fit together.

A new entry is tested by being listed.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from diffusers_folder import (
    save_3,
    save_control,
    save_flow,
    save_flux,
    save_if,
    save_motion,
    save_pipeline,
    save_wan,
    save_xl,
)
from PIL import Image
from scenes import write_scene
from toys import Learned, Waves

from csd_exp import methods
from csd_exp.facts import KNOWN
from csd_exp.methods import needs_source
from csd_exp.module import CSDModule, ParticleModule
from csd_exp.particles import (
    Canvas,
    Clips,
    EditedField,
    EditedPhotographs,
    Generated,
    GeneratedScene,
    Images,
    Panorama,
    Particles,
    Video,
)
from csd_exp.priors import (
    AnimateDiff,
    ControlNet,
    DeepFloydIF,
    FlowInstructPix2Pix,
    Flux,
    FluxKontext,
    GaussianClips,
    GaussianFlow,
    GaussianMixture,
    InstructPix2Pix,
    InstructPix2PixXL,
    LucyEdit,
    Prior,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    UltraEdit,
    Wan,
)
from csd_exp.samplers import (
    Downscaled,
    FlowEdit,
    MultiDiffusion,
    PerView,
    SamplingModule,
    SDEdit,
    StochSync,
    SyncTweedies,
)
from csd_exp.scene.voxels import Voxels
from csd_exp.schedules import Draw, Timesteps
from csd_exp.svgd import IMQ, RBF, Kernel, NoKernel, Uniform

ANALYTIC = {
    "prompts": {"": [1.0, 1.0], "red": [0.2, 3.0]},
    "std": 0.4,
    "image_std": 0.7,
    "guidance_scale": 7.5,
    "image_guidance_scale": 5.0,
    "window": 6,
}
PRIORS: dict[str, Callable[[], Prior]] = {
    "mixture": lambda: GaussianMixture(**ANALYTIC),
    "flow": lambda: GaussianFlow(**ANALYTIC),
    "clips": lambda: GaussianClips(frames=3, period=2, **ANALYTIC),
    "instruct_pix2pix": lambda: InstructPix2Pix(folder(True), guidance_scale=7.5, dtype="float64"),
    "stable_diffusion": lambda: StableDiffusion(folder(False), guidance_scale=7.5, dtype="float64"),
    "sdxl": lambda: StableDiffusionXL(folder(False, save_xl), dtype="float64"),
    "cosxl_edit": lambda: InstructPix2PixXL(folder(True, save_xl, edm=True), dtype="float64"),
    "sd3": lambda: StableDiffusion3(folder(False, save_3), dtype="float64"),
    "flux": lambda: small(Flux(folder(False, save_flux), dtype="float64")),
    "kontext": lambda: small(FluxKontext(folder(True, save_flux), dtype="float64")),
    "controlnet": lambda: ControlNet(
        *(folder(False), [{"path": folder(False, save_controlnet), "kind": "gray"}]), dtype="float64"
    ),
    "ultraedit": lambda: UltraEdit(folder(True, save_3, t5=False), dtype="float64"),
    "deepfloyd_if": lambda: DeepFloydIF(folder(False, save_if), dtype="float64"),
    "animatediff": lambda: AnimateDiff(
        folder(False), motion=folder(False, save_adapter), frames=2, dtype="float64"
    ),
    "instruct_pix2pix_flow": lambda: FlowInstructPix2Pix(folder(True, save_flow), dtype="float64"),
    "wan": lambda: Wan(folder(False, save_wan), frames=5, dtype="float64"),
    "lucy_edit": lambda: LucyEdit(folder(True, save_wan), frames=5, dtype="float64"),
}
# What each of the other families is tried with, making pictures or editing them.
FAMILIES = {
    "instruct_pix2pix": ("panorama", "generated", "field"),
    "stable_diffusion": ("panorama", "generated", "field"),
    "sdxl": ("generated",),
    "cosxl_edit": ("panorama",),
    "sd3": ("generated",),
    "ultraedit": ("panorama",),
    "flux": ("generated",),
    "kontext": ("panorama",),
    "controlnet": ("panorama",),
    "deepfloyd_if": ("generated", "field"),
    "animatediff": ("clips",),
    "instruct_pix2pix_flow": ("panorama",),
    "wan": ("clips",),
    "lucy_edit": ("clips",),
}
ONCE = {
    "panorama": [("dds", "rbf")],
    "clips": [("dds", "rbf")],
    "generated": [("sds", "imq")],
    "field": [("sds", "rbf")],
}
EXACT = (
    "mixture",
    "flow",
    "clips",
)  # instant: these take part in the full product, each other family once per law
RESIDUALS: dict[str, Callable[[], Any]] = {
    "sds": lambda: methods.sds,
    "dds": lambda: methods.dds,
    "delta_velocity": lambda: methods.delta_velocity,
    "pds": lambda: partial(methods.pds, spacing=2),
    "classifier_sd": lambda: methods.classifier_sd,
    "ism": lambda: partial(methods.ism, stride=300),
    "sdi": lambda: partial(methods.sdi, stride=300),
    "vsd": lambda: methods.VSD(lr=0.01),
    "learned": Learned,
}
TURNS = ("delta_velocity", "ism", "sdi", "vsd")  # each kernel once, every time on the next modality
KERNELS: dict[str, Kernel] = {
    "none": NoKernel(),
    "rbf": RBF(),
    "imq": IMQ(space="x_0", normalize="rowsum", repulsion_scale="stein"),
    "uniform": Uniform(normalize="rms"),
    "features": RBF(space="features", normalize="rms", bandwidth="median_offdiagonal"),
}
REGIONS = [{"prompt": "blue", "box": [0, 0, 0.5, 1]}, {"prompt": "red", "box": [0.5, 0, 1, 1]}]
MASK = [0, 0, 0.8, 1]
MODALITIES: dict[str, Callable[..., Particles]] = {
    "images": lambda f, m, **s: Images([f / f"{i}.png" for i in range(3)], f_(m), m_(m), **s),
    "panorama": lambda f, m, **s: Panorama(f / "wide.png", f_(m), m.window, m_(m), **s),
    "around": lambda f, m, **s: Panorama(
        *(f / "wide.png", f_(m), m.window, m_(m)),
        **{"batch": 2, "wrap": True, "jitter": True, "mask": MASK, "taper": "hann"} | s,
    ),
    "video": lambda f, m, **s: Video(f, f_(m), m_(m), regions=REGIONS, **{"batch": 2} | s),
    "clips": lambda f, m, **s: Clips(
        *(f, f_(m), m_(m), 4, m.frames or 3, m.period),
        **{"batch": 2, "regions": REGIONS, "mask": MASK} | s,
    ),
    "generated": lambda f, m, **s: Generated(f_(m), m_(m), m.window, count=3, **s),
    "field": lambda f, m, **s: Waves(side=f_(m) * m_(m) * 4, **s),
    "scene": lambda f, m, **s: EditedPhotographs(
        str(f / "scene"),
        f_(m),
        m_(m),
        m.window,
        dir=str(f / "run"),
        views=2,
        edit_steps=2,
        fit_steps=3,
        **seen(f) | s,
    ),
    "scene_field": lambda f, m, **s: EditedField(
        str(f / "scene"), f_(m), m_(m), m.window, **seen(f) | {"batch": 2} | s
    ),
    "rendered": lambda f, m, **s: GeneratedScene(
        *(f_(m), m_(m), m.window, FIELD), **{"batch": 3, "frames": 2, "directions": None} | s
    ),
}
OF_CLIPS = ("clips",)
SCENES = ("scene", "scene_field", "rendered")  # slower: one kernel for each residual
WITHOUT_SOURCE = ("generated", "rendered")
SAMPLERS: dict[str, PerView] = {
    "per_view": PerView(steps=3),
    "multidiffusion": MultiDiffusion(steps=3),
    "synctweedies": SyncTweedies(steps=3),
    "sdedit": SDEdit(steps=3, strength=0.7),
    "downscaled": Downscaled(steps=3),
    "flowedit": FlowEdit(steps=3, averages=2),
    "stochsync": StochSync(steps=3, inner=2),
}
SAMPLER_TURNS = {"flowedit": ("images", "video"), "stochsync": ("video", "generated")}


FIELD = partial(Voxels, resolutions=(6,), rays=16, ball=0.9, dtype="float64")


def seen(folder: Path) -> dict[str, Any]:
    own = {"reconstruction_steps": 2, "cache": str(folder / "cache"), "frames": 2}
    return own | {"field": partial(FIELD, ball=None)}


def f_(views) -> int:
    return views.factor


def m_(views) -> int:
    return views.multiple


def fits(method: object, modality: str) -> bool:
    return not (needs_source(method) and modality in WITHOUT_SOURCE)


def product() -> Iterator[tuple[str, str, str, str]]:
    """Every combination that fits together: all of them on one exact prior, each once on the others."""
    for prior in PRIORS:
        for r, residual in enumerate(RESIDUALS):
            for k, kernel in enumerate(KERNELS):
                for m, modality in enumerate(MODALITIES):
                    slow = modality in (*SCENES, *OF_CLIPS)
                    exact = prior == exact_for(modality)
                    every = exact and (not slow or residual in TURNS or (r + k) % 5 == 0)
                    once = prior == "flow" and (r + k + m) % 5 == 0 and not slow
                    if residual in TURNS:
                        turn = m == (2 * r + k) % (len(MODALITIES) - len(SCENES))
                        every, once = every and turn, once and turn
                    family = prior not in EXACT and (residual, kernel) in ONCE.get(modality, ())
                    family = family and modality in FAMILIES[prior]
                    learned = residual == "learned" and prior not in EXACT  # of three channels
                    if (every or once or family) and not learned and fits(RESIDUALS[residual](), modality):
                        yield prior, residual, kernel, modality


def exact_for(modality: str) -> str:
    """The exact prior that a modality takes part in the full product with."""
    return "clips" if modality in OF_CLIPS else "mixture"


def save_controlnet(path: Path, editing: bool) -> Path:
    return save_control(path, Path(folder(editing)))


def save_adapter(path: Path, editing: bool) -> Path:
    return save_motion(path)


@cache
def folder(editing: bool, save: Callable[..., Path] = save_pipeline, **kind) -> str:
    return str(save(FOLDERS["priors"] / f"{save.__name__}{editing}", editing, **kind))


FOLDERS: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """Pictures that all modalities take, and where tiny pipelines are saved."""
    made = tmp_path_factory.mktemp("laws")
    generator = np.random.default_rng(0)
    for name, size in {"0": (6, 7), "1": (6, 7), "2": (6, 7), "../wide": (9, 20)}.items():
        (made / "frames").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / "frames" / f"{name}.png")
        Image.fromarray(pixels).save(made / f"{name.removeprefix('../')}.png")
    write_scene(made / "scene", 3, 1, 8)
    FOLDERS.update(pictures=made, priors=made)
    folder.cache_clear()
    priors.cache_clear()


def small(prior: Prior) -> Prior:
    """The same where windows are of 8 latents, whatever the network was trained at."""
    prior.views = prior.views._replace(window=8)
    return prior


@cache
def priors(name: str) -> Prior:
    return PRIORS[name]()


def particles(modality: str, prior: Prior, **settings) -> Particles:
    pictures = FOLDERS["pictures"] / "frames" if modality in ("video", "clips") else FOLDERS["pictures"]
    return MODALITIES[modality](pictures, prior.views, **{"prompt": "red", "dtype": "float64"} | settings)


def features(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.mean((2, 3)) ** 2, images.std((2, 3)).sin()], 1)


def module(prior, residual, kernel, modality, seen=None, **settings) -> CSDModule:
    scored = priors(prior)
    return CSDModule(
        scored,
        particles(modality, scored, **settings) if seen is None else seen,
        RESIDUALS[residual](),
        KERNELS[kernel],
        Timesteps(t_min=20, t_max=500),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lr=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        features=features,
        seed=3,
    )


class SaveAt(L.Callback):
    """Saves a checkpoint after one step, and changes nothing."""

    def __init__(self, step: int, file: Path):
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


def fit(what: ParticleModule, steps: int, checkpoint: Path | None = None, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(what, range(1000), ckpt_path=checkpoint)


def state(what: ParticleModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in what.parameters()])


@pytest.mark.parametrize(("prior", "residual", "kernel", "modality"), list(product()))
def test_laws_of_a_step(prior, residual, kernel, modality, tmp_path, monkeypatch):
    """Order and chunks do not matter, rows are counted, a resumed run has the same bits, something moves."""
    half, whole = tmp_path / "half.ckpt", begun(module(prior, residual, kernel, modality))
    scored, start = priors(prior), state(whole)
    rows, chunk = counted(scored, monkeypatch), scored.row_chunk
    learner = getattr(whole.residual, "learner", None)
    if learner is not None:
        network = learner.eps
        monkeypatch.setattr(learner, "eps", lambda x, t, c: rows.append(len(c)) or network(x, t, c))
    fit(whole, 3, None, SaveAt(2, half))
    assert sum(rows) == whole.rows > 0
    assert torch.isfinite(state(whole)).all()
    assert not torch.equal(state(whole), start)

    resumed = module(prior, residual, kernel, modality)
    fit(resumed, 3, half)
    assert torch.equal(state(resumed), state(whole))
    assert resumed.rows == whole.rows

    monkeypatch.setattr(scored, "row_chunk", 2)
    backwards = module(prior, residual, kernel, modality)
    choose = backwards.particles.choose
    monkeypatch.setattr(backwards.particles, "choose", lambda draw: choose(draw).flip(0))
    fit(backwards, 3)
    monkeypatch.setattr(scored, "row_chunk", chunk)
    torch.testing.assert_close(state(backwards), state(whole), rtol=1e-7, atol=1e-7)


def counted(scored: Any, monkeypatch) -> list[int]:
    """The rows of each call from now on, by whichever of its two names; one may ask the other."""
    rows: list[int] = []
    within: list[str] = []

    def call(name, network, x, t, conds):
        if not within:
            rows.append(len(conds))
        within.append(name)
        try:
            return network(x, t, conds)
        finally:
            within.pop()

    for name in ("eps", "clean"):
        monkeypatch.setattr(scored, name, partial(call, name, getattr(scored, name)))
    return rows


def begun(what: ParticleModule) -> ParticleModule:
    what.begin()
    return what


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_one_view_moves_as_without_a_kernel(residual, modality):
    if not fits(RESIDUALS[residual](), modality) or (residual in TURNS and modality != "around"):
        pytest.skip("a residual that needs a source, or one that has its turn elsewhere")
    ends = []
    for kernel in KERNELS:
        one = module(exact_for(modality), residual, kernel, modality, batch=1)
        fit(one, 2)
        ends.append(state(one))
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize(
    ("prior", "modality"),
    [
        *[(exact_for(modality), modality) for modality in MODALITIES],
        *[("stable_diffusion", modality) for modality in MODALITIES if modality not in OF_CLIPS],
    ],
)
def test_what_a_view_descends_reaches_the_parameters(modality, prior):
    """The gradient of <what the prior is shown, c> against finite differences along a random direction."""
    scored = priors(prior)
    seen = particles(modality, scored)
    seen.begin(scored, Draw(0, 0))
    ids = seen.choose(Draw(0, 0))

    def shown():
        x = seen.views(ids)
        return scored.encode(x) if seen.space == "pixel" else x

    generator = torch.Generator().manual_seed(0)
    c = torch.randn(shown().shape, generator=generator, dtype=torch.float64)
    shares = seen.share(ids, ids)
    ((shares * c).detach() * shown()).sum().backward()
    moved = [p for p in seen.parameters() if p.requires_grad]
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in moved]
    slope, gradient = [], sum(float((p.grad * d).sum()) for p, d in zip(moved, along, strict=True))
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(moved, along, strict=True):
                p += h * d
            slope.append(float((shares * c * shown()).sum()))
            for p, d in zip(moved, along, strict=True):
                p -= h * d
    assert gradient == pytest.approx((slope[0] - slope[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("modality", MODALITIES)
def test_shares_of_a_step_sum_to_one_at_most(modality):
    scored = priors(exact_for(modality))
    seen = particles(modality, scored)
    seen.begin(scored, Draw(0, 0))
    for step in range(3):
        chosen = seen.choose(Draw(0, step))
        assert len(set(chosen.tolist())) == len(chosen)
        if isinstance(seen, Canvas):
            total = seen.added(seen.share(chosen, chosen), chosen)
            assert total.max() <= 1 + 1e-12
            assert torch.equal(total > 0, seen.touched(chosen))


@pytest.mark.parametrize("modality", MODALITIES)
def test_what_is_known_of_pictures_has_names_that_metrics_may_ask_for(modality):
    scored = priors(exact_for(modality))
    seen = particles(modality, scored)
    seen.begin(scored, Draw(0, 0))
    pictures, originals = list(seen.pictures(scored)), list(seen.originals())
    assert len(pictures) == seen.count
    assert len(originals) == (seen.count if seen.has_source else 0)
    for i, picture in enumerate(pictures):
        assert set(seen.facts(i)) <= set(KNOWN)
        assert seen.facts(i)["prompt"]
        assert picture.shape[0] == 3
        assert 0 <= picture.min() <= picture.max() <= 1
        if seen.has_source:
            torch.testing.assert_close(picture.float(), originals[i].float(), atol=1e-6, rtol=0)


# Samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("modality", [m for m in MODALITIES if m not in ("field", *SCENES)])
@pytest.mark.parametrize("prior", PRIORS)
def test_laws_of_a_sampler(prior, modality, sampler, tmp_path, monkeypatch):
    """Chunks do not matter, rows are counted, a resumed run has the same bits; also from pure noise."""
    once = {"panorama": "multidiffusion", "generated": "per_view", "clips": "multidiffusion"}.get(modality)
    once = once == sampler and modality in FAMILIES.get(prior, MODALITIES)
    turn = modality in SAMPLER_TURNS.get(sampler, MODALITIES)
    of_clips = (modality in OF_CLIPS, sampler == "downscaled")
    exact = prior in EXACT and priors(prior).clips == of_clips[0] and of_clips != (True, True)
    if not fits(SAMPLERS[sampler], modality) or not turn or not (exact or (prior not in EXACT and once)):
        pytest.skip("needs a source, or another kind of view, or has its turn elsewhere")
    scored = priors(prior)

    def sampling():
        return SamplingModule(scored, particles(modality, scored), SAMPLERS[sampler], seed=1)

    rows, chunk = counted(scored, monkeypatch), scored.row_chunk
    half, (whole, resumed, chunked) = tmp_path / "half.ckpt", (sampling() for _ in range(3))
    fit(whole, 3, None, SaveAt(2, half))
    assert sum(rows) == whole.rows > 0
    assert torch.isfinite(state(whole)).all()
    fit(resumed, 3, half)
    assert torch.equal(state(resumed), state(whole))
    monkeypatch.setattr(scored, "row_chunk", 2)
    fit(chunked, 3)
    monkeypatch.setattr(scored, "row_chunk", chunk)
    torch.testing.assert_close(state(chunked), state(whole), rtol=1e-8, atol=1e-8)


# One device


class Elsewhere:
    """A run's module on torch's device `meta`, where no operation may meet a tensor of another one."""

    def __init__(self, what: ParticleModule, monkeypatch):
        what.begin()
        what.to("meta")
        what.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        passed = torch.ones((), dtype=torch.bool, device="meta")
        monkeypatch.setattr(what, "_require_finite", lambda *_: passed)
        monkeypatch.setattr(what, "log_dict", lambda *_: None)
        monkeypatch.setattr(what, "optimizers", lambda: SimpleNamespace(step=lambda: None))
        self.module = what

    def step(self) -> None:
        loss = self.module.training_step(None, 0)
        if loss is not None:
            assert loss.device.type == "meta"
            loss.backward()
        assert all(p.device.type == "meta" for p in self.module.parameters())
        assert all(image.device.type == "meta" for image in self.module.images())


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("modality", [m for m in MODALITIES if m not in ("field", *SCENES)])
def test_a_step_holds_its_tensors_to_one_device(modality, residual, monkeypatch):
    if not fits(RESIDUALS[residual](), modality) or (residual in TURNS and modality != "video"):
        pytest.skip("a residual that needs a source, or one that has its turn elsewhere")
    what = module(exact_for(modality), residual, "none", modality)
    Elsewhere(what, monkeypatch).step()
    chosen = what.particles.choose(Draw(3, 0))
    assert what.particles.touched(chosen).device.type == "meta"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("modality", [m for m in MODALITIES if m not in ("field", *SCENES)])
def test_a_sampler_holds_its_tensors_to_one_device(modality, sampler, monkeypatch):
    turn = modality in SAMPLER_TURNS.get(sampler, MODALITIES)
    single = modality in OF_CLIPS and sampler == "downscaled"
    if not fits(SAMPLERS[sampler], modality) or not turn or single:
        pytest.skip("a sampler that needs a source, or single pictures, or has its turn elsewhere")
    scored = priors(exact_for(modality))
    what = SamplingModule(scored, particles(modality, scored), SAMPLERS[sampler])
    Elsewhere(what, monkeypatch).step()
