"""The two residuals, term by term."""

from types import SimpleNamespace

import pytest
import torch

from csd_exp import methods
from csd_exp.methods import Source
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.priors.base import predict
from csd_exp.schedules import Draw, Level

MEANS = ((-0.6, -0.2, 0.3), (0.7, 0.3, -0.5))
TEXTS = {"": [1.0, 1.0], "red": [0.1, 2.0], "blue": [3.0, 0.2]}


@pytest.fixture
def case():
    prior = GaussianMixture(MEANS, prompts=TEXTS, guidance_scale=7.5, image_guidance_scale=1.5, image_std=0.5)
    x, start, noise = (Draw(0, 0).normal(name, 0, (2, 3, 4, 4)).double() for name in ("x", "start", "noise"))
    level = Level.at(300, prior.alphas_cumprod)

    def run(residual, target: str, source: str):
        guided = [prior.guidance(target, c) for c in start]
        baseline = [prior.guidance(source, c) for c in start]
        queries = []

        def record(asked):
            queries.append(asked)
            return predict(prior, asked)

        x_t, r = residual(record, x, noise, level, guided, Source(start, baseline))
        return x_t, r, queries

    def estimate(clean, prompt):
        """Eq. 3 written out: three-way guidance of every view."""
        bar = float(prior.alphas_cumprod[300])
        x_t = bar**0.5 * clean + (1 - bar) ** 0.5 * noise

        def eps(text, image):
            conds = [SimpleNamespace(text=text, image=c if image else None) for c in start]
            return prior.eps(x_t, torch.tensor([300, 300]), conds)

        words = torch.tensor(TEXTS[prompt], dtype=torch.float64)
        full, image, none = eps(words, True), eps(None, True), eps(None, False)
        return none + 1.5 * (image - none) + 7.5 * (full - image)

    return SimpleNamespace(x=x, start=start, noise=noise, level=level, run=run, estimate=estimate)


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
    image = prior.eps(source_t, t, [SimpleNamespace(text=None, image=c) for c in case.start])
    none = prior.eps(source_t, t, [SimpleNamespace(text=None, image=None)] * 2)
    expected = case.estimate(case.x, "red") - (none + 1.5 * (image - none))
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=1e-11)


def test_dds_vanishes_where_nothing_is_to_change(case):
    _, r, _ = case.run(lambda p, x, *rest: methods.dds(p, case.start, *rest), "red", "red")
    assert (r == 0).all()
