"""A modality without latents, and a residual that learns: what the contracts are open for."""

import pytest
import torch
from diffusers_folder import save_pipeline
from toys import Learned, Waves

from csd_exp import methods
from csd_exp.priors import GaussianMixture, StableDiffusion
from csd_exp.priors.base import Query
from csd_exp.schedules import Draw, Level, Timesteps
from csd_exp.svgd import RBF, NoKernel

TEXTS = {"": [1.0, 1.0], "red": [0.2, 3.0]}


class Pooled(GaussianMixture):
    """Latents are a nonlinear function of 2 x 2 patches."""

    def __init__(self):
        super().__init__(prompts=TEXTS, std=0.4, image_std=0.7, guidance_scale=3.0)

    def encode(self, image, noise=None):
        return torch.nn.functional.avg_pool2d(2 * image - 1, 2).tanh()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> StableDiffusion:
    """A real autoencoder and UNet, tiny and random, in float64."""
    folder = save_pipeline(tmp_path_factory.mktemp("prior") / "pipeline", editing=False)
    return StableDiffusion(str(folder), guidance_scale=3.0, dtype="float64")


@pytest.mark.parametrize("kernel", [NoKernel(), RBF(normalize="n")], ids=["none", "rbf"])
def test_the_coupled_update_goes_through_autoencoder_and_renderer(autoencoder, build, fit, kernel):
    """The gradient against finite differences of <encode(render(parameters)), what each view descends>."""
    field = Waves(side=32)
    module = build(autoencoder, field, kernel=kernel, residual=methods.sds)
    started = field.amplitudes.detach().clone()
    updates = []

    def residual(score, views):
        x_t, r = methods.sds(score, views)
        updates.append((views.x, x_t, r))
        return x_t, r

    module.residual = residual
    fit(module, 1)
    ((x, x_t, r),) = updates
    k, repulsion = kernel(x_t.flatten(1))
    coupled = r.flatten(1) if isinstance(kernel, NoKernel) else (k @ r.flatten(1) + repulsion) / 3
    level = Level.at(module.timestep(Draw(0, 0)), autoencoder.alphas_cumprod)
    g = level.sigma**2 * coupled.view_as(x)

    def surrogate(amplitudes):
        return float((autoencoder.encode(field.rendered(torch.arange(3), amplitudes)) * g).sum())

    gradient = field.amplitudes.grad
    assert gradient.abs().min() > 1e-6
    for k in range(4):
        for channel in range(3):
            nudge = torch.zeros_like(started)
            nudge[k, channel] = 1e-5
            slope = (surrogate(started + nudge) - surrogate(started - nudge)) / 2e-5
            assert float(gradient[k, channel]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def field_module(build, **changes):
    settings = {"batch": 2, "regular": 0.01} | {k: changes.pop(k) for k in ("dtype",) if k in changes}
    defaults = {"kernel": RBF(normalize="rms"), "optimizer": lambda p: torch.optim.Adam(p, lr=0.02)}
    return build(Pooled(), Waves(**settings), **defaults | changes)


@pytest.mark.parametrize("residual", [methods.dds, Learned], ids=["dds", "learned"])
def test_a_field_is_resumed_to_the_same_bits(build, fit, tmp_path, residual):
    def module():
        return field_module(build, residual=residual() if residual is Learned else residual)

    whole, half, resumed = module(), module(), module()
    fit(whole, 8)
    fit(half, 4).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 8, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.particles.amplitudes, whole.particles.amplitudes)
    assert not torch.equal(half.particles.amplitudes, whole.particles.amplitudes)
    assert (whole.particles.steps, resumed.particles.steps) == (8, 4)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    learned = ["residual.mean"] if residual is Learned else []
    assert list(state) == ["particles.amplitudes", *learned]
    if residual is Learned:
        assert torch.equal(resumed.residual.mean, whole.residual.mean)
        assert whole.residual.mean.abs().min() > 0


def test_a_field_comes_to_what_the_prior_likes(build, fit):
    """Flat fields under a mixture of two colours: SDS takes all views to the colour of the prompt."""
    field = Waves(count=2, side=4)
    prior = GaussianMixture([[-0.5, -0.5, -0.5], [0.6, 0.6, 0.6]], std=0.1, prompts={"red": [0.0, 1.0]})
    module = build(
        prior,
        field,
        residual=methods.sds,
        kernel=NoKernel(),
        weight="one",
        timestep=Timesteps(t_min=300, t_max=700),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )
    fit(module, 300)
    colours = torch.stack([2 * image.mean((1, 2)) - 1 for image in module.images()])
    torch.testing.assert_close(colours, torch.full((2, 3), 0.6, dtype=colours.dtype), atol=0.1, rtol=0)


def test_regularisers_and_learned_losses_are_added_to_the_step(build, fit):
    """Against the gradients written out, one step of plain descent."""
    seen = []

    class Watched(Learned):
        def forward(self, score, views):
            x_t, r = super().forward(score, views)
            seen.append(self.sds)
            return x_t, r

    module = field_module(
        build, residual=Watched(), kernel=NoKernel(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    plain = field_module(
        build, residual=methods.sds, kernel=NoKernel(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    plain.particles.regular = 0.0
    start = module.particles.amplitudes.detach().clone()
    trainer = fit(module, 1)
    fit(plain, 1)
    regular = 2 * 0.01 * start
    torch.testing.assert_close(module.particles.amplitudes.grad, plain.particles.amplitudes.grad + regular)
    expected = (2 * (0 - seen[0].mean((2, 3)))).mean(0)
    torch.testing.assert_close(module.residual.mean.grad, expected)
    torch.testing.assert_close(module.residual.mean.detach(), -0.05 * expected)  # a rate of its own
    logged = trainer.logged_metrics
    torch.testing.assert_close(
        logged["step/particle_loss"].double(), 0.01 * start.square().sum(), rtol=1e-6, atol=0
    )
    each = seen[0].mean((2, 3)).square().sum(1)
    torch.testing.assert_close(logged["step/residual_loss"].double(), each.mean(), rtol=1e-6, atol=0)


def test_a_residual_may_score_under_other_texts_at_other_levels(build, fit):
    """What inversion and unconditional baselines need, each row counted."""

    def residual(score, views):
        x_t, r = methods.sds(score, views)
        lower = Level.at(views.level.t // 2, views.level.alphas_cumprod)
        null = score.guidance("")
        (eps,) = score([Query(lower.noised(views.x, views.noise), lower.t, null)])
        return x_t, r - 0.5 * eps

    module = field_module(build, residual=residual)
    fit(module, 2)
    assert module.rows == 2 * 2 * (2 + 1)
