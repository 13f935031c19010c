"""Stein variational gradient descent on residuals: kernels, bandwidths and the coupled update.

Pure tensors; nothing here knows about diffusion. Residuals are in noise units (a negated, scaled
score) and are descended, so repulsion enters as the sum over j of grad_{x_i} k(x_i, x_j): read
literally, Eq. 8 of Collaborative Score Distillation (arXiv 2307.04787) would attract.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, nan
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from csd_exp.errors import InputError, accept

Bandwidth = Literal["median", "median_offdiagonal"]
Space = Literal["x_t", "x_0", "features"]
Repulsion = Literal["pullback", "off"]
RepulsionScale = Literal["official", "stein"]
Normalize = Literal["n", "rowsum", "none", "rms"]


def squared_distances(phi: Tensor) -> Tensor:
    """All pairwise |phi_i - phi_j|^2 of phi [N, D] as [N, N], diagonal exactly 0.

    Differences first: the matmul shortcut would cancel away the distance between near-equal particles.
    Particles equal up to rounding have distance 0: under a median rule, repulsion grows like 1 / distance
    and would throw them apart.
    """
    distances = torch.stack([(x - phi).square().sum(1) for x in phi])
    norms = phi.square().sum(1)
    rounding = (2 * torch.finfo(phi.dtype).eps) ** 2 * torch.maximum(norms[:, None], norms)
    return distances.where(distances > rounding, 0)


def inverse_bandwidth(distances: Tensor, rule: Bandwidth | float) -> Tensor:
    """gamma of k = profile(gamma * D) for squared distances D [N, N]; 0 where every distance is 0.

    `median` is the public code's rule, log(N + 1) / median(D) over the full matrix with its zero
    diagonal (the lower middle value); where that median is 0 (N <= 2, or identical particles) the
    median of the positive entries takes its place. `median_offdiagonal` always leaves out the
    diagonal. A number is gamma itself, 1 / length^2.
    """
    n = len(distances)
    if not isinstance(rule, str):
        return torch.full_like(distances[0, 0], float(rule))
    if n == 1:
        return torch.zeros_like(distances[0, 0])
    others = off_diagonal(distances)
    median = (distances.flatten() if rule == "median" else others).median()
    # Below this, 1 / D would overflow: as good as identical.
    zero = torch.finfo(distances.dtype).smallest_normal / torch.finfo(distances.dtype).eps
    # Chosen where the numbers are: a GPU that was asked which it is would have to be waited for.
    positive = others.where(others > zero, nan).nanmedian().nan_to_num(nan=inf)
    return log(n + 1) / torch.where(median <= zero, positive, median)


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries [N (N - 1)] of a matrix [N, N] beside its diagonal, in order; N is at least 2."""
    n = len(matrix)
    return matrix.flatten()[1:].view(n - 1, n + 1)[:, :-1].flatten()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A radial kernel k(x, y) = profile(gamma |x - y|^2) and how it couples a set of particles.

    By Stein variational gradient descent (Liu & Wang 2016) on residuals, as CSD does (Kim et al. 2023).

    bandwidth: `median` (official), `median_offdiagonal`, or gamma itself (a number > 0).
    scale: multiplies gamma.
    space: what the kernel sees: the noisy view `x_t` (official), the clean view `x_0`, or `features`.
    repulsion: `pullback` to the view, or `off`.
    repulsion_scale: `official` adds the kernel's gradient as it is, `stein` times sigma_t, which makes
        the update that of Liu & Wang 2016 for the density of x_t, in noise units.
    normalize: divide the update by the number of particles `n` (official), by the kernel's `rowsum`,
        not at all (`none`), or rescale it to the residuals' root mean square over the set (`rms`,
        "matched step size").
    Raises InputError, naming the key, for any other value.
    """

    bandwidth: Bandwidth | float = "median"
    scale: float = 1.0
    space: Space = "x_t"
    repulsion: Repulsion = "pullback"
    repulsion_scale: RepulsionScale = "official"
    normalize: Normalize = "n"
    couples: ClassVar[bool] = True  # whether particles see each other at all

    def __post_init__(self):
        rules = get_args(Bandwidth)
        if self.bandwidth not in rules and not _positive(self.bandwidth):
            raise InputError(
                f"kernel.bandwidth must be {', '.join(rules)} or a number above 0, not {self.bandwidth!r}."
            )
        if not _positive(self.scale):
            raise InputError(f"kernel.scale must be a number above 0, not {self.scale!r}.")
        accept("kernel.space", self.space, get_args(Space))
        accept("kernel.repulsion", self.repulsion, get_args(Repulsion))
        accept("kernel.repulsion_scale", self.repulsion_scale, get_args(RepulsionScale))
        accept("kernel.normalize", self.normalize, get_args(Normalize))

    def profile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel and its derivative at u = gamma |x - y|^2 >= 0."""
        raise NotImplementedError

    def of(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """K and dK / d phi_i in units of phi_i - phi_j, both [N, N], of squared distances [N, N]."""
        gamma = self.scale * inverse_bandwidth(distances, self.bandwidth)
        k, slope = self.profile(gamma * distances)
        return k, 2 * gamma * slope

    def __call__(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """K [N, N] and repulsion [N, D] of particles phi [N, D]; repulsion_i = sum_j grad_{phi_i} k."""
        k, pull = self.of(squared_distances(phi))
        # Differences first: sum_j pull_ij * phi_i - pull @ phi would cancel for near-equal particles.
        repulsion = torch.stack([row @ (x - phi) for row, x in zip(pull, phi, strict=True)])
        return k, repulsion


class RBF(Kernel):
    """exp(-u): the kernel of the paper and of the public code (`rbf_kernel`)."""

    def profile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.exp(-u)
        return k, -k


class IMQ(Kernel):
    """(1 + u)^(-1/2), the inverse multiquadric (Gorham & Mackey 2017): heavy tails, far particles couple."""

    def profile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return (1 + u).rsqrt(), -0.5 * (1 + u) ** -1.5


class Perceptual(Kernel):
    """exp(-d^2 / h), h = median(d)^2 / log N over pairs, d a perceptual distance: the paper's for text-to-3D.

    CSD Appendix C puts LPIPS in the place of the Euclidean distance. d is the squared distance of features
    whose own it is, as of `features=perceptual` or `lpips`. N is the number of particles, and at least 2.
    """

    def of(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        d, n = distances, len(distances)
        median = off_diagonal(d).median() if n > 1 else torch.zeros_like(d[0, 0])
        tiny = torch.finfo(d.dtype).smallest_normal ** 0.5
        gamma = torch.where(median > tiny, self.scale * log(max(n, 2)) / median.square(), 0)
        k = torch.exp(-gamma * d.square())
        return k, -4 * gamma * d * k


class Uniform(Kernel):
    """1 everywhere: every particle takes the same update; plain averaging, no repulsion."""

    def profile(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(u), torch.zeros_like(u)


class NoKernel(Kernel):
    """Particles do not see each other: the update is the residual itself, whatever `normalize` says."""

    couples: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "normalize", "none")

    def __call__(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(len(phi), dtype=phi.dtype, device=phi.device), torch.zeros_like(phi)


def svgd(
    residual: Tensor,
    kernel_matrix: Tensor,
    repulsion: Tensor,
    normalize: Normalize = "n",
    rows: slice = slice(None),
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The coupled update, to be descended, of `rows` of a set: K r + repulsion, normalized.

    residual: [N, D], every particle's. kernel_matrix: [N, N]. repulsion: [n, D], of `rows` only, in the
    residual's space. total: sums a scalar over whoever holds the other rows (ranks), for `rms`.
    N = 1 returns the residual exactly. Liu & Wang 2016 Eq. 8; CSD Eq. 8 with the sign of its text.
    """
    n = len(residual)
    if n == 1:
        return residual[rows]
    update = kernel_matrix[rows] @ residual + repulsion
    match normalize:
        case "n":
            return update / n
        case "rowsum":
            return update / kernel_matrix[rows].sum(dim=1, keepdim=True)
        case "rms":
            energy = total(update.square().sum())
            return update * torch.where(energy > 0, (residual.square().sum() / energy).sqrt(), 1)
        case "none":
            return update
    raise InputError(f"kernel.normalize must be one of {', '.join(get_args(Normalize))}, not {normalize!r}.")


def multiplier(
    residual: Tensor,
    kernel_matrix: Tensor,
    normalize: Normalize,
    rows: slice = slice(None),
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor | float:
    """What `svgd` multiplies K r by, for a repulsion that is not added in the residual's space.

    A number, or one for each of `rows`, [n, 1]. Of `rms` it is that of K r alone. N = 1 has no repulsion: 0.
    """
    n = len(residual)
    if n == 1:
        return 0.0
    coupled = kernel_matrix[rows] @ residual
    match normalize:
        case "n":
            return 1 / n
        case "rowsum":
            return 1 / kernel_matrix[rows].sum(dim=1, keepdim=True)
        case "rms":
            energy = total(coupled.square().sum())
            return torch.where(energy > 0, (residual.square().sum() / energy).sqrt(), 1)
    return 1.0


def _positive(x: object) -> bool:
    return isinstance(x, (int, float)) and 0 < x < inf
