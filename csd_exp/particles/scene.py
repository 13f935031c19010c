"""A scene: its photographs are edited and its field follows, or the field itself is edited."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csd_exp.devices import sent
from csd_exp.errors import InputError
from csd_exp.images import ImageFiles, image_files, write_png
from csd_exp.particles.areas import Areas, Box, read_masks
from csd_exp.particles.base import Autoencoder, Particles
from csd_exp.particles.images import WholePictures
from csd_exp.ranks import alone
from csd_exp.scene.album import Album
from csd_exp.scene.cameras import Bounds
from csd_exp.scene.field import Field
from csd_exp.scene.scene import FOLLOWING, Scene, Trajectory, check_scene, within
from csd_exp.schedules import Draw


class _Filmed:
    """What is shown of a scene, a film of its field as it was and as it is, and what of it may change.

    within: x, y, z of the lowest and of the highest corner of a box of the world. areas: of the photographs.
    factor, feather: of these.
    """

    prompt: str
    scene: Scene
    field: Field
    original: Field  # no state: it is reconstructed, or in the cache
    within: Sequence[float] | None
    areas: Areas
    factor: int
    feather: int | None

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        check_scene(config)

    @property
    def count(self) -> int:
        return len(self.scene.film.cameras)

    def pictures(self, prior: Autoencoder, which: slice = slice(None)) -> Iterator[Tensor]:
        return self.scene.frames(self.field, which)

    def originals(self) -> Iterator[Tensor]:
        return self.scene.frames(self.original)

    def facts(self, i: int) -> dict[str, Any]:
        facts = {"prompt": self.prompt} | self.scene.facts(self.original, i)
        if self.within is not None:
            facts["outside"] = ~within(self.original, self.scene.film.cameras[[i]], self.within).cpu()
        return facts

    def _areas(self, mask: Tensor | None) -> Areas:
        """Of photographs' masks [m, H, W], one for all or one for each."""
        size, count = self.scene.views.size, len(self.scene.train)
        return Areas(size, _whole, self.factor, mask=mask, feather=self.feather, count=count)

    def _in_the_box(self) -> Tensor:
        """[n, H, W], of each photograph what the field shows of the box, where its mask lets it change."""
        assert self.within is not None
        cameras = self.scene.cameras
        shown = [within(self.original, cameras[[i]], self.within).cpu() for i in range(len(cameras))]
        masks = torch.stack(shown)
        if not masks.any():
            raise InputError("modality.within holds nothing that any photograph shows; give a larger box.")
        if self.areas.mask is not None:
            masks = masks & self.areas.mask
            if not masks.any():
                raise InputError("modality.within holds nothing of what modality.mask lets change.")
        return masks

    def get_extra_state(self) -> dict[str, Any]:
        """Names what the field was, for whoever looks at a finished run."""
        return {"reconstruction": self.scene.reconstruction}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The reconstruction is in the cache, or made anew."""


class EditedPhotographs(_Filmed, WholePictures):
    """Photographs are edited round by round, and after each round the field is fitted to them.

    A round edits `views` of the photographs, drawn without replacement, in `edit_steps` steps: they begin as
    the field shows them, with the photographs as source and condition. Then they take their places in what
    the field is fitted to, for `fit_steps` steps. The paper's update (CSD 4.3) is rounds of 16 views; that of
    Instruct-NeRF2NeRF is rounds of one step of one view, by the residual `ddim_edit`; one round of all
    views is DGE's. The pictures of the run are the frames of a film, of the field as it was and as it is.

    path, field, reconstruction_steps, bounds, near, trajectory, frames, cache, seed: see `Scene`. views: None
    for all. batch: how many of a round's views each step takes, None for all. dir: of the run, where edited
    photographs are kept. mask: of what may change, see `read_view_masks`. within: x, y, z of the lowest and
    of the highest corner of a box of the world: only what lies in it changes, of a mask what both hold. The
    rest is as for WholePictures.
    """

    areas: Areas
    edited: Tensor
    autoencoder: Autoencoder

    def __init__(
        self,
        path: str,
        factor: int,
        multiple: int,
        window: int,
        field: Callable[[Bounds], Field],
        dir: str,
        reconstruction_steps: int = 1000,
        views: int | None = 16,
        batch: int | None = None,
        edit_steps: int = 20,
        fit_steps: int = 200,
        bounds: Sequence[float] | None = None,
        near: float | None = None,
        trajectory: Trajectory = "auto",
        frames: int = 60,
        mask: str | Box | Sequence[str] | None = None,
        within: Sequence[float] | None = None,
        feather: int | None = None,
        cache: str = "outputs/scenes",
        seed: int = 0,
        prompt: str = "",
        dtype: str = "float32",
    ):
        for key, value, least in (
            ("views", views, 1),
            ("edit_steps", edit_steps, 1),
            ("fit_steps", fit_steps, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"modality.{key} must be at least {least}, not {value}.")
        side = window * factor
        scene = Scene(
            path,
            side,
            factor * multiple,
            field,
            reconstruction_steps,
            seed,
            cache,
            bounds,
            near,
            trajectory,
            frames,
        )
        trained = len(scene.train)
        super().__init__(scene.views.size, factor, multiple, batch, None, None, None, prompt, dtype, trained)
        self.scene, self.film = scene, scene.film
        self.within, self.factor, self.feather = within, factor, feather
        self.areas = self._areas(read_view_masks(mask, scene))
        self.round_of = trained if views is None else min(views, trained)
        self.edit_steps, self.fit_steps = edit_steps, fit_steps
        self.folder = Path(dir) / "views"
        self.album = scene.album()
        self.pixels = _Photographs(self.album)
        # The round in which each photograph has last been edited: what the field is fitted to.
        self.register_buffer("edited", torch.full((trained,), -1))
        self._shown = self.edited.clone()  # the same, of what the album holds
        self._watched = 0

    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        # Neither is part of what a step descends: the field follows afterwards.
        original = self.scene.reconstructed(self.home, self.album).requires_grad_(False)
        vars(self).update(original=original, autoencoder=prior)
        self.field = deepcopy(original)
        self.fitting = self.field.fitting(FOLLOWING)
        if self.within is not None:
            self.areas = self._areas(self._in_the_box())
        super().begin(prior, draw)
        self._open(draw)

    def choose(self, draw: Draw) -> Tensor:
        ids = self._round(draw)
        self._watched = int(ids[0])
        if self.batch is None or self.batch >= len(ids):
            return ids
        return ids[torch.from_numpy(draw.generator("views").permutation(len(ids))[: self.batch])]

    def preview(self, prior: Autoencoder) -> Iterator[Tensor]:
        """A photograph of the round, as it is edited so far: the field changes after it."""
        return self._decoded(prior, slice(self._watched, self._watched + 1))

    def _round(self, draw: Draw) -> Tensor:
        """The photographs of the round that a step is in."""
        drawn = replace(draw, step=draw.step // self.edit_steps, part=0).generator("round")
        return torch.from_numpy(drawn.permutation(len(self.latent))[: self.round_of])

    @torch.no_grad()
    def _open(self, draw: Draw) -> None:
        """A round begins at what the field shows."""
        for i in self._round(draw).tolist():
            seen = self.field(self.scene.cameras[[i]]).rgb.clamp(0, 1)
            self.latent[i] = self.autoencoder.encode(seen.to(self.source_latent))[0].to(self.latent)

    def after_step(self, draw: Draw) -> None:
        if (draw.step + 1) % self.edit_steps:
            return
        self._close(draw)
        self._show_edited()
        self.field.requires_grad_(True)
        for k in range(self.fit_steps):
            self.fitting.step(self.album, replace(draw, part=k))
        self.field.requires_grad_(False)
        self._open(replace(draw, step=draw.step + 1))

    @torch.no_grad()
    def _close(self, draw: Draw) -> None:
        """The edited photographs of a round become files, which every process reads."""
        now = draw.step // self.edit_steps
        with alone() as first:
            for i in self._round(draw).tolist():
                if first:
                    (image,) = self.finish(self.autoencoder.decode(self.latent[i : i + 1]).clamp(0, 1).cpu())
                    if self.areas.mask is not None:
                        # Not the album's, which rounds before this one have edited in the border, too.
                        image = self.areas.composite(i, image, self.scene.views[self.scene.train[i]])
                    label = self.origin.of_made(self.prompt, draw.step + 1, {})
                    write_png(image, self._file(now, i), label)
                self.edited[i] = now

    def _file(self, round_: int, i: int) -> Path:
        return self.folder / f"{round_:05d}_{i:05d}.png"

    def _show_edited(self) -> None:
        """Bring the album to what has been edited, also of a run that goes on."""
        for i in (self.edited.cpu() != self._shown).nonzero().flatten().tolist():
            self.album.put(i, ImageFiles([self._file(int(self.edited[i]), i)])[0])
        self._shown = self.edited.cpu().clone()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.latent]}]

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"fitting": self.fitting.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.fitting.load_state_dict(state["fitting"])


class EditedField(_Filmed, Particles):
    """The field itself is what is optimised: the coupled residual of its views is carried into it each step.

    path, field, reconstruction_steps, bounds, near, trajectory, frames, cache, seed: see `Scene`. batch: how
    many photographs' views a step takes. mask, within, feather: of the views the residual goes only through
    what these let change, see `EditedPhotographs`. The photographs are source and condition.
    """

    space = "pixel"
    conditions: Tensor | None

    def __init__(
        self,
        path: str,
        factor: int,
        multiple: int,
        window: int,
        field: Callable[[Bounds], Field],
        reconstruction_steps: int = 1000,
        batch: int = 4,
        bounds: Sequence[float] | None = None,
        near: float | None = None,
        trajectory: Trajectory = "auto",
        frames: int = 60,
        mask: str | Box | Sequence[str] | None = None,
        within: Sequence[float] | None = None,
        feather: int | None = None,
        cache: str = "outputs/scenes",
        seed: int = 0,
        prompt: str = "",
        dtype: str = "float32",
    ):
        if batch < 1:
            raise InputError(f"modality.batch must be at least 1, not {batch}.")
        super().__init__(prompt, dtype)
        side = window * factor
        self.scene = Scene(
            path,
            side,
            factor * multiple,
            field,
            reconstruction_steps,
            seed,
            cache,
            bounds,
            near,
            trajectory,
            frames,
        )
        self.film, self.batch = self.scene.film, batch
        self.within, self.factor, self.feather = within, factor, feather
        self.areas = self._areas(read_view_masks(mask, self.scene))

    @torch.no_grad()
    def begin(self, prior: Autoencoder, draw: Draw) -> None:
        album = self.scene.album()
        self.field = self.scene.reconstructed(self.home, album)
        vars(self).update(original=deepcopy(self.field).requires_grad_(False))
        if self.within is not None:
            self.areas = self._areas(self._in_the_box())
        conditions = [prior.condition(album.picture(k)[None]) for k in range(len(album))]
        known = [c for c in conditions if c is not None]
        self.album = album
        self.register_buffer("conditions", torch.cat(known) if known else None, persistent=False)

    def choose(self, draw: Draw) -> Tensor:
        return torch.from_numpy(draw.generator("views").permutation(len(self.album))[: self.batch])

    def views(self, ids: Tensor) -> Tensor:
        """What the field shows; what may not change is seen, but without its graph.

        The autoencoder would carry what a latent descends to pixels around it.
        """
        seen = self.field(self.scene.cameras[ids]).rgb
        if self.areas.mask is None:
            return seen
        return torch.lerp(seen.detach(), seen, self._of(self.areas.blend, ids))

    def share(self, ids: Tensor, chosen: Tensor) -> Tensor | float:
        return 1.0 if self.areas.free is None else self._of(self.areas.free, ids)

    def _of(self, area: Tensor, ids: Tensor) -> Tensor:
        """[n, 1, h, w] of an area [m or 1, 1, h, w] that all photographs may share."""
        own = area.expand(len(self.album), *area.shape[1:])[ids]
        like = next(self.field.parameters())
        return sent(own, like.device).to(like)

    def source(self, ids: Tensor) -> Tensor:
        pictures = torch.stack([self.album.picture(i) for i in ids.tolist()])
        return pictures.to(next(self.field.parameters()))

    def condition(self, ids: Tensor) -> Sequence[Tensor | None]:
        return [None] * len(ids) if self.conditions is None else list(self.conditions[ids])


def read_view_masks(mask: str | Box | Sequence[str] | None, scene: Scene) -> Tensor | None:
    """[m, H, W], True where the photographs that train may change; None without a mask.

    mask: as for `read_masks`; files are one for all, one for each photograph that trains or one for each of
    all, in natural order, and have the size of the photograph or of the view, see `Views.area`.
    Raises InputError for another number or size of files, and for masks that are black all over.
    """
    key, train, every = "modality.mask", scene.train, len(scene.views)
    given = [mask] if isinstance(mask, str) else [file for file in mask or () if isinstance(file, str)]
    if mask is None or not given:
        return None if mask is None else read_masks(mask, scene.views.size)
    files = image_files(given, key)
    if len(files) not in (1, len(train), every):
        raise InputError(
            f"{key}={mask} holds {len(files)} masks; give one for all, one for each of the {len(train)} "
            f"photographs that train, or one for each of all {every}."
        )
    if len(files) == 1:
        ids = train[:1] if scene.views.alike else train
        files = files * len(ids)
    else:
        ids = train
        files = files if len(files) == len(train) else [files[i] for i in train]
    masks = torch.stack([scene.views.area(i, f, key) >= 0.5 for i, f in zip(ids, files, strict=True)])
    if not masks.any():
        raise InputError(f"{key}={mask} is black all over what is seen; white marks what may change.")
    return masks


def _whole(area: Tensor) -> Tensor:
    """Views have sides of whole latents."""
    return area


class _Photographs:
    """The pictures of an album, each read when it is asked for."""

    def __init__(self, album: Album):
        self.album = album

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.album.picture, range(len(self.album)))
