"""Timesteps, weights, levels and counted noise."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csd_exp.errors import InputError
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.schedules import Draw, Level, Timesteps, weight

ALPHAS = GaussianMixture().alphas_cumprod


# Draws


@given(
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10**9),
    particle=st.integers(0, 10**12),
    purpose=st.sampled_from(["noise", "views", "timestep", "encode"]),
)
def test_the_same_key_gives_the_same_bits(seed, step, particle, purpose):
    one = Draw(seed, step).normal(purpose, particle, (2, 3))
    Draw(seed, step).normal("noise", particle + 1, (5,))
    assert torch.equal(one, Draw(seed, step).normal(purpose, particle, (2, 3)))


def test_every_part_of_the_key_changes_the_draw_and_draws_are_uncorrelated():
    keys = list(itertools.product([0, 1, 2**40], [0, 1, 199], ["noise", "views", "encode"], [0, 1, 77]))
    noise = torch.stack([Draw(s, k).normal(purpose, i, (4000,)) for s, k, purpose, i in keys]).double()
    correlation = torch.corrcoef(noise) - torch.eye(len(keys))
    # 81 * 80 / 2 pairs of standard deviation 1 / sqrt(4000): 6 sigma is out of reach.
    assert correlation.abs().max() < 6 / 4000**0.5
    torch.testing.assert_close(noise.mean(), torch.tensor(0.0).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(), torch.tensor(1.0).double(), atol=0.01, rtol=0)


def test_the_whole_name_of_a_draw_counts():
    names = ("azimuth", "azimuth of the light", "azimuth of the camera", "azimuth_", "azimuth_of the camera")
    draws = [tuple(Draw(0, 0).normal(name, 0, (4,)).tolist()) for name in names]
    assert len(set(draws)) == len(names)


def test_batches_that_one_step_accumulates_have_draws_of_their_own():
    parts = [Draw(0, 7, part).normal("noise", 0, (4000,)) for part in range(3)]
    assert torch.equal(parts[0], Draw(0, 7).normal("noise", 0, (4000,)))
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(3)
    assert correlation.abs().max() < 6 / 4000**0.5


def test_neighbouring_counters_do_not_overlap():
    one = Draw(0, 0).generator("noise", 0).integers(0, 2**63, 100_000)
    others = [Draw(0, 0).generator("noise", 1), Draw(0, 1).generator("noise", 0)]
    for other in others:
        assert not np.intersect1d(one, other.integers(0, 2**63, 100_000)).size


def test_a_larger_shape_begins_with_the_smaller_draw_and_noise_is_float32_on_the_host():
    small, large = Draw(3, 4).normal("noise", 5, (7,)), Draw(3, 4).normal("noise", 5, (70,))
    assert torch.equal(large[:7], small)
    assert small.dtype == torch.float32
    assert small.device.type == "cpu"


def test_a_draw_is_pinned_across_versions():
    """The key is part of what a seed means: changing it would change every published run."""
    philox = np.random.Philox(key=[7, int.from_bytes(b"noise", "little")], counter=[0, 0, 5, 11])
    expected = np.random.Generator(philox).standard_normal(4, dtype=np.float32)
    np.testing.assert_array_equal(Draw(7, 11).normal("noise", 5, (4,)).numpy(), expected)


def test_draws_neither_read_nor_move_global_generators():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    one = Draw(0, 0).normal("noise", 0, (10,))
    Timesteps(t_min=0, t_max=9)(Draw(0, 0))
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(Draw(0, 0).normal("noise", 0, (10,)), one)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_key_can_hold_is_refused(seed):
    with pytest.raises(InputError, match=r"^seed must be "):
        Draw(seed, 0)


# Timesteps


def test_uniform_timesteps_reach_both_ends_and_are_uniform():
    timesteps = Timesteps(t_min=3, t_max=7)
    drawn = Counter(timesteps(Draw(0, step)) for step in range(5000))
    assert sorted(drawn) == [3, 4, 5, 6, 7]
    assert all(abs(count - 1000) < 6 * 800**0.5 for count in drawn.values())


def test_official_timesteps_are_integers_from_20_to_500():
    drawn = {Timesteps(t_min=20, t_max=500)(Draw(0, step)) for step in range(10_000)}
    assert drawn == set(range(20, 501))
    assert all(type(t) is int for t in drawn)


def test_linear_timesteps_go_down_from_end_to_end():
    timesteps = Timesteps(t_min=20, t_max=500, anneal="linear", steps=7)
    assert [timesteps(Draw(0, step)) for step in range(9)] == [500, 420, 340, 260, 180, 100, 20, 20, 20]
    assert Timesteps(t_min=20, t_max=500, anneal="linear")(Draw(0, 0)) == 500


def test_fixed_timestep_is_the_largest():
    assert {Timesteps(t_min=20, t_max=500, anneal="fixed")(Draw(s, k)) for s in (0, 1) for k in (0, 9)} == {
        500
    }


@pytest.mark.parametrize("ends", [(-1, 5), (6, 5)])
def test_an_empty_or_negative_range_is_refused(ends):
    with pytest.raises(InputError, match=r"schedule.timestep needs 0 <= t_min <= t_max"):
        Timesteps(t_min=ends[0], t_max=ends[1])


def test_an_unknown_anneal_is_refused():
    with pytest.raises(InputError, match=r"schedule.timestep.anneal must be one of uniform, linear, fixed"):
        Timesteps(t_min=0, t_max=5, anneal="cosine")


# Levels and weights


@given(t=st.integers(0, 999))
def test_levels_and_weights_are_the_closed_forms(t):
    level = Level.at(t, ALPHAS)
    bar = float(ALPHAS[t])
    assert level.t == t
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-14)
    assert level.alpha**2 == pytest.approx(bar, rel=1e-14)
    assert weight(level, "one") == 1
    assert weight(level, "sigma2") == pytest.approx(1 - bar, rel=1e-12)
    assert weight(level, "sigma") == pytest.approx((1 - bar) ** 0.5, rel=1e-12)
    assert weight(level, "snr") == pytest.approx((bar / (1 - bar)) ** 0.5, rel=1e-12)
    assert weight(level, "nsr") == pytest.approx(((1 - bar) / bar) ** 0.5, rel=1e-12)
    s = level.sigma / (level.alpha + level.sigma)
    assert weight(level, "velocity") == pytest.approx(1 / (1 - s), rel=1e-12)


def test_noised_has_the_moments_of_the_forward_process():
    level = Level.at(400, ALPHAS)
    x = torch.full((200_000,), 0.7, dtype=torch.float64)
    x_t = level.noised(x, torch.from_numpy(np.random.default_rng(0).normal(size=200_000)))
    assert float(x_t.mean()) == pytest.approx(float(ALPHAS[400]) ** 0.5 * 0.7, abs=0.01)
    assert float(x_t.var()) == pytest.approx(1 - float(ALPHAS[400]), abs=0.01)


def test_an_unknown_weight_is_refused():
    with pytest.raises(InputError, match=r"schedule.weight must be one of one, sigma2, sigma, snr, nsr, v"):
        weight(Level.at(5, ALPHAS), "sigma3")


@pytest.mark.parametrize("rule", ["nsr", "velocity"])
def test_a_weight_that_pure_noise_makes_infinite_is_refused(rule):
    with pytest.raises(InputError, match=rf"schedule.weight={rule} is infinite at timestep 0, .*t_max"):
        weight(Level.at(0, torch.zeros(1)), rule)
