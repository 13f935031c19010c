"""A radiance field on a grid in plain PyTorch: densities and colours at the corners of cells that matter."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csd_exp.errors import InputError, accept
from csd_exp.files import write_whole
from csd_exp.scene.cameras import Bounds, Cameras, Rays
from csd_exp.scene.field import Background, Field, Photographed, Rendered
from csd_exp.schedules import Draw

SHELL = 0.6  # what all that lies outside of the bounds is contracted to, in halves of their side
FAR = 100.0  # in the same unit; beyond is the background
UNIT = 0.05  # the length over which densities are counted, in the same unit
FAINT = 1e-3  # opacity over a UNIT where nothing is known
EMPTY = 0.05  # a cell of less weight in every view, the most being 1, does not outlive a refinement
UNSEEN = 1e-4  # a sample of less weight has no colour
FINEST = 512  # corners along a side
BALL = 20.0  # density in the middle of the ball that a field begins as
COLOURS = 0.02  # what a difference of colours counts for beside one of densities
AT_ONCE = 1024  # rays that are traced together, so that what is in between stays in the cache
SKY = (128, 256)  # rows and columns of a learned background
MESHES = (".glb", ".ply", ".obj", ".stl", ".off")

BASIS = (0.28209479177387814, 0.4886025119029199)  # of spherical harmonics of degree 0 and 1
CORNERS = tuple(product((0, 1), repeat=3))


class _Samples(NamedTuple):
    """Samples of rays in cells that count, [n] each.

    hit: which of all places. ray: whose. along: how far. steps: how long once contracted. cells: in which.
    rows, shares: [n, 8], the corners around and their parts. intervals: places of each ray.
    """

    hit: Tensor
    ray: Tensor
    along: Tensor
    steps: Tensor
    cells: Tensor
    rows: Tensor
    shares: Tensor
    intervals: int


class Voxels(Field):
    """Density and colour at the corners of a grid, interpolated; Plenoxels (Fridovich-Keil et al. 2022).

    The grid spans the bounds and, contracted to a shell around them, all space (in the maximum norm, as DVGO
    v2 does with mip-NeRF 360's map). Only corners of cells that hold something are kept, and only samples
    in such cells are looked up, so that fine grids take little. Colours are spherical harmonics.

    bounds: what is resolved. resolutions: corners along a side, coarse to fine; a fit goes through them.
    harmonics: their degree, 0 or 1. background: what is at infinity, `learned`, `white` or `black`.
    rays: how many a step of fitting takes. smoothness: weight of the roughness. ball: radius of a ball to
    begin with, in halves of the bounds' side; None is haze. dtype: `float32` or `float64`.
    """

    suffix = ".glb"

    occupied: Tensor
    index: Tensor
    corners: Tensor
    middle: Tensor
    upright: Tensor

    def __init__(
        self,
        bounds: Bounds,
        resolutions: Sequence[int] = (40, 80, 144),
        harmonics: int = 1,
        background: Background = "learned",
        rays: int = 2048,
        smoothness: float = 1e-3,
        ball: float | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        accept("modality.field.background", background, get_args(Background))
        if harmonics not in (0, 1):
            raise InputError(f"modality.field.harmonics must be 0 or 1, not {harmonics}.")
        accept("modality.field.dtype", dtype, ("float32", "float64"))
        if not resolutions or not all(2 <= r <= FINEST for r in resolutions):
            raise InputError(
                f"modality.field.resolutions must each lie between 2 and {FINEST} corners, not {resolutions}."
            )
        for key, value, least in (("rays", rays, 1), ("smoothness", smoothness, 0)):
            if not least <= value < math.inf:
                raise InputError(f"modality.field.{key} must be at least {least}, not {value}.")
        self.bounds, self.resolutions, self.harmonics = bounds, tuple(resolutions), harmonics
        self.background, self.batch, self.smoothness = background, rays, smoothness
        self.shift = math.log(math.expm1(-math.log1p(-FAINT)))
        kind = getattr(torch, dtype)
        # In the state, so that a checkpoint alone can be rendered.
        self.register_buffer("middle", bounds.centre.to(kind))
        self.register_buffer("reach", torch.tensor([bounds.half, bounds.near], dtype=torch.float64))
        frame = torch.linalg.qr(torch.cat([bounds.up[:, None], torch.eye(3).to(bounds.up)], 1))[0]
        frame = frame * (1 if frame[:, 0] @ bounds.up > 0 else -1)
        self.register_buffer("upright", frame.to(kind))
        self._lay_out(_away_from_cameras(bounds, self.resolutions[0] - 1))
        self.density = nn.Parameter(torch.zeros(len(self.corners) + 1, 1, dtype=kind))
        self.colour = nn.Parameter(torch.zeros(len(self.corners) + 1, 3 * (harmonics + 1) ** 2, dtype=kind))
        if ball is not None:
            self._begin_as_ball(ball)
        if background == "learned":
            self.sky = nn.Parameter(torch.zeros(SKY[0] * SKY[1], 3, dtype=kind))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], background: Background) -> "Voxels":
        half, near = state["reach"].tolist()
        up, kind = state["upright"][:, 0].double(), state["density"].dtype
        nowhere = torch.full((1, 3), math.inf, dtype=torch.float64)
        field = cls(
            Bounds(state["middle"].double(), half, near, nowhere, up, True),
            resolutions=[len(state["index"])],
            harmonics=int((state["colour"].shape[1] // 3) ** 0.5) - 1,
            background=background,
            dtype=str(kind).removeprefix("torch."),
        )
        field.load_state_dict(state)
        return field

    @torch.no_grad()
    def _begin_as_ball(self, radius: float) -> None:
        """Densest in the middle, as DreamFusion begins; what is not in the bounds is left out for good."""
        if not 0 < radius <= 1:
            raise InputError(f"modality.field.ball must lie in (0, 1], not {radius}.")
        cells = self.resolution - 1
        side = ((torch.arange(cells) + 0.5) / cells * 2 - 1).abs() * (1 + SHELL) <= 1
        self._lay_out(side[:, None, None] & side[:, None] & side)
        places = (self.corners / cells * 2 - 1) * (1 + SHELL)
        sigma = BALL * (1 - places.norm(dim=1) / radius).clamp(min=0) + FAINT / UNIT
        raw = torch.log(torch.expm1(sigma * UNIT)) - self.shift
        kind = self.density.dtype
        self.density = nn.Parameter(torch.cat([torch.zeros(1), raw])[:, None].to(kind))
        self.colour = nn.Parameter(torch.zeros(len(self.density), self.colour.shape[1], dtype=kind))

    @property
    def resolution(self) -> int:
        """Corners along a side."""
        return len(self.index)

    def _lay_out(self, occupied: Tensor) -> None:
        """Number the corners of occupied cells [R - 1]^3, from 1; 0 stands for all others."""
        touched = _touched(occupied)
        index = torch.zeros(touched.shape, dtype=torch.int32, device=occupied.device)
        index[touched] = torch.arange(1, int(touched.sum()) + 1, dtype=torch.int32, device=occupied.device)
        self.register_buffer("occupied", occupied)
        self.register_buffer("index", index)
        self.register_buffer("corners", touched.nonzero(), persistent=False)

    def forward(self, cameras: Cameras) -> Rendered:
        cameras = cameras.to(self.density)
        seen = [
            self.trace(Rays(*part))
            for rays in zip(*cameras.rays(), strict=True)  # of one camera, which decides where rays are cut
            for part in zip(*(x.flatten(0, 1).split(AT_ONCE) for x in rays), strict=True)
        ]
        shape = (len(cameras), *cameras.size, -1)
        return Rendered(*(torch.cat(x).view(shape).permute(0, 3, 1, 2) for x in zip(*seen, strict=True)))

    def trace(self, rays: Rays, jitter: Tensor | None = None) -> Rendered:
        """What rays [m, 3] see: rgb [m, 3], alpha [m, 1] and depth [m, 1].

        jitter: [m, samples] in [0, 1), where in its interval each sample lies; None is the middle.
        """
        lengths = rays.directions.norm(dim=1, keepdim=True)
        origins, heading = (rays.origins - self.middle) / self.bounds.half, rays.directions / lengths
        samples = self._samples(origins, heading, jitter)
        weights, left = self._weights(samples, len(origins))
        lit = (weights > UNSEEN).nonzero().squeeze(1)
        ray, weight = samples.ray[lit], weights[lit, None]
        colours = self._colours(samples.rows[lit], samples.shares[lit], heading[ray])
        rgb = torch.zeros_like(origins).index_add(0, ray, weight * colours)
        depth = torch.zeros_like(lengths).index_add(0, ray, weight * samples.along[lit, None])
        # Of nothing at all the depth is 0.
        depth = depth / (1 - left).clamp(min=torch.finfo(left.dtype).tiny) * self.bounds.half / lengths
        return Rendered(rgb + left * self._behind(heading), 1 - left, depth)

    @torch.no_grad()
    def _samples(self, origins: Tensor, heading: Tensor, jitter: Tensor | None) -> _Samples:
        """One place in each interval of rays [m, 3], of those in cells that count; half a side is 1."""
        edges = self._edges(origins)
        spans = edges.diff()
        along = (edges[:-1] + (0.5 if jitter is None else jitter) * spans).expand(len(origins), -1)
        # Axis by axis: an innermost side of 3 is too short for vectors.
        way = origins.T[..., None] + along * heading.T[..., None]
        places = self._to_grid(_contracted(way, 0).flatten(1))
        cells = _flat(places.long().clamp(0, self.resolution - 2), self.resolution - 1, 0)
        hit = self.occupied.flatten().index_select(0, cells).nonzero().squeeze(1)
        ray, order, found = hit // len(spans), hit % len(spans), places[:, hit].T.contiguous()
        steps, outside = (
            spans[order],
            (found / (self.resolution - 1) * 2 - 1).abs().amax(1) * (1 + SHELL) > 1,
        )
        outside = outside.nonzero().squeeze(1)
        ends = [
            _contracted(origins[ray[outside]] + edges[order[outside] + k, None] * heading[ray[outside]])
            for k in (0, 1)
        ]
        steps = steps.index_copy(0, outside, (ends[1] - ends[0]).norm(dim=1))
        rows, shares = self._around(found)
        return _Samples(hit, ray, along.flatten()[hit], steps, cells[hit], rows, shares, len(spans))

    def _weights(self, samples: _Samples, rays: int) -> tuple[Tensor, Tensor]:
        """What each sample is of its ray, [samples]; and what is left of each ray behind all, [rays, 1]."""
        # A gather of single numbers, many times as fast as one of rows of length 1.
        raw = self.density[:, 0].index_select(0, samples.rows.flatten()).view(samples.rows.shape)
        sigma = F.softplus((raw * samples.shares).sum(1) + self.shift) / UNIT
        flat = sigma.new_zeros(rays * samples.intervals).index_copy(0, samples.hit, sigma * samples.steps)
        dense = flat.view(rays, samples.intervals)
        through = dense.cumsum(1)
        weights = torch.exp(dense - through) - torch.exp(-through)
        return weights.flatten().index_select(0, samples.hit), torch.exp(-through[:, -1:])

    def _edges(self, origins: Tensor) -> Tensor:
        """[intervals + 1], where rays are cut: a cell long in the bounds, then by disparity."""
        step = 2 * (1 + SHELL) / (self.resolution - 1)
        near = self.bounds.near / self.bounds.half
        reach = float(origins.norm(dim=1).max()) + 3**0.5
        inside = torch.linspace(near, reach, math.ceil((reach - near) / step) + 1, dtype=torch.float64)
        outside = torch.linspace(1, reach / FAR, math.ceil(1.5 * SHELL / step) + 1, dtype=torch.float64)[1:]
        return torch.cat([inside, reach / outside]).to(origins)

    def _to_grid(self, contracted: Tensor) -> Tensor:
        """Places in units of cells, 0 to R - 1."""
        return (contracted / (1 + SHELL) + 1) / 2 * (self.resolution - 1)

    def _around(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the eight corners about places [m, 3], and their shares; both [m, 8]."""
        cell = places.long().clamp(0, self.resolution - 2)
        offset = places - cell
        lowest = _flat(cell, self.resolution)
        steps = [_flat(torch.tensor(c), self.resolution) for c in CORNERS]
        corners = torch.stack([lowest + step.to(lowest) for step in steps], 1)
        rows = self.index.flatten().index_select(0, corners.flatten()).view(corners.shape)
        sides = torch.stack([1 - offset, offset], 2)
        x, y, z = sides[:, 0], sides[:, 1], sides[:, 2]
        shares = x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]
        return rows, shares.flatten(1)

    def _colours(self, rows: Tensor, shares: Tensor, heading: Tensor) -> Tensor:
        coefficients = _interpolated(self.colour, rows, shares).unflatten(1, (3, -1))
        basis = heading.new_full((len(heading), 1), BASIS[0])
        if self.harmonics:
            basis = torch.cat([basis, BASIS[1] * heading], 1)
        return torch.sigmoid((coefficients * basis[:, None]).sum(2))

    def _behind(self, heading: Tensor) -> Tensor:
        """The background [m, 3] in directions [m, 3]."""
        if self.background != "learned":
            return heading.new_full((), float(self.background == "white")).expand(len(heading), 3)
        height, width = SKY
        with torch.no_grad():
            up, across, along = (heading @ self.upright).unbind(1)
            row = (up.clamp(-1, 1).acos() / math.pi * height - 0.5).clamp(0, height - 1)
            column = torch.atan2(across, along) / (2 * math.pi) * width
            top, left = row.floor().clamp(max=height - 2), column.floor()
            down, right = (row - top)[:, None], (column - left)[:, None]
            cells = [(top + i) * width + (left + j) % width for i in (0, 1) for j in (0, 1)]
            shares = torch.cat(
                [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], 1
            )
            rows = torch.stack(cells, 1).int()
        return torch.sigmoid(F.embedding_bag(rows, self.sky, mode="sum", per_sample_weights=shares))

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """A saved field brings its own grid."""
        for name in ("occupied", "index", "density", "colour"):
            saved, own = state.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape:
                new = own.new_empty(saved.shape)
                setattr(self, name, nn.Parameter(new) if isinstance(own, nn.Parameter) else new)
        super()._load_from_state_dict(state, prefix, *rest)
        self.corners = _touched(self.occupied).nonzero()

    def loss(self, photographs: Photographed, draw: Draw) -> Tensor:
        """Squared error of random rays, and how much neighbours differ, a tenth of them at a time."""
        cameras = photographs.cameras.to(self.density)
        generator = draw.generator("rays")
        ids = torch.from_numpy(generator.integers(len(cameras), size=self.batch))
        height, width = cameras.size
        pixels = torch.from_numpy(generator.integers([width, height], size=(self.batch, 2)))
        rays = cameras.through(ids, pixels)
        intervals = len(self._edges((rays.origins - self.middle) / self.bounds.half)) - 1
        jitter = torch.from_numpy(generator.random((self.batch, intervals), dtype="float32")).to(self.density)
        seen = self.trace(rays, jitter)
        wanted, counts = (x.to(seen.rgb) for x in photographs.colours(ids, pixels))
        error = (counts * (seen.rgb - wanted).square()).mean()
        return error + self.smoothness * self.roughness(draw)

    @torch.no_grad()
    def write(self, file: Path, opacity: float = 0.5) -> None:
        """Write the surface with its colours as a mesh: .glb, .ply, .obj, .stl or .off.

        Raises InputError for another format, and without the extra `scene`.
        """
        if file.suffix.lower() not in MESHES:
            raise InputError(f"{file} must end in {', '.join(MESHES[:-1])} or {MESHES[-1]}.")
        try:
            from trimesh import Trimesh
        except ImportError as e:
            raise InputError("A mesh needs the extra scene: pip install csd_exp[scene].") from e

        vertices, faces, colours = self.surface(opacity)
        mesh = Trimesh(
            vertices.cpu().numpy(),
            faces.numpy(),
            vertex_colors=(colours * 255).round().byte().cpu().numpy(),
            process=False,
        )
        write_whole(file, cast(str | bytes, mesh.export(file_type=file.suffix[1:].lower())))

    def surface(self, opacity: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
        """Where a cell has this opacity, within the bounds, as a mesh.

        Vertices [n, 3] in the world, faces [m, 3], and the colours [n, 3] in [0, 1] that do not depend on the
        direction. Raises InputError where there is none.
        """
        from skimage.measure import marching_cubes  # of the extra scene

        sigma = F.softplus(self.density[:, 0] + self.shift) / UNIT
        sigma[0] = 0
        dense = sigma[self.index.long()]
        side = (torch.arange(self.resolution, device=dense.device) / (self.resolution - 1) * 2 - 1) * (
            1 + SHELL
        )
        inside = (side.abs() <= 1).nonzero().squeeze(1)
        first, last = int(inside[0]), int(inside[-1]) + 1
        dense = dense[first:last, first:last, first:last].cpu()
        level = -math.log1p(-opacity) * (self.resolution - 1) / (2 * (1 + SHELL))
        if not float(dense.min()) < level < float(dense.max()):
            raise InputError(f"The field has no surface of opacity {opacity:g} within its bounds.")
        found, faces, _, _ = marching_cubes(dense.double().numpy(), level)
        places = torch.from_numpy(found.copy()).to(self.middle) + first
        rows, shares = self._around(places)
        plain = _interpolated(self.colour, rows, shares).unflatten(1, (3, -1))[..., 0]
        world = (places / (self.resolution - 1) * 2 - 1) * (1 + SHELL) * self.bounds.half + self.middle
        return world, torch.from_numpy(faces.copy()).long(), torch.sigmoid(BASIS[0] * plain)

    def roughness(self, draw: Draw) -> Tensor:
        """Mean squared difference of corners to the next along each axis, over a random tenth of them."""
        drawn = draw.generator("corners").integers(len(self.corners), size=max(1, len(self.corners) // 10))
        corners = self.corners[torch.from_numpy(drawn).to(self.corners.device)]
        flat, total = self.index.flatten(), self.density.new_zeros(())
        rows = flat[_flat(corners, self.resolution)]
        for axis in torch.eye(3, dtype=torch.long, device=corners.device):
            following = flat[_flat((corners + axis).clamp(max=self.resolution - 1), self.resolution)]
            both = following > 0
            for table, share in ((self.density, 1.0), (self.colour, COLOURS)):
                difference = table.index_select(0, rows[both]) - table.index_select(0, following[both])
                total = total + share * difference.square().sum(1).mean()
        return total

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": [self.density], "lr": 0.2}, {"params": [self.colour], "lr": 0.1}]
        return groups + ([{"params": [self.sky], "lr": 0.05}] if self.background == "learned" else [])

    def stages(self, photographs: Photographed, steps: int) -> Iterator[int]:
        early = steps // 6
        for resolution in self.resolutions[1:]:
            yield early
            self._refine(photographs.cameras, resolution)
        yield steps - early * (len(self.resolutions) - 1)

    @torch.no_grad()
    def _refine(self, cameras: Cameras, resolution: int) -> None:
        """Go to a finer grid, over the cells that cameras see something in, and their neighbours."""
        seen = self._seen(cameras).view((self.resolution - 1,) * 3)
        kept = F.max_pool3d((seen > EMPTY * seen.max()).float()[None, None], 3, 1, padding=1)[0, 0] > 0
        scale = (self.resolution - 1) / (resolution - 1)
        at = ((torch.arange(resolution - 1) + 0.5) * scale).long().to(kept.device)
        fine = kept[at[:, None, None], at[:, None], at]
        corners = _touched(fine).nonzero()
        rows, shares = self._around(corners * scale)
        values = [_interpolated(table, rows, shares.to(table)) for table in (self.density, self.colour)]
        self._lay_out(fine)
        for name, value in zip(("density", "colour"), values, strict=True):
            setattr(self, name, nn.Parameter(torch.cat([torch.zeros_like(value[:1]), value])))

    def _seen(self, cameras: Cameras) -> Tensor:
        """The most that a cell weighs in any ray of the views at a quarter of their size, [cells]."""
        most = self.density.new_zeros((self.resolution - 1) ** 3)
        small = cameras.resized((max(1, cameras.size[0] // 4), max(1, cameras.size[1] // 4))).to(self.density)
        for i in range(len(small)):
            origins, directions = (x.flatten(0, 2) for x in small[[i]].rays())
            origins, heading = (origins - self.middle) / self.bounds.half, F.normalize(directions, dim=1)
            samples = self._samples(origins, heading, None)
            most.scatter_reduce_(0, samples.cells, self._weights(samples, len(origins))[0], "amax")
        return most


def _touched(occupied: Tensor) -> Tensor:
    """The corners [R]^3 of occupied cells [R - 1]^3."""
    return F.max_pool3d(occupied[None, None].float(), 2, 1, padding=1)[0, 0] > 0


def _flat(cells: Tensor, side: int, axis: int = -1) -> Tensor:
    x, y, z = cells.unbind(axis)
    return (x * side + y) * side + z


def _contracted(x: Tensor, axis: int = -1) -> Tensor:
    """All space to the cube of half the side 1 + SHELL; what lies in that of 1 stays (as mip-NeRF 360)."""
    m = x.abs().amax(axis, keepdim=True).clamp(min=1)
    return (1 + SHELL - SHELL / m) * x / m


def _away_from_cameras(bounds: Bounds, cells: int) -> Tensor:
    """[cells]^3, false where a camera would have a cell nearer than `near`."""
    side = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 - 1) * (1 + SHELL)
    places = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), 3).view(-1, 3)
    m = places.abs().amax(1, keepdim=True)
    # Back from the shell to where it is in the world.
    places = torch.where(m > 1, SHELL / (1 + SHELL - m) / m, 1) * places * bounds.half + bounds.centre
    nearest = torch.cat([torch.cdist(part, bounds.positions).amin(1) for part in places.split(2**14)])
    return (nearest > bounds.near).view(cells, cells, cells)


def _interpolated(table: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """sum_k shares[:, k] table[rows[:, k]]; row 0 counts for nothing."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=shares.to(table), padding_idx=0)
