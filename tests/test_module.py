"""The one step in Lightning: bits, resume, checkpoints, kernel spaces, and what it refuses."""

import itertools
import random
from math import log

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from csd_exp import methods
from csd_exp.devices import Late
from csd_exp.errors import InputError
from csd_exp.images import read_image
from csd_exp.loggers import Csv
from csd_exp.module import CSDModule
from csd_exp.particles import Images, Panorama
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.schedules import Draw, Level, Timesteps
from csd_exp.svgd import IMQ, RBF, NoKernel

TEXTS = {"": [1.0, 1.0], "red": [0.2, 3.0]}


class Network(GaussianMixture):
    """The analytic prior beside a small convolution, whose rounding depends on the batch it is given."""

    def __init__(self, **settings):
        scales = {"guidance_scale": 7.5, "image_guidance_scale": 5.0}
        super().__init__(prompts=TEXTS, std=0.4, image_std=0.7, **scales | settings)
        generator = torch.Generator().manual_seed(0)
        self.weight = 0.05 * torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64)

    def eps(self, x_t, t, conds):
        blurred = torch.nn.functional.conv2d(x_t, self.weight.to(x_t), padding=1)
        return super().eps(x_t, t, conds) + blurred


def panorama(write_image, **settings) -> Panorama:
    defaults = {"window": 6, "stride": 3, "prompt": "red"}
    return Panorama(write_image(9, 24), 1, **defaults | settings)


def frames(write_image, n: int = 4, dtype: str = "float64", **settings) -> Images:
    return Images([write_image(4, 5, seed) for seed in range(n)], 1, 1, prompt="red", dtype=dtype, **settings)


@pytest.fixture
def run(build, fit):
    """Fit, and return where the particles came to."""

    def run(prior, particles, steps: int = 4, **changes) -> torch.Tensor:
        module = build(prior, particles, **changes)
        fit(module, steps)
        return module.particles.latent.detach().clone()

    return run


# Bits


@pytest.mark.parametrize("settings", [{}, {"batch": 3, "jitter": True}, {"wrap": True, "batch": 5}])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(write_image, run, settings):
    one, same, other = (run(Network(), panorama(write_image, **settings), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("row_chunk", [1, 7])
def test_the_row_chunk_changes_nothing(write_image, run, row_chunk):
    whole = run(Network(row_chunk=1000), panorama(write_image))
    chunked = run(Network(row_chunk=row_chunk), panorama(write_image))
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_windows_changes_nothing(write_image, run):
    class Backwards(Panorama):
        def choose(self, draw):
            return super().choose(draw).flip(0)

    forwards = run(Network(), panorama(write_image))
    backwards = run(Network(), Backwards(write_image(9, 24), 1, window=6, stride=3, prompt="red"))
    torch.testing.assert_close(backwards, forwards, rtol=1e-6, atol=1e-6)


def test_a_fit_neither_reads_nor_moves_global_generators(write_image, run):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    one = run(Network(), panorama(write_image, batch=3, jitter=True))
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(run(Network(), panorama(write_image, batch=3, jitter=True)), one)


def test_draws_follow_the_step_not_the_place_in_an_epoch(write_image, build, fit):
    one, epochs = (build(Network(), panorama(write_image, batch=3)) for _ in range(2))
    fit(one, 5)
    fit(epochs, 5, loader=range(2))
    assert torch.equal(one.particles.latent, epochs.particles.latent)


# Resume


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=2.0), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), None),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumed_half_way_has_the_bits_of_one_that_was_not(write_image, build, fit, tmp_path, name):
    def start():
        optimizer, lr = OPTIMIZERS[name]
        timestep = Timesteps(t_min=20, t_max=500, anneal="linear", steps=10)
        return build(
            Network(),
            panorama(write_image, batch=4, jitter=True),
            optimizer=optimizer,
            lr=lr,
            timestep=timestep,
        )

    loader = DataLoader(range(10), batch_size=None)
    whole = start()
    fit(whole, 10, loader)
    half = start()
    save = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, every_n_train_steps=5)
    fit(half, 5, loader, callbacks=[save], enable_checkpointing=True)
    resumed = start()
    trainer = fit(resumed, 10, loader, ckpt_path=save.last_model_path)
    assert trainer.global_step == 10
    assert torch.equal(resumed.particles.latent, whole.particles.latent)
    assert not torch.equal(half.particles.latent, whole.particles.latent)
    assert resumed.rows == whole.rows > half.rows


@pytest.fixture
def checkpoint(write_image, build, fit, tmp_path):
    class Features(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    module = build(Network(), frames(write_image, dtype="float32"), features=Features(60, 7))
    fit(module, 2).save_checkpoint(tmp_path / "some.ckpt")
    return tmp_path / "some.ckpt"


def test_a_checkpoint_holds_particles_optimizer_and_step_alone(checkpoint):
    loaded = torch.load(checkpoint, weights_only=True)
    assert list(loaded["state_dict"]) == ["particles.latent"]
    assert loaded["global_step"] == 2
    assert loaded["csd_exp"] == {"prior": Network().fingerprint, "rows": 40}
    assert checkpoint.stat().st_size < 20_000


def test_a_checkpoint_of_another_prior_or_program_is_refused(checkpoint, write_image, build, fit, tmp_path):
    other = build(Network(means=[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), frames(write_image, dtype="float32"))
    with pytest.raises(InputError, match="ckpt_path was made with another prior"):
        fit(other, 4, ckpt_path=checkpoint)
    foreign = torch.load(checkpoint, weights_only=True)
    del foreign["csd_exp"]
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="ckpt_path is no checkpoint of csd_exp"):
        fit(build(Network(), frames(write_image, dtype="float32")), 4, ckpt_path=tmp_path / "foreign.ckpt")


# One step


def recorded(build, fit, particles, steps: int = 1, **changes):
    """What the residual was given and gave in each step."""
    seen = []

    def residual(score, views):
        x_t, r = methods.dds(score, views)
        seen.append({"x": views.x, "noise": views.noise, "level": views.level, "x_t": x_t, "r": r})
        return x_t, r

    module = build(Network(), particles, residual=residual, **changes)
    trainer = fit(module, steps)
    return module, trainer, seen


def test_noise_is_keyed_by_the_view_and_one_timestep_serves_all(write_image, build, fit):
    module, _, seen = recorded(build, fit, panorama(write_image, batch=3), steps=5, seed=2)
    for step, one in enumerate(seen):
        ids = module.particles.choose(Draw(2, step)).tolist()
        expected = [Draw(2, step).normal("noise", i, (3, 6, 6)) for i in ids]
        assert torch.equal(one["noise"], torch.stack(expected))
        assert one["level"].t == module.timestep(Draw(2, step))
        x_t = one["level"].alpha * one["x"] + one["level"].sigma * one["noise"]
        assert torch.equal(one["x_t"], x_t)
    assert len({one["level"].t for one in seen}) > 1


def test_shared_noise_is_one_for_all_views_and_new_each_step(write_image, build, fit):
    _, _, seen = recorded(build, fit, panorama(write_image), steps=2, noise="shared")
    for one in seen:
        assert (one["noise"] == one["noise"][:1]).all()
    assert not torch.equal(seen[0]["noise"], seen[1]["noise"])
    _, _, independent = recorded(build, fit, panorama(write_image), noise="independent")
    noise = independent[0]["noise"].flatten(1)
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.6


def test_the_logged_scalars_are_what_they_say(write_image, build, fit):
    _, trainer, seen = recorded(build, fit, frames(write_image), kernel=RBF(bandwidth=0.01), steps=2)
    x_t, r = seen[1]["x_t"].flatten(1), seen[1]["r"].flatten(1)
    k = torch.exp(-0.01 * (x_t[:, None] - x_t).square().sum(-1))
    p = k / k.sum(1, keepdim=True)
    expected = {
        "step/timestep": seen[1]["level"].t,
        "step/residual_norm": sum(float(row.square().sum()) ** 0.5 for row in r) / 4,
        "step/kernel_mean": float(k.mean()),
        "step/kernel_entropy": float(-(p * p.log()).sum(1).mean()),
        "step/repulsion_norm": float(RBF(bandwidth=0.01)(x_t)[1].norm(dim=1).mean()),
        "step/rows": 2 * 4 * 5,
    }
    assert expected["step/kernel_entropy"] < log(4)
    assert {key: float(value) for key, value in trainer.logged_metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("normalize", ["n", "rowsum", "none", "rms"])
@pytest.mark.parametrize("residual", [methods.sds, methods.dds])
def test_one_image_moves_as_without_a_kernel(write_image, run, residual, normalize):
    one, alone = (
        run(Network(), frames(write_image, 1), residual=residual, kernel=kernel)
        for kernel in (RBF(normalize=normalize), NoKernel())
    )
    assert torch.equal(one, alone)


def test_without_a_kernel_no_matrix_is_multiplied(write_image, run):
    """Where TF32 is on, a product with the identity is not the identity."""

    class Inexact(NoKernel):
        def __call__(self, phi):
            k, repulsion = super().__call__(phi)
            return k * (1 + 1e-3), repulsion

    exact, inexact = (run(Network(), frames(write_image), kernel=k) for k in (NoKernel(), Inexact()))
    assert torch.equal(exact, inexact)


STATEFUL = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "decay": lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


class Recorded(L.Callback):
    """The latents and the optimizer's state after each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        latent = module.particles.latent
        state = trainer.optimizers[0].state[latent]
        kept = {
            name: v.clone() for name, v in state.items() if torch.is_tensor(v) and v.shape == latent.shape
        }
        self.steps.append({"latent": latent.detach().clone()} | kept)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_is_in_no_chosen_view_stays_and_so_do_its_moments(write_image, build, fit, name):
    module = build(Network(), frames(write_image, 5, batch=2), optimizer=STATEFUL[name])
    record = Recorded()
    fit(module, 6, callbacks=[record])
    seen: set[int] = set()
    for step, (before, after) in enumerate(itertools.pairwise(record.steps), 1):
        chosen = set(module.particles.choose(Draw(0, step)).tolist())
        for kept, value in after.items():
            still = [i for i in range(5) if torch.equal(value[i], before[kept][i])]
            assert set(still) == set(range(5)) - chosen, (kept, step)
        seen |= chosen
    assert seen == set(range(5))


def test_windows_that_are_not_chosen_stay_but_where_chosen_ones_overlap_them(write_image, build, fit):
    module = build(Network(), panorama(write_image, batch=2), optimizer=STATEFUL["adam"])
    record = Recorded()
    fit(module, 5, callbacks=[record])
    for step, (before, after) in enumerate(itertools.pairwise(record.steps), 1):
        inside = torch.zeros(module.particles.grid, dtype=torch.bool)
        for top, left in module.particles.corners(module.particles.choose(Draw(0, step))):
            inside[top : top + 6, left : left + 6] = True
        for kept, value in after.items():
            moved = (value != before[kept])[0]
            assert not moved[:, ~inside].any()
            assert moved[:, inside].any(0).all()


def test_a_full_batch_moves_as_the_optimizer_says(write_image, build, fit):
    module = build(Network(), frames(write_image), optimizer=STATEFUL["adamw"])
    start = module.particles.latent.detach().clone()
    fit(module, 1)
    plain = torch.nn.Parameter(start.clone())
    plain.grad = module.particles.latent.grad
    STATEFUL["adamw"]([plain]).step()
    assert torch.equal(module.particles.latent, plain)


def test_accumulated_batches_are_draws_of_their_own_and_their_mean_is_the_step(write_image, build, fit):
    seen = []

    def residual(score, views):
        seen.append((views.ids.tolist(), views.noise))
        return methods.dds(score, views)

    module = build(Network(), frames(write_image, 4, batch=2), residual=residual, kernel=NoKernel())
    start = module.particles.latent.detach().clone()
    fit(module, 2, accumulate_grad_batches=3)
    assert len(seen) == 6
    assert len({tuple(noise.flatten().tolist()) for _, noise in seen}) == 6
    assert [ids for ids, _ in seen[:3]] == [module.particles.choose(Draw(0, 0, p)).tolist() for p in range(3)]
    assert [ids for ids, _ in seen[3:]] == [module.particles.choose(Draw(0, 1, p)).tolist() for p in range(3)]
    steps = []
    for part in range(3):
        one = build(Network(), frames(write_image, 4, batch=2), kernel=NoKernel())
        one._chosen = [torch.tensor([0])] * part  # as if so many had gone before
        fit(one, 1)
        steps.append(one.particles.latent.detach() - start)
    once = build(Network(), frames(write_image, 4, batch=2), kernel=NoKernel())
    fit(once, 1, accumulate_grad_batches=3)
    torch.testing.assert_close(once.particles.latent.detach() - start, sum(steps) / 3)


def test_nothing_moves_where_source_and_target_ask_the_same(write_image, run):
    particles = frames(write_image)
    particles.prompt = ""
    moved = run(Network(), particles, kernel=RBF(repulsion="off"))
    assert torch.equal(moved, particles.source_latent)


@pytest.mark.parametrize("residual", [methods.sds, methods.dds])
def test_the_share_of_a_view_without_a_prompt_asks_for_nothing(write_image, build, fit, residual):
    class Shared(Images):
        def prompts(self, ids):
            return [[[(0.25, "red"), (0.75, None)], [(1.0, None)], [(1.0, "red")]][i] for i in ids]

    class Whole(Images):
        def prompts(self, ids):
            return [[(1.0, "red")]] * len(ids)

    steps, rows = [], []
    for kind in (Shared, Whole):
        particles = kind([write_image(4, 5, seed) for seed in range(3)], 1, 1, dtype="float64")
        module = build(Network(), particles, residual=residual, kernel=NoKernel(normalize="none"))
        fit(module, 1)
        steps.append(module.particles.latent.detach() - module.particles.source_latent)
        rows.append(module.rows)
    shared, whole = steps
    torch.testing.assert_close(shared[0], 0.25 * whole[0], rtol=1e-12, atol=1e-12)
    assert (shared[1] == 0).all()
    assert torch.equal(shared[2], whole[2])
    assert 3 * rows[0] == 2 * rows[1]  # the view without a prompt costs none


def test_untouched_particles_come_out_with_the_pixels_that_went_in(write_image, build):
    module = build(Network(), panorama(write_image, wrap=True))
    (image,) = module.images()
    torch.testing.assert_close(image, read_image(write_image(9, 24)), atol=1e-6, rtol=0)
    module.particles.latent.data *= 100
    (image,) = module.images()
    assert image.shape == (3, 9, 24)
    assert (float(image.min()), float(image.max())) == (0, 1)


def test_the_encoders_posterior_is_sampled_by_the_seed(write_image, build):
    class Sampled(GaussianMixture):
        def encode(self, image, noise=None):
            return super().encode(image) + (0 if noise is None else 0.1 * noise)

    one, same, other = (
        build(Sampled(), frames(write_image), seed=seed).particles.latent for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    expected = torch.stack([Draw(1, 0).normal("encode", i, (3, 4, 5)) for i in range(4)])
    pixels = frames(write_image).pixels
    torch.testing.assert_close(one, (2 * pixels - 1 + 0.1 * expected).double())
    assert not torch.equal(one, other)


# What the kernel sees


def features(images: torch.Tensor) -> torch.Tensor:
    """Three nonlinear features of each image."""
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype)
    flat = images.flatten(1)
    return torch.stack([(flat**2) @ weights, flat.sin().sum(1), (flat @ weights).cos()], 1)


@pytest.mark.parametrize("kind", [RBF, IMQ])
@pytest.mark.parametrize("space", ["x_t", "x_0", "features"])
def test_repulsion_is_the_gradient_of_the_kernel_sum_in_the_view(write_image, build, fit, space, kind):
    """The update of zero residuals against finite differences of sum_j k(phi(x_i), phi_j)."""
    kernel = kind(space=space, bandwidth=0.05, normalize="none")

    def silent(score, views):
        return views.level.noised(views.x, views.noise), torch.zeros_like(views.x)

    module = build(
        Network(), frames(write_image, 3), residual=silent, kernel=kernel, weight="one", features=features
    )
    module.particles.latent.data *= 0.8  # away from the ends of [0, 1], where decoded views are clamped
    start = module.particles.latent.detach().clone()
    level = Level.at(module.timestep(Draw(0, 0)), module.prior.alphas_cumprod)
    noise = torch.stack([Draw(0, 0).normal("noise", i, (3, 4, 5)) for i in range(3)]).double()

    def phi(x):
        if space == "x_t":
            # The chain rule's alpha_t is absorbed in w(t): differentiate in x_t itself.
            return (x + level.alpha * start - start + level.sigma * noise).flatten(1)
        return x.flatten(1) if space == "x_0" else features((x + 1) / 2)

    def kernel_sum(x, i):
        others = phi(start)
        u = 0.05 * (phi(x)[i] - others).square().sum(1)
        values = torch.exp(-u) if kind is RBF else (1 + u) ** -0.5
        return values.sum() - values[i]

    fit(module, 1)
    for i, channel, row, column in [(0, 0, 0, 0), (1, 2, 3, 4), (2, 1, 2, 0), (0, 2, 1, 3)]:
        nudge = torch.zeros_like(start)
        nudge[i, channel, row, column] = 1e-5
        slope = (kernel_sum(start + nudge, i) - kernel_sum(start - nudge, i)) / 2e-5
        gradient = module.particles.latent.grad[i, channel, row, column]
        assert abs(float(slope)) > 1e-6
        assert float(gradient) == pytest.approx(float(slope), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("space", ["x_t", "x_0", "features"])
def test_stein_scales_repulsion_by_sigma_and_off_removes_it(write_image, build, fit, space):
    def gradient(**settings):
        kernel = RBF(space=space, bandwidth=0.05, normalize="none", **settings)
        module = build(Network(), frames(write_image, 3), kernel=kernel, weight="one", features=features)
        module.particles.latent.data *= 0.8
        fit(module, 1)
        return module.particles.latent.grad, module

    official, module = gradient()
    stein, _ = gradient(repulsion_scale="stein")
    off, _ = gradient(repulsion="off")
    sigma = Level.at(module.timestep(Draw(0, 0)), module.prior.alphas_cumprod).sigma
    assert (official - off).norm() > 1e-4
    torch.testing.assert_close(stein - off, sigma * (official - off))


def test_the_kernel_couples_by_what_it_sees(write_image, build, fit):
    """With two frames alike but their noise, a kernel on x_0 couples them fully, one on x_t does not."""
    path = write_image(4, 5)
    couplings = {}

    class Seen(RBF):
        def __call__(self, phi):
            k, repulsion = super().__call__(phi)
            couplings[self.space] = float(k[0, 1])
            return k, repulsion

    for space in ("x_t", "x_0"):
        particles = Images([path, path, write_image(4, 5, 1)], 1, 1, prompt="red", dtype="float64")
        fit(build(Network(), particles, kernel=Seen(space=space)), 1)
    assert couplings["x_0"] == 1
    assert couplings["x_t"] < 0.9


# Where the prior is


def test_the_prior_goes_where_the_trainer_is_before_anything_is_encoded(write_image, fit):
    """On every rank by its own device, whatever has started it: none is read from the environment."""
    events = []

    class Watched(Network):
        def to(self, device):
            events.append(device)
            super().to(device)

        def encode(self, image, noise=None):
            events.append("encode")
            return super().encode(image, noise)

    class Second(SingleDeviceStrategy):
        """A strategy whose device is the second of its kind, as of trainer.devices=[1]."""

        def __init__(self):
            super().__init__(device=torch.device("cpu", 1))

    module = CSDModule(
        Watched(),
        frames(write_image),
        methods.sds,
        NoKernel(),
        Timesteps(t_min=20, t_max=500),
        lambda p: torch.optim.SGD(p, lr=1.0),
    )
    assert events == []
    fit(module, 1, devices="auto", accelerator="auto", strategy=Second())
    assert events[0] == torch.device("cpu", 1) == module.prior.device
    assert events[1:] == ["encode"] * 8  # the source and its condition, of four pictures
    fit(module, 2, devices="auto", accelerator="auto", strategy=Second())
    assert len(events) == 9


# What is refused


def test_a_residual_that_is_not_finite_stops_the_run_and_names_the_place(
    write_image, build, fit, tmp_path, monkeypatch
):
    class Breaking(Network):
        calls = 0

        def eps(self, x_t, t, conds):
            self.calls += 1
            eps = super().eps(x_t, t, conds)
            eps[0, 0, 0, 0] = torch.nan if self.calls == 3 else eps[0, 0, 0, 0]
            return eps

    module = build(Breaking(), frames(write_image), timestep=Timesteps(t_min=321, t_max=321))
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    place = r"not finite at step 2, timestep 321; the last checkpoint is .*last\.ckpt"
    with pytest.raises(FloatingPointError, match=place):
        fit(module, 5, callbacks=[save], enable_checkpointing=True)
    assert torch.isfinite(module.particles.latent).all()
    module = build(Breaking(), frames(write_image), timestep=Timesteps(t_min=321, t_max=321))
    with pytest.raises(FloatingPointError, match="the last checkpoint is none yet"):
        fit(module, 5)
    # A GPU says it later: before the next step, or a checkpoint, and after the last step.
    monkeypatch.setattr(Late, "applies", staticmethod(lambda device: True))
    for steps, settings in (
        (5, {"callbacks": [save], "enable_checkpointing": True}),
        (5, {}),
        (3, {}),
    ):
        module = build(Breaking(), frames(write_image), timestep=Timesteps(t_min=321, t_max=321))
        with pytest.raises(FloatingPointError, match="not finite at step 2, timestep 321; the last"):
            fit(module, steps, **settings)
        assert torch.isfinite(module.particles.latent).all()
        assert module.prior.calls == 3
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 2


@pytest.mark.parametrize("every", [1, 2])
def test_what_a_gpu_logs_is_handed_on_later_and_the_same(
    write_image, build, fit, tmp_path, monkeypatch, every
):
    written = {}
    for late in (False, True):
        monkeypatch.setattr(Late, "applies", staticmethod(lambda device, late=late: late))
        module = build(Network(), frames(write_image))
        trainer = fit(module, 5, logger=Csv(tmp_path / str(late)), log_every_n_steps=every)
        written[late] = (tmp_path / str(late) / "metrics.csv").read_text()
        assert (trainer.logged_metrics == {}) is late  # by Lightning, which asks at once
        assert {"step/residual_norm", "step/rows"} <= trainer.callback_metrics.keys()
    assert written[True] == written[False]
    assert len(written[True].splitlines()) == 1 + 5 // every


class Questions(TorchDispatchMode):
    """Notes what is asked about numbers that would lie on a GPU: float32 ones, and truths about them."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        of, name = args[0] if args else None, function.overloadpacket.__name__
        numbers = isinstance(of, torch.Tensor) and of.dtype in (torch.float32, torch.bool)
        if numbers and name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"):
            self.asked.append(name)
        indices = args[1] if name == "index" else ()
        self.asked += ["mask" for i in indices if i is not None and i.dtype == torch.bool]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalize", ["n", "rms", "rowsum"])
@pytest.mark.parametrize("rule", ["median", "median_offdiagonal"])
def test_a_step_asks_about_one_number_which_a_gpu_answers_later(write_image, build, fit, normalize, rule):
    module = build(Network(), frames(write_image), kernel=RBF(normalize=normalize, bandwidth=rule))
    questions = Questions()
    step = module.training_step

    def asked(*batch):
        with questions:
            return step(*batch)

    module.training_step = asked
    fit(module, 3)
    assert questions.asked == ["_local_scalar_dense"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "common"}, "method.noise must be one of independent, shared, not 'common'"),
        (
            {"timestep": Timesteps(t_min=0, t_max=1000)},
            "schedule.timestep.t_max must be below the prior's 1000",
        ),
        ({"kernel": RBF(space="features")}, "kernel.space=features needs a feature extractor"),
        (
            {"weight": "one2"},
            "schedule.weight must be one of one, sigma2, sigma, snr, nsr, velocity, not 'one2'",
        ),
        ({"seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_step(write_image, build, changes, message):
    with pytest.raises(InputError, match=message):
        build(Network(), frames(write_image), **changes)


def test_an_optimizer_that_torch_refuses_is_named(write_image, build, fit):
    module = build(Network(), frames(write_image), optimizer=lambda p: torch.optim.SGD(p, lr=-1.0))
    with pytest.raises(InputError, match=r"optimizer is not accepted: Invalid learning rate: -1\.0"):
        fit(module, 1)


def test_the_last_timestep_of_the_prior_is_usable(write_image, run):
    assert torch.isfinite(run(Network(), frames(write_image), timestep=Timesteps(t_min=999, t_max=999))).all()
