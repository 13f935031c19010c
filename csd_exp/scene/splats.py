"""A field of Gaussians by the library gsplat, on CUDA: its rasterisation, its densification."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError, accept
from csd_exp.scene.cameras import UNIT_CUBE, Bounds, Cameras
from csd_exp.scene.field import Background, Field, Fitting, Photographed, Rendered
from csd_exp.schedules import Draw

if TYPE_CHECKING:
    from csd_exp.scene.ply import Gaussians

RATES = {"means": 1.6e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 2.5e-3 / 20}
Y0 = 0.28209479177387814  # the harmonic of degree 0


class Splats(Field):
    """3D Gaussian splatting (Kerbl et al. 2023) as gsplat implements it; colours are spherical harmonics.

    It begins at the points of a reconstruction or, without, at random in the bounds, and is densified and
    pruned by gsplat's `DefaultStrategy` while it is fitted from nothing; where it follows edited photographs,
    the Gaussians stay as many. Rates, initialisation and loss are those of the reference code.

    count: Gaussians to begin with where there are no points. harmonics: degree, 0 to 3. background: one
    colour behind all, `learned`, `white` or `black`. ply: a trained scene that is taken as it is, in the
    world of the poses; nothing is fitted then. structure: weight of 1 - SSIM beside the absolute error.
    Raises InputError for a setting out of range.
    """

    suffix = ".ply"

    def __init__(
        self,
        bounds: Bounds,
        count: int = 50_000,
        harmonics: int = 3,
        background: Background = "learned",
        structure: float = 0.2,
        ply: str | None = None,
    ):
        super().__init__()
        accept("modality.field.background", background, get_args(Background))
        if not 0 <= harmonics <= 3:
            raise InputError(f"modality.field.harmonics must lie between 0 and 3, not {harmonics}.")
        if count < 4:
            raise InputError(f"modality.field.count must be at least 4, not {count}.")
        if not 0 <= structure <= 1:
            raise InputError(f"modality.field.structure must lie between 0 and 1, not {structure}.")
        self.bounds, self.background, self.structure, self.trained = (
            bounds,
            background,
            structure,
            ply is not None,
        )
        self.splats = nn.ParameterDict(_begun(bounds, count, harmonics) if ply is None else _read(ply))
        # In the state, so that a checkpoint alone can be rendered.
        self.register_buffer("reach", torch.tensor([bounds.half, bounds.near], dtype=torch.float64))
        if background == "learned":
            self.behind = nn.Parameter(torch.zeros(3))
        self.steps = 0

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], background: Background) -> "Splats":
        half, near = state["reach"].tolist()
        middle, nowhere = torch.zeros(3).double(), torch.full((1, 3), math.inf, dtype=torch.float64)
        bounds = Bounds(middle, half, near, nowhere, UNIT_CUBE.up, True)
        degree = int((1 + state["splats.shN"].shape[1]) ** 0.5) - 1
        field = cls(bounds, count=4, harmonics=degree, background=background)
        field.load_state_dict(state)
        return field

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        if not torch.cuda.is_available():
            raise InputError(
                "modality/field=splats is rasterised on CUDA, which this machine does not have; "
                "modality/field=voxels works here."
            )
        from gsplat.cuda._backend import _C  # builds with nvcc at first use

        if _C is None:
            raise InputError(
                "modality/field=splats needs gsplat's kernels, which nvcc builds at first use, and there is "
                "no CUDA toolkit; install one, or use modality/field=voxels."
            )

    @property
    def degree(self) -> int:
        return int((1 + self.splats["shN"].shape[1]) ** 0.5) - 1

    def forward(self, cameras: Cameras) -> Rendered:
        return self._rasterised(cameras)[0]

    def _rasterised(self, cameras: Cameras) -> tuple[Rendered, dict[str, Any]]:
        from gsplat import rasterization

        cameras = cameras.to(self.splats["means"])
        height, width = cameras.size
        seen, alpha, meta = rasterization(
            self.splats["means"],
            self.splats["quats"],
            self.splats["scales"].exp(),
            self.splats["opacities"].sigmoid(),
            torch.cat([self.splats["sh0"], self.splats["shN"]], 1),
            cameras.world_to_camera,
            cameras.matrix,
            width,
            height,
            near_plane=self.bounds.near,
            sh_degree=self.degree,
            packed=False,
            render_mode="RGB+ED",
        )
        seen, alpha = seen.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)
        rgb = seen[:, :3] + (1 - alpha) * self._behind().view(1, 3, 1, 1)
        return Rendered(rgb.clamp(0, 1), alpha, seen[:, 3:]), meta

    def _behind(self) -> Tensor:
        if self.background == "learned":
            return self.behind.sigmoid()
        return self.splats["means"].new_full((3,), float(self.background == "white"))

    def loss(self, photographs: Photographed, draw: Draw) -> Tensor:
        """Absolute error and structural dissimilarity of one photograph, drawn at random, where it counts."""
        return self._error(photographs, draw)[0]

    def _error(self, photographs: Photographed, draw: Draw) -> tuple[Tensor, dict[str, Any]]:
        from torchmetrics.functional.image import structural_similarity_index_measure

        i = int(draw.generator("photograph").integers(len(photographs.cameras)))
        seen, meta = self._rasterised(photographs.cameras[[i]])
        wanted, counts = (x.to(seen.rgb) for x in (photographs.picture(i)[None], photographs.counts(i)))
        # What is left out is on both sides what is seen, without its graph: no error and no gradient.
        shown = seen.rgb.detach()
        seen_there, wanted_there = (torch.lerp(shown, x, counts) for x in (seen.rgb, wanted))
        similarity = structural_similarity_index_measure(seen_there, wanted_there, data_range=1.0)
        assert isinstance(similarity, Tensor)
        absolute = (seen_there - wanted_there).abs().mean()
        return (1 - self.structure) * absolute + self.structure * (1 - similarity), meta

    def parameter_groups(self) -> list[dict[str, Any]]:
        # Places move in proportion to the scene, as in the reference code.
        rates = RATES | {"means": RATES["means"] * self.bounds.half}
        groups: list[dict[str, Any]] = [
            {"params": [self.splats[name]], "lr": rate} for name, rate in rates.items()
        ]
        return groups + ([{"params": [self.behind], "lr": 1e-2}] if self.background == "learned" else [])

    def stages(self, photographs: Photographed, steps: int) -> Iterator[int]:
        self.steps = steps
        yield 0 if self.trained else steps

    def fitting(self, share: float = 1.0) -> Fitting:
        return Fitting(self, share) if share < 1 or self.trained else Densification(self, self.steps)

    def gaussians(self) -> "Gaussians":
        """As they are written to a PLY file."""
        from csd_exp.scene.ply import Gaussians

        own = self.splats
        colours = torch.cat([own["sh0"], own["shN"]], 1)
        return Gaussians(own["means"], own["quats"], own["scales"], own["opacities"], colours)

    def write(self, file: Path, opacity: float) -> None:
        """Write the Gaussians as a PLY file of splats; `opacity` is of no surface here."""
        from csd_exp.scene.ply import write_splats

        if file.suffix != self.suffix:
            raise InputError(f"{file} must end in .ply, which splats are written as.")
        write_splats(self.gaussians(), file)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """A saved field brings as many Gaussians as it has."""
        for name, own in list(self.splats.items()):
            saved = state.get(f"{prefix}splats.{name}")
            if saved is not None and saved.shape != own.shape:
                self.splats[name] = nn.Parameter(own.new_empty(saved.shape))
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[arg-type]


class Densification(Fitting):
    """Fits splats from nothing: gsplat clones, splits and prunes them over the first half of the steps."""

    def __init__(self, field: Splats, steps: int):
        from gsplat import DefaultStrategy

        self.field: Splats = field
        groups = field.parameter_groups()
        self.rates = [group["lr"] for group in groups]
        named = zip([*RATES, "behind"], groups, strict=False)
        self.optimizers = {name: torch.optim.Adam([group], eps=1e-15) for name, group in named}
        own = {name: self.optimizers[name] for name in RATES}
        self.strategy = DefaultStrategy(
            refine_start_iter=steps // 20,
            refine_stop_iter=steps // 2,
            refine_every=max(1, steps // 100),
            reset_every=max(1, steps // 5),
        )
        self.strategy.check_sanity(field.splats, own)
        self.densified, self.at = own, 0
        self.state = self.strategy.initialize_state(scene_scale=field.bounds.half)

    @torch.enable_grad()
    def step(self, photographs: Photographed, draw: Draw, decay: float = 1.0) -> None:
        """One step, of which only the places slow down, as in the reference code."""
        self.optimizers["means"].param_groups[0]["lr"] = decay * self.rates[0]
        error, meta = self.field._error(photographs, draw)
        splats = self.field.splats
        self.strategy.step_pre_backward(splats, self.densified, self.state, self.at, meta)
        error.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        with _seeded(splats["means"].device, draw):
            self.strategy.step_post_backward(splats, self.densified, self.state, self.at, meta)
        self.at += 1


@contextmanager
def _seeded(device: torch.device, draw: Draw) -> Iterator[None]:
    """Global generators, which gsplat splits by, keyed by the step; afterwards they are as they were."""
    seed = int(draw.generator("densification").integers(2**63))
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu.index].manual_seed(seed)
        yield


def _begun(bounds: Bounds, count: int, harmonics: int) -> dict[str, Tensor]:
    """Gaussians at known points, or at random in the bounds, each as wide as its neighbours are away."""
    generator = torch.Generator().manual_seed(0)
    if bounds.points is None:
        means = bounds.centre.float() + bounds.half * (2 * torch.rand(count, 3, generator=generator) - 1)
        colours = torch.rand(count, 3, generator=generator)
    else:
        means, colours = (part.float() for part in bounds.points)
    n = len(means)
    return {
        "means": means,
        "scales": _spacing(means).clamp(min=1e-7).log()[:, None].repeat(1, 3),
        "quats": torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=1),
        "opacities": torch.full((n,), 0.1).logit(),
        "sh0": ((colours - 0.5) / Y0)[:, None],
        "shN": torch.zeros(n, (harmonics + 1) ** 2 - 1, 3),
    }


def _spacing(points: Tensor, neighbours: int = 3) -> Tensor:
    """[n], the root of the mean squared distance of each point to its nearest others."""
    from scipy.spatial import cKDTree

    places = points.double().numpy()
    away, _ = cKDTree(places).query(places, min(neighbours + 1, len(places)))
    return torch.from_numpy(away[:, 1:]).square().mean(1).sqrt().to(points)


def _read(ply: str) -> dict[str, Tensor]:
    from csd_exp.scene.ply import read_splats

    read = read_splats(Path(ply))
    own = {"means": read.means, "scales": read.scales, "quats": read.quats, "opacities": read.opacities}
    return own | {"sh0": read.harmonics[:, :1], "shN": read.harmonics[:, 1:]}
