"""Kernels, bandwidths and the coupled update against finite differences, autograd and closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csd_exp.errors import InputError
from csd_exp.svgd import IMQ, RBF, Kernel, NoKernel, Uniform, inverse_bandwidth, squared_distances, svgd

NORMALIZE = ["n", "rowsum", "none", "rms"]
KERNELS = [RBF, IMQ, Uniform]


def particles(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


def plain_kernel(kind: type[Kernel], gamma: float, x: np.ndarray, y: np.ndarray) -> float:
    u = gamma * sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return {RBF: math.exp(-u), IMQ: 1 / math.sqrt(1 + u), Uniform: 1.0}[kind]


# Distances


def test_distances_match_plain_loops_and_the_diagonal_is_exactly_zero():
    phi = particles(7)
    expected = [[sum((a - b) ** 2) for b in phi.numpy()] for a in phi.numpy()]
    distances = squared_distances(phi)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-12)
    assert (distances.diagonal() == 0).all()


@pytest.mark.parametrize("n", [3, 40])  # torch's default takes the matmul shortcut above 25 rows
def test_near_equal_particles_far_from_the_origin_keep_their_distances_in_float32(n):
    base = 100 + particles(1, 4096).float()
    phi = base + 1e-3 * particles(n, 4096, seed=1).float()
    exact = squared_distances(phi.double())
    distances = squared_distances(phi)
    assert (distances.diagonal() == 0).all()
    assert torch.equal(distances, distances.T)
    torch.testing.assert_close(distances.double(), exact, rtol=1e-5, atol=0)


def test_near_equal_particles_keep_their_repulsion_in_float32():
    phi = 100 + particles(1, 4096).float() + 1e-3 * particles(6, 4096, seed=1).float()
    _, exact = RBF()(phi.double())
    _, repulsion = RBF()(phi)
    assert (repulsion.double() - exact).norm() < 1e-5 * exact.norm()


# Bandwidth


@pytest.mark.parametrize("n", [3, 4, 5, 8, 24])
def test_median_is_the_lower_middle_of_the_full_matrix_with_its_zero_diagonal(n):
    distances = squared_distances(particles(n))
    entries = sorted(distances.flatten().tolist())
    assert entries[:n] == [0] * n
    middle = entries[(n * n - 1) // 2]
    assert float(inverse_bandwidth(distances, "median")) == pytest.approx(math.log(n + 1) / middle, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_the_offdiagonal_median_leaves_the_diagonal_out(n):
    distances = squared_distances(particles(n))
    entries = sorted(float(distances[i, j]) for i in range(n) for j in range(n) if i != j)
    middle = entries[(len(entries) - 1) // 2]
    gamma = float(inverse_bandwidth(distances, "median_offdiagonal"))
    assert gamma == pytest.approx(math.log(n + 1) / middle, rel=1e-12)


def test_the_two_medians_differ_where_the_diagonal_matters():
    distances = squared_distances(particles(4))
    assert inverse_bandwidth(distances, "median") > inverse_bandwidth(distances, "median_offdiagonal")


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("rule", ["median", "median_offdiagonal"])
def test_one_particle_has_kernel_one_and_no_repulsion(kind, rule):
    k, repulsion = kind(bandwidth=rule)(particles(1))
    assert k.tolist() == [[1.0]]
    assert (repulsion == 0).all()


def test_two_particles_fall_back_to_their_own_distance():
    k, repulsion = RBF()(particles(2))
    assert k[0, 1] == pytest.approx(1 / 3, rel=1e-12)  # exp(-log(N + 1)) at the median distance
    assert torch.isfinite(repulsion).all()
    assert repulsion[0].norm() > 0


@pytest.mark.parametrize("rule", ["median", "median_offdiagonal"])
@pytest.mark.parametrize("kind", KERNELS)
def test_identical_particles_have_kernel_one_and_no_repulsion(kind, rule):
    k, repulsion = kind(bandwidth=rule)(particles(1).expand(5, -1))
    assert (k == 1).all()
    assert (repulsion == 0).all()


@pytest.mark.parametrize("rule", ["median", "median_offdiagonal"])
def test_where_the_median_is_zero_the_positive_distances_decide(rule):
    one, other = particles(2)
    phi = torch.stack([one, one, one, one, other])  # 8 of 20 off-diagonal entries are positive
    distance = float(((one - other) ** 2).sum())
    gamma = float(inverse_bandwidth(squared_distances(phi), rule))
    assert gamma == pytest.approx(math.log(6) / distance, rel=1e-12)


def test_a_number_is_gamma_itself_and_scale_multiplies_it():
    phi = particles(4)
    distances = squared_distances(phi)
    torch.testing.assert_close(RBF(bandwidth=0.3)(phi)[0], torch.exp(-0.3 * distances))
    torch.testing.assert_close(RBF(bandwidth=0.3, scale=2)(phi)[0], torch.exp(-0.6 * distances))
    gamma = inverse_bandwidth(distances, "median")
    torch.testing.assert_close(RBF(scale=0.5)(phi)[0], torch.exp(-0.5 * gamma * distances))


def test_distances_at_the_edge_of_float32_stay_finite():
    phi = torch.tensor([[0.0], [1e-20]])
    k, repulsion = RBF()(phi)
    assert torch.isfinite(k).all()
    assert torch.isfinite(repulsion).all()


# Repulsion


@pytest.mark.parametrize("bandwidth", ["median", "median_offdiagonal", 0.2])
@pytest.mark.parametrize("kind", KERNELS)
def test_kernel_and_repulsion_match_plain_loops_and_finite_differences(kind, bandwidth):
    phi = particles(5, 3)
    kernel = kind(bandwidth=bandwidth, scale=1.5)
    k, repulsion = kernel(phi)
    # The public code, too, holds gamma fixed while it differentiates.
    gamma = 1.5 * float(inverse_bandwidth(squared_distances(phi), bandwidth))
    x = phi.numpy()
    expected = [[plain_kernel(kind, gamma, a, b) for b in x] for a in x]
    np.testing.assert_allclose(k.numpy(), expected, rtol=1e-12)
    h = 1e-5
    for i in range(5):
        for d in range(3):
            step = h * np.eye(3)[d]
            up = sum(plain_kernel(kind, gamma, x[i] + step, x[j]) for j in range(5) if j != i)
            down = sum(plain_kernel(kind, gamma, x[i] - step, x[j]) for j in range(5) if j != i)
            assert float(repulsion[i, d]) == pytest.approx((up - down) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("kind", KERNELS)
def test_repulsion_is_the_autograd_gradient_of_the_kernel_sum(kind):
    phi = particles(6)
    gamma = float(inverse_bandwidth(squared_distances(phi), "median"))
    x = phi.clone().requires_grad_()
    u = gamma * (x[:, None] - phi[None]).square().sum(-1)
    values = {RBF: torch.exp(-u), IMQ: (1 + u) ** -0.5, Uniform: 0 * u}[kind]
    (gradient,) = torch.autograd.grad(values.sum(), x)
    torch.testing.assert_close(kind()(phi)[1], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [RBF, IMQ])
def test_descent_moves_two_particles_apart(kind):
    phi = torch.tensor([[-0.1], [0.1]], dtype=torch.float64)
    gaps = []
    for _ in range(5):
        k, repulsion = kind(bandwidth=1.0)(phi)
        phi = phi - 0.1 * svgd(torch.zeros_like(phi), k, repulsion)
        gaps.append(float(phi[1] - phi[0]))
    assert all(a < b for a, b in pairwise([0.2, *gaps]))
    assert float(phi.sum()) == pytest.approx(0, abs=1e-12)


def test_liu_and_wang_in_noise_units():
    """phi* = sum_j k(x_j, x_i) score_j + grad_{x_j} k(x_j, x_i), ascended, is minus ours for r = -score."""
    x = particles(4, 2)
    score = particles(4, 2, seed=1)
    gamma = 0.7
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            x_j = x[j].clone().requires_grad_()
            k_ji = torch.exp(-gamma * (x_j - x[i]).square().sum())
            (gradient,) = torch.autograd.grad(k_ji, x_j)
            expected[i] += (k_ji.detach() * score[j] + gradient) / 4
    k, repulsion = RBF(bandwidth=gamma)(x)
    torch.testing.assert_close(-svgd(-score, k, repulsion, "n"), expected)


# The update


def plain_update(r, k, repulsion):
    n, d = r.shape
    return [[sum(k[i, j] * r[j, c] for j in range(n)) + repulsion[i, c] for c in range(d)] for i in range(n)]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_and_its_normalization_match_plain_loops(normalize):
    r = particles(5, seed=3)
    k, repulsion = IMQ()(particles(5))
    update = np.array(plain_update(r.numpy(), k.numpy(), repulsion.numpy()))
    rms = np.sqrt((r.numpy() ** 2).mean()) / np.sqrt((update**2).mean())
    divided = {
        "n": update / 5,
        "rowsum": np.stack([update[i] / sum(k.numpy()[i]) for i in range(5)]),
        "none": update,
        "rms": update * rms,
    }
    np.testing.assert_allclose(svgd(r, k, repulsion, normalize).numpy(), divided[normalize], rtol=1e-12)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("n", [2, 3, 24])
def test_rms_gives_the_root_mean_square_of_the_residuals_over_the_set(kind, n):
    r = particles(n, seed=3) * 7
    update = svgd(r, *kind()(particles(n)), "rms")
    assert float(update.square().mean()) == pytest.approx(float(r.square().mean()), rel=1e-12)


def test_rms_of_a_vanishing_update_is_zero():
    r = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert (svgd(r, *Uniform()(particles(2, 2).float()), "rms") == 0).all()


def test_equal_residuals_pass_rowsum_unchanged_and_shrink_under_n():
    r = particles(1).expand(24, -1)
    k, _ = RBF()(particles(24, 4096))
    torch.testing.assert_close(svgd(r, k, 0 * r, "rowsum"), r)
    gain = svgd(r, k, 0 * r, "n") / r
    # At the median distance K = 1 / (N + 1): (1 + 23 / 25) / 24.
    torch.testing.assert_close(gain.mean(), torch.tensor(0.08, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_kernel_returns_the_residual_exactly(normalize, dtype):
    r = particles(9, 33).to(dtype)
    kernel = NoKernel(normalize=normalize)
    k, repulsion = kernel(particles(9, 33, seed=1).to(dtype))
    assert torch.equal(svgd(r, k, repulsion, kernel.normalize), r)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("kind", KERNELS)
def test_one_particle_returns_its_residual_exactly(kind, normalize):
    r = particles(1).float()
    k, repulsion = kind()(particles(1, seed=1).float())
    assert torch.equal(svgd(r, k, repulsion, normalize), r)
    assert torch.equal(svgd(r, 0.5 * k, repulsion + 1, normalize), r)  # whatever a kernel may say


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_rows_of_the_update_are_the_update_of_those_rows(normalize):
    r = particles(7, seed=3)
    k, repulsion = RBF()(particles(7))
    whole = svgd(r, k, repulsion, normalize)
    raw = k @ r + repulsion
    for rank in range(3):
        rows = slice(rank, 7, 3)
        mine = svgd(r, k, repulsion[rows], normalize, rows, lambda _: raw.square().sum())
        torch.testing.assert_close(mine, whole[rows], rtol=1e-12, atol=1e-14)


@given(
    n=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from([*KERNELS, NoKernel]),
    bandwidth=st.sampled_from(["median", "median_offdiagonal", 0.5]),
    normalize=st.sampled_from(NORMALIZE),
)
def test_a_permutation_of_the_particles_permutes_the_update(n, seed, kind, bandwidth, normalize):
    phi, r = particles(n, 4, seed), particles(n, 4, seed + 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    kernel = kind(bandwidth=bandwidth, normalize=normalize)
    update = svgd(r, *kernel(phi), kernel.normalize)
    permuted = svgd(r[order], *kernel(phi[order]), kernel.normalize)
    torch.testing.assert_close(permuted, update[order], rtol=1e-9, atol=1e-11)


# What is refused


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"bandwidth": "mean"}, "kernel.bandwidth"),
        ({"bandwidth": "a number above 0"}, "kernel.bandwidth"),
        ({"bandwidth": 0}, "kernel.bandwidth"),
        ({"bandwidth": -1.0}, "kernel.bandwidth"),
        ({"bandwidth": math.nan}, "kernel.bandwidth"),
        ({"bandwidth": math.inf}, "kernel.bandwidth"),
        ({"scale": 0}, "kernel.scale"),
        ({"scale": math.inf}, "kernel.scale"),
        ({"space": "x"}, "kernel.space"),
        ({"repulsion": "on"}, "kernel.repulsion"),
        ({"repulsion_scale": 2}, "kernel.repulsion_scale"),
        ({"normalize": "mean"}, "kernel.normalize"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting, key):
    with pytest.raises(InputError, match=rf"^{key} must be "):
        RBF(**setting)


def test_svgd_refuses_an_unknown_normalization():
    with pytest.raises(InputError, match=r"kernel.normalize must be one of n, rowsum, none, rms"):
        svgd(particles(2), torch.eye(2).double(), particles(2), "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_particles_equal_up_to_rounding_do_not_repel(dtype) -> None:
    one = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    particles = torch.stack([one, one * (1 + torch.finfo(dtype).eps)])
    assert not torch.equal(particles[0], particles[1])
    k, repulsion = RBF()(particles)
    assert torch.equal(k, torch.ones_like(k))
    assert torch.equal(repulsion, torch.zeros_like(repulsion))
    apart = particles + torch.tensor([[0.0], [1e-3]], dtype=dtype)
    assert (RBF()(apart)[1].norm(dim=1) > 1).all()
