"""The residuals, term by term."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from csd_exp import methods
from csd_exp.errors import InputError
from csd_exp.methods import Views
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.priors.base import Cond, predict, row_count
from csd_exp.schedules import Draw, Level, weight

MEANS = ((-0.6, -0.2, 0.3), (0.7, 0.3, -0.5))
TEXTS = {"": [1.0, 1.0], "red": [0.1, 2.0], "blue": [3.0, 0.2]}


@pytest.fixture
def case():
    prior = GaussianMixture(MEANS, prompts=TEXTS, guidance_scale=7.5, image_guidance_scale=1.5, image_std=0.5)
    x, start, noise = (Draw(0, 0).normal(name, 0, (2, 3, 4, 4)).double() for name in ("x", "start", "noise"))
    level = Level.at(300, prior.alphas_cumprod)

    def run(residual, target: str, source: str, at=None):
        conditions = list(start)
        guided = [prior.guidance(target, c) for c in conditions]
        baseline = [prior.guidance(source, c) for c in conditions]
        queries = []

        def record(asked, network=None):
            queries.append(asked)
            return predict(prior if network is None else network, asked)

        views = Views(x if at is None else at, noise, level, guided, baseline, start, torch.arange(2))
        if hasattr(residual, "begin"):
            residual.begin(prior, Draw(0, 0))
        x_t, r = residual(record, views)
        return x_t, r, queries

    def guided(x_t, t, prompt, scale=7.5):
        """Eq. 3 written out: three-way guidance of every view."""

        def eps(text, image):
            conds = [Cond(text=text, image=c if image else None) for c in start]
            return prior.eps(x_t, torch.tensor([t, t]), conds)

        words = torch.tensor(TEXTS[prompt], dtype=torch.float64)
        full, image, none = eps(words, True), eps(None, True), eps(None, False)
        return none + 1.5 * (image - none) + scale * (full - image)

    def estimate(clean, prompt, moved=0.0):
        bar = float(prior.alphas_cumprod[300])
        return guided(bar**0.5 * clean + (1 - bar) ** 0.5 * (noise + moved), 300, prompt)

    def inverted(timesteps, *how):
        """DDIM upwards in its two terms, all timesteps and noise levels of the table."""
        x_t = x
        for now, following in pairwise(timesteps):
            eps, (bar, after) = guided(x_t, now, *how), prior.alphas_cumprod[[now, following]]
            x_0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
            x_t = after.sqrt() * x_0 + (1 - after).sqrt() * eps
        return x_t

    return SimpleNamespace(
        **{"prior": prior, "x": x, "start": start, "noise": noise, "level": level, "run": run},
        **{"estimate": estimate, "guided": guided, "inverted": inverted},
    )


def test_sds_is_the_guided_estimate_minus_the_noise(case):
    x_t, r, queries = case.run(methods.sds, "red", "blue")
    torch.testing.assert_close(x_t, case.level.alpha * case.x + case.level.sigma * case.noise)
    torch.testing.assert_close(r, case.estimate(case.x, "red") - case.noise, rtol=1e-10, atol=1e-11)
    assert [len(asked) for asked in queries] == [1]


def test_dds_is_the_difference_of_target_and_source_under_the_same_noise(case):
    x_t, r, queries = case.run(methods.dds, "red", "blue")
    torch.testing.assert_close(x_t, case.level.alpha * case.x + case.level.sigma * case.noise)
    expected = case.estimate(case.x, "red") - case.estimate(case.start, "blue")
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-11)
    assert [len(asked) for asked in queries] == [2]  # one `predict` holds both branches


def test_an_empty_source_prompt_gives_the_image_conditional_baseline_of_eq_9(case):
    _, r, _ = case.run(methods.dds, "red", "")
    bar = case.level.alpha**2
    source_t = bar**0.5 * case.start + (1 - bar) ** 0.5 * case.noise
    prior = GaussianMixture(MEANS, prompts=TEXTS, image_std=0.5)
    t = torch.tensor([300, 300])
    image = prior.eps(source_t, t, [Cond(text=None, image=c) for c in case.start])
    none = prior.eps(source_t, t, [Cond(text=None, image=None)] * 2)
    expected = case.estimate(case.x, "red") - (none + 1.5 * (image - none))
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-11)


def test_dds_vanishes_where_nothing_is_to_change(case):
    _, r, _ = case.run(methods.dds, "red", "red", at=case.start)
    assert (r == 0).all()


@pytest.mark.parametrize(
    ("residual", "source", "rows"),
    [
        *(("sds", "", 3), ("dds", "", 5), ("pds", "", 5), ("classifier_sd", "", 2)),
        *(("classifier_sd", "blue", 2), ("delta_velocity", "", 5), ("ism", "", 3 * 2 + 3)),
        *(("ism", "blue", 3 * 3 + 3), ("sdi", "", 3 * 3 + 3), ("VSD", "", 3 + 1)),
    ],
)
def test_rows_of_a_view(case, residual, source, rows):
    """Of an editing prior; those that invert go up in 2 or 3 steps, and ISM needs one baseline more."""
    function = getattr(methods, residual)
    _, _, queries = case.run(function() if residual == "VSD" else function, "red", source)
    assert sum(row_count(asked) for asked in queries) == 2 * rows
    assert residual in ("ism", "sdi", "VSD") or len(queries) == 1


def test_classifier_sd_is_the_text_s_part_of_the_guided_estimate(case):
    x_t, r, _ = case.run(methods.classifier_sd, "red", "")
    torch.testing.assert_close(x_t, case.level.alpha * case.x + case.level.sigma * case.noise)
    t = torch.tensor([300, 300])
    words = torch.tensor(TEXTS["red"], dtype=torch.float64)
    both, image = (
        case.prior.eps(x_t, t, [Cond(text=text, image=c) for c in case.start]) for text in (words, None)
    )
    torch.testing.assert_close(r, 7.5 * (both - image), rtol=1e-10, atol=1e-11)


def test_classifier_sd_tells_the_prompt_apart_from_a_negative_one(case):
    _, r, _ = case.run(methods.classifier_sd, "red", "blue")
    expected = case.estimate(case.x, "red") - case.estimate(case.x, "blue")
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-11)


def test_classifier_sd_without_an_image_is_the_difference_of_classifier_free_guidance():
    prior = GaussianMixture(MEANS, prompts=TEXTS, guidance_scale=7.5)
    x, noise = (Draw(0, 0).normal(name, 0, (1, 3, 4, 4)).double() for name in ("x", "noise"))
    level = Level.at(300, prior.alphas_cumprod)
    views = Views(x, noise, level, [prior.guidance("red")], [prior.guidance("")], None, torch.arange(1))
    x_t, r = methods.classifier_sd(lambda queries: predict(prior, queries), views)
    words = [torch.tensor(TEXTS[p], dtype=torch.float64) for p in ("red", "")]
    red, null = (prior.eps(x_t, torch.tensor([300]), [Cond(text=w, image=None)]) for w in words)
    torch.testing.assert_close(r, 7.5 * (red - null), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_delta_velocity_moves_the_noisy_view_on(case, eta):
    x_t, r, _ = case.run(partial(methods.delta_velocity, eta=eta), "red", "blue")
    edited = case.x - case.start
    torch.testing.assert_close(
        x_t, case.level.alpha * case.x + case.level.sigma * (case.noise + eta * edited)
    )
    expected = case.estimate(case.x, "red", eta * edited) - case.estimate(case.start, "blue") - eta * edited
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-10)
    if eta == 0:
        assert torch.equal(r, case.run(methods.dds, "red", "blue")[1])


@pytest.mark.parametrize("source", ["", "blue"])
@pytest.mark.parametrize(("spacing", "stride"), [(50, 200), (1, 7), (300, 10), (400, 50)])
def test_ism_is_the_difference_over_an_interval_of_the_inversion(case, source, spacing, stride):
    s = max(300 - spacing, 0)
    up = [*range(0, s, stride), s]
    x_s, x_t = (case.inverted(to, source) for to in (up, [*up, 300]))
    found, r, _ = case.run(partial(methods.ism, spacing=spacing, stride=stride), "red", source)
    torch.testing.assert_close(found, x_t, rtol=1e-8, atol=1e-8)
    expected = case.guided(x_t, 300, "red") - case.guided(x_s, s, source)
    torch.testing.assert_close(r, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(("stride", "guidance"), [(100, -1.0), (35, 0.0), (400, 0.5)])
def test_sdi_compares_the_estimate_with_the_noise_that_inversion_finds(case, stride, guidance):
    x_t = case.inverted([*range(0, 300, stride), 300], "red", 7.5 * guidance)
    found, r, _ = case.run(partial(methods.sdi, stride=stride, guidance=guidance), "red", "")
    torch.testing.assert_close(found, x_t, rtol=1e-8, atol=1e-8)
    kappa = (x_t - case.level.alpha * case.x) / case.level.sigma
    torch.testing.assert_close(r, case.guided(x_t, 300, "red") - kappa, rtol=1e-8, atol=1e-7)
    # At its own weight, what is left of x where it is replaced by the estimate of x_0.
    x_0 = (x_t - case.level.sigma * case.guided(x_t, 300, "red")) / case.level.alpha
    torch.testing.assert_close(weight(case.level, "nsr") * r, case.x - x_0, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(("residual", "key"), [("ism", "spacing"), ("ism", "stride"), ("sdi", "stride")])
def test_a_step_of_an_inversion_below_1_is_said_in_one_sentence(case, residual, key):
    with pytest.raises(InputError, match=rf"^method\.residual\.{key} must be at least 1, not 0\.$"):
        case.run(partial(getattr(methods, residual), **{key: 0}), "red", "")


def test_vsd_has_learned_its_baseline(case):
    """Its residual and its loss at a mean and a deviation of its own, and the loss's gradient by hand."""
    vsd = methods.VSD()
    case.run(vsd, "red", "")
    with torch.no_grad():
        vsd.learner.mean += 0.3
        vsd.learner.log_std -= 0.4
    alpha, sigma = case.level.alpha, case.level.sigma
    views = Views(
        case.x, case.noise, case.level, [case.prior.guidance("red", c) for c in case.start], [], None, None
    )
    score = lambda asked, network=None: predict(network or case.prior, asked)  # noqa: E731
    x_t, r = vsd(score, views)
    spread = alpha**2 * torch.tensor(-0.8).double().exp() + sigma**2
    own = sigma * (x_t - alpha * 0.3) / spread
    torch.testing.assert_close(x_t, alpha * case.x + sigma * case.noise)
    torch.testing.assert_close(r, case.estimate(case.x, "red") - own, rtol=1e-7, atol=1e-8)
    each = vsd.loss(score, views)
    torch.testing.assert_close(each, (own - case.noise).square().mean((1, 2, 3)), rtol=1e-7, atol=1e-8)
    each.sum().backward()
    by_mean = 2 * (own - case.noise) * (-alpha * sigma / spread) / own[0].numel()
    torch.testing.assert_close(vsd.learner.mean.grad.flatten(), by_mean.sum((0, 2, 3)), rtol=1e-6, atol=1e-8)
    assert not r.requires_grad


def test_vsd_asks_nothing_for_a_view_without_a_prompt(case):
    vsd, asked = methods.VSD(), []
    vsd.begin(case.prior, Draw(0, 0))
    views = Views(
        case.x, case.noise, case.level, [case.prior.guidance("red", case.start[0]), []], [], None, None
    )

    def score(queries, network=None):
        asked.extend(queries)
        return predict(network or case.prior, queries)

    vsd(score, views)
    each = vsd.loss(score, views)
    assert row_count(asked) == 3 + 1
    assert each[0] > 0
    assert each[1] == 0
    _, r = vsd(score, views._replace(target=[[], []]))
    vsd.loss(score, views._replace(target=[[], []])).sum().backward()
    assert (r == 0).all()
    assert all((p.grad == 0).all() for p in vsd.parameters())


@pytest.mark.parametrize("settings", [{"rank": 0}, {"lr": -1.0}, {"lr": float("nan")}])
def test_a_lora_that_cannot_learn_is_said_in_one_sentence(settings):
    (key,) = settings
    with pytest.raises(InputError, match=rf"^method\.residual\.{key} must be at least [01], not .*\.$"):
        methods.VSD(**settings)


@pytest.mark.parametrize("spacing", [1, 2, 20])
def test_pds_is_the_difference_of_stochastic_latents(case, spacing):
    """Both latents in full, as the public code makes them: noised at t and s, mean, standardised."""
    bars = case.prior.alphas_cumprod
    bar, earlier, beta = bars[300], bars[300 - spacing], 1 - bars[300] / bars[299]
    other_noise = Draw(0, 0).normal("other", 0, case.x.shape).double()

    def latent(clean, prompt):
        x_t = bar.sqrt() * clean + (1 - bar).sqrt() * case.noise
        x_s = earlier.sqrt() * clean + (1 - earlier).sqrt() * other_noise
        x_0 = (x_t - (1 - bar).sqrt() * case.estimate(clean, prompt)) / bar.sqrt()
        mean = earlier.sqrt() * beta / (1 - bar) * x_0
        mean = mean + (1 - beta).sqrt() * (1 - earlier) / (1 - bar) * x_t
        return (x_s - mean) / ((1 - earlier) / (1 - bar) * beta).sqrt()

    x_t, r, _ = case.run(lambda *a: methods.pds(*a, spacing=spacing), "red", "blue")
    torch.testing.assert_close(x_t, case.level.alpha * case.x + case.level.sigma * case.noise)
    expected = latent(case.x, "red") - latent(case.start, "blue")
    torch.testing.assert_close(r, expected, rtol=1e-9, atol=1e-10)


def test_pds_one_timestep_back_is_dds_rescaled(case):
    _, r, _ = case.run(lambda *a: methods.pds(*a, spacing=1), "red", "")
    _, dds, _ = case.run(methods.dds, "red", "")
    chi = (r * dds).sum() / dds.square().sum()
    assert 0.08 < chi < 0.09
    torch.testing.assert_close(r, chi * dds, rtol=1e-9, atol=1e-11)


def test_pds_pulls_back_to_the_source(case):
    """Where the prompt asks for nothing, two timesteps back, the residual points away from the source."""
    nothing = GaussianMixture(((0.0, 0.0, 0.0),), std=1e6)  # eps vanishes: everything is as likely
    guidance = [nothing.guidance("")] * 2
    views = Views(case.x, case.noise, case.level, guidance, guidance, case.start, torch.arange(2))
    _, r = methods.pds(lambda queries: predict(nothing, queries), views)
    psi = (r / (case.x - case.start)).mean()
    assert 0.07 < psi < 0.09
    torch.testing.assert_close(r, psi * (case.x - case.start), rtol=1e-3, atol=1e-5)


def test_pds_below_its_spacing_is_said_in_one_sentence(case):
    low = Level.at(1, case.prior.alphas_cumprod)
    with pytest.raises(InputError, match=r"spacing .* 2 at timestep 1; .*t_min"):
        methods.pds(predict, Views(case.x, case.noise, low, [], [], case.start, torch.arange(2)))
