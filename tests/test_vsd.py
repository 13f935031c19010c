"""What learns beside the particles: a Gaussian of an analytic prior, a LoRA of tiny pipelines."""

from functools import partial

import pytest
import torch
from diffusers_folder import save_3, save_flux, save_pipeline, save_xl

import csd_exp
from csd_exp import methods
from csd_exp.config import composed
from csd_exp.errors import InputError
from csd_exp.methods import Views
from csd_exp.particles import Images
from csd_exp.parts import check_parts
from csd_exp.priors import (
    FluxKontext,
    GaussianMixture,
    InstructPix2Pix,
    StableDiffusion,
    StableDiffusionXL,
    UltraEdit,
    network,
)
from csd_exp.priors.base import Query, predict
from csd_exp.schedules import Draw, Level, Timesteps
from csd_exp.svgd import RBF, NoKernel

FAMILIES = {
    "instruct_pix2pix": (InstructPix2Pix, save_pipeline, True),
    "sdxl": (StableDiffusionXL, save_xl, False),
    "ultraedit": (UltraEdit, partial(save_3, t5=False), True),
    "kontext": (FluxKontext, save_flux, True),
}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A tiny pipeline of each family in float64, made once."""
    pytest.importorskip("peft")
    made = {}

    def prior(family):
        if family not in made:
            cls, save, editing = FAMILIES[family]
            made[family] = cls(save(tmp_path_factory.mktemp(family) / "it", editing), dtype="float64")
        return made[family]

    return prior


def test_particles_take_the_spread_of_their_prior(write_image, build, fit):
    """Each pixel is a sample of N(mean, 0.5^2): SDS descends all to the mean, VSD keeps them apart."""
    prior = GaussianMixture(means=((0.3, -0.2, 0.1),), std=0.5)
    ends = {}
    for name, residual in {"sds": methods.sds, "vsd": methods.VSD(lr=0.1)}.items():
        particles = Images([write_image(16, 16, seed) for seed in range(2)], 1, 1, dtype="float64")
        particles.condition = lambda ids: [None] * len(ids)
        module = build(
            prior,
            particles,
            residual=residual,
            kernel=NoKernel(),
            weight="one",
            timestep=Timesteps(t_min=300, t_max=300),
            optimizer=lambda groups: torch.optim.Adam(groups, lr=0.04),
            lr=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + 0.02 * step)),
        )
        fit(module, 150)
        ends[name] = particles.latent.detach().transpose(0, 1).flatten(1)
        mean = prior.means.flatten()
        torch.testing.assert_close(ends[name].mean(1), mean, rtol=0, atol=0.06)
    assert ends["sds"].std(1).max() < 0.15
    torch.testing.assert_close(ends["vsd"].std(1), torch.full((3,), 0.5).double(), rtol=0, atol=0.05)
    learned = module.residual.learner
    torch.testing.assert_close(learned.log_std.exp().flatten(), ends["vsd"].std(1), rtol=0, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_begins_as_the_prior_without_guidance(prior, family):
    pretrained = prior(family)
    pretrained.__dict__.pop("fingerprint", None)
    before = pretrained.fingerprint
    learner = pretrained.learner(2, Draw(5, 0))
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, pretrained.views.channels, 8, 8, generator=generator, dtype=torch.float64)
    condition = pretrained.condition(
        torch.rand(1, 3, 8 * pretrained.views.factor, 8 * pretrained.views.factor)
    )
    guidance = [pretrained.guidance("x", None if condition is None else condition[0].double())] * 2
    # The first conditioning has all that any other has.
    assert set(guidance[0][0][1]) == {name for _, cond in guidance[0] for name in cond}
    views = Views(x, noise, Level.at(300, pretrained.alphas_cumprod), guidance, [], None, torch.arange(2))
    vsd = methods.VSD()
    vsd.learner = learner
    score = lambda asked, network=None: predict(network or pretrained, asked)  # noqa: E731
    x_t, r = vsd(score, views)
    alone = [Query(x_t, 300, [[(1.0, one[0][1])] for one in guidance])]
    guided, unguided = predict(pretrained, [Query(x_t, 300, guidance), *alone])
    torch.testing.assert_close(r, guided - unguided, rtol=1e-9, atol=1e-10)

    # Its gradient, by finite differences where it is no longer what it was.
    with torch.no_grad():
        for i, p in enumerate(learner.parameters()):
            p += 0.1 * Draw(1, 0).normal("away", i, tuple(p.shape)).double()
    vsd(score, views)
    vsd.loss(score, views).sum().backward()
    along = [
        Draw(2, 0).normal("along", i, tuple(p.shape)).double() for i, p in enumerate(learner.parameters())
    ]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(learner.parameters(), along, strict=True))
    losses = []
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(learner.parameters(), along, strict=True):
                p += h * d
        vsd(score, views)
        losses.append(float(vsd.loss(score, views).sum().detach()))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3, abs=1e-7)
    assert not any(p.grad is None for p in learner.parameters())

    # Nothing of the prior has changed, and what it has is not held twice.
    pretrained.__dict__.pop("fingerprint", None)
    assert pretrained.fingerprint == before
    denoiser = getattr(pretrained, pretrained.denoiser)
    assert len(learner.state_dict()) == len(list(learner.parameters()))
    own = {id(p) for p in getattr(learner.scored, pretrained.denoiser).parameters()}
    assert {id(p) for p in denoiser.parameters()} < own
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_a_lora_of_half_precision_learns_in_float32(tmp_path):
    pytest.importorskip("peft")
    half = StableDiffusion(save_pipeline(tmp_path / "half", False), dtype="bfloat16")
    learner = half.learner(2, Draw(0, 0))
    assert {p.dtype for p in learner.parameters()} == {torch.float32}
    (eps,) = predict(learner, [Query(torch.zeros(1, 4, 8, 8), 300, [[(1.0, half.embedding("x"))]])])
    eps.sum().backward()
    assert eps.dtype == torch.float32


def test_a_run_with_a_lora_goes_on_with_the_same_bits(prior, build, fit, write_image, tmp_path):
    pretrained = prior("instruct_pix2pix")
    shape = pretrained.views.factor, pretrained.views.multiple

    def module():
        pictures = [write_image(32, 32, seed) for seed in range(2)]
        particles = Images(pictures, *shape, prompt="x", dtype="float64")
        residual = methods.VSD(rank=2, lr=0.01)
        kernel = RBF(normalize="rms")
        return build(pretrained, particles, residual=residual, kernel=kernel, optimizer=torch.optim.Adam)

    whole, half, resumed = (module() for _ in range(3))
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, 3)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 3, ckpt_path=tmp_path / "half.ckpt")
    state, before = resumed.state_dict(), whole.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)
    learned = [name for name in state if name.startswith("residual.learner.added.")]
    assert len(learned) == len(state) - 1
    assert sum(not torch.equal(state[name], start[name]) for name in learned) > len(learned) // 2
    assert whole.rows == 3 * 2 * (3 + 1)


def test_without_peft_it_is_said_what_brings_it(monkeypatch, write_image):
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    picture = f"modality.path={write_image(32, 32)}"
    with pytest.raises(
        InputError, match=r"method=vsd trains a LoRA .* by peft, .*pip install 'csd_exp\[lora\]'\.$"
    ):
        check_parts(composed(["experiment=panorama", "method=vsd", picture, "prompt=x"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["prior.offload=true"], r"prior\.offload=True does not go with method=vsd, .* must be false\.$"),
        (["prior.device=cpu"], r"prior\.device=cpu does not go with method=vsd, .* must be null\.$"),
    ],
)
def test_what_a_lora_cannot_be_trained_with_is_refused(changes, said, monkeypatch, write_image):
    monkeypatch.setattr(network, "find_spec", lambda name: True)
    picture = f"modality.path={write_image(32, 32)}"
    with pytest.raises(InputError, match=said):
        check_parts(composed(["experiment=panorama", "method=vsd", picture, "prompt=x", *changes]))


def test_the_method_by_its_name(write_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("experiment=panorama", "prior=analytic", "prior.window=8", "logger=csv", "method=vsd", "steps=3")
    made = csd_exp.edit(*given, "kernel=rbf", prompt="x", **{"modality.path": write_image(11, 18)})
    assert "step/residual_loss" in (made.run_dir / "metrics.csv").read_text().splitlines()[0]
