"""ControlNet on Stable Diffusion 1.5, 2.1 and SDXL: text-to-image priors that edit, held by what they see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from csd_exp.errors import InputError, accept, closest
from csd_exp.families import known
from csd_exp.images import luminance, to_uint8
from csd_exp.priors.base import Cond, Guidance
from csd_exp.priors.folders import check_lone, known_folder, load_lone, lone_folder
from csd_exp.priors.stable_diffusion import StableDiffusion
from csd_exp.priors.stable_diffusion_xl import StableDiffusionXL

Kind = Literal["canny", "gray", "tile", "given"]


@dataclass(frozen=True)
class Control:
    """One ControlNet and what it is shown.

    path: its folder, or hub id. kind: `canny`, edges of the source between thresholds low and high; `gray`,
    its luma; `tile`, the source itself; `given`, the next of `modality.controls`. weight: of what it adds.
    """

    path: str
    kind: Kind = "canny"
    weight: float = 1.0
    low: int = 100
    high: int = 200

    def __post_init__(self):
        accept("prior.controls kind", self.kind, get_args(Kind))
        for name, value in (("weight", self.weight), ("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"prior.controls {name} must be a number, not {value!r}.")

    def shown(self, image: Tensor, given: Tensor | None) -> Tensor:
        """The control [n, 3, H, W] in [0, 1] of source pictures."""
        if self.kind == "given":
            return cast(Tensor, given)
        if self.kind == "tile":
            return image
        if self.kind == "gray":
            return luminance(image).expand_as(image)
        import cv2

        grays = [cv2.cvtColor(to_uint8(one), cv2.COLOR_RGB2GRAY) for one in image]
        edges = [torch.from_numpy(cv2.Canny(gray, self.low, self.high)) for gray in grays]
        return (torch.stack(edges)[:, None] / 255).expand(-1, 3, -1, -1).to(image)


class Controlled(StableDiffusion):
    """What ControlNets (Zhang et al. 2023) add to a prior: the residuals of networks that see a control.

    Every row of a view keeps its control, those of the negative prompt and of CSD-Edit's baseline included,
    so that a text-to-image prior edits; its prompts describe pictures. A CSD-Edit view costs 3 rows, 4 under
    a source prompt of its own, each through the ControlNets too.
    controls: a list of what `Control` takes; their residuals are added, each by its weight. Controls are cut
    like the views.
    The rest is as for the prior itself.
    """

    def __init__(self, path: str | Path | tuple, controls: Sequence[Mapping[str, Any]], **shared):
        super().__init__(path=path, **shared)
        self.controls = read_controls(controls)
        self.conditioned = 3 * len(self.controls) * self.factor**2
        self.nets = [self._loaded(k, control) for k, control in enumerate(self.controls)]
        for k, net in enumerate(self.nets):
            self.freeze(net)
            net.to(memory_format=self._layout)
            self.networks[f"control_{k}"] = net
        self.compiled(self.nets)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        super().check(config)
        folder = known_folder(config["path"])
        unet = {} if folder is None else known(folder / "unet/config.json")
        vae = {} if folder is None else known(folder / "vae/config.json")
        for k, control in enumerate(read_controls(config["controls"])):
            where = lone_folder(f"prior.controls[{k}].path", control.path, "ControlNet")
            if where is not None:
                _check_control(f"prior.controls[{k}].path={control.path}", where, unet, vae)

    def _loaded(self, k: int, control: Control) -> Any:
        key = f"prior.controls[{k}].path"

        def check(folder: Path) -> None:
            _check_control(f"{key}={control.path}", folder, self.unet.config, self.vae.config)

        return load_lone(key, control.path, "ControlNet", ControlNetModel, check, self.dtype)

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.controlled(image, ())

    def controlled(self, image: Tensor, controls: Sequence[Tensor]) -> Tensor:
        """The controls, [n, 3 K f^2, h, w]: a latent's f x f pixels on channels, so that windows cut them."""
        given = iter(controls)
        shown = [c.shown(image, next(given) if c.kind == "given" else None) for c in self.controls]
        return pixel_unshuffle(torch.cat(shown, dim=1), self.factor)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        if condition is None:
            raise InputError("prior=controlnet needs a picture to control by, and this modality has none.")
        guidance = super().guidance(prompt, None, negative_prompt)
        return [(weight, Cond(**cond, control=condition)) for weight, cond in guidance]

    def inputs(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> dict[str, Any]:
        inputs = super().inputs(x, t, conds)
        shown = pixel_shuffle(self.held(torch.stack([c["control"] for c in conds])), self.factor)
        down: list[Tensor] = []
        middle = None
        for control, net, image in zip(self.controls, self.nets, shown.split(3, dim=1), strict=True):
            more, its_middle = net(
                x, **inputs, controlnet_cond=image, conditioning_scale=control.weight, return_dict=False
            )
            down = [a + b for a, b in zip(down, more, strict=True)] if down else list(more)
            middle = its_middle if middle is None else middle + its_middle
        return inputs | {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": middle,
        }


class ControlNet(Controlled):
    """ControlNet on Stable Diffusion 1.5 or 2.1; the keys are those of Controlled and StableDiffusion."""


class ControlNetXL(Controlled, StableDiffusionXL):
    """ControlNet on SDXL; the keys are those of Controlled and StableDiffusionXL."""


def read_controls(controls: Sequence[Mapping[str, Any]]) -> list[Control]:
    """Raises InputError, naming the key, for what is no list of controls."""
    fields = list(Control.__dataclass_fields__)
    if not controls:
        raise InputError("prior.controls is empty; give a list such as [{path: FOLDER, kind: canny}].")
    for k, control in enumerate(controls):
        for key in () if "path" not in control else control:
            if key not in fields:
                raise InputError(
                    f"prior.controls[{k}].{key} is no key{closest(str(key), fields)}; accepted are "
                    f"{', '.join(fields)}."
                )
        if "path" not in control:
            raise InputError(f"prior.controls[{k}] has no path; give the folder of a ControlNet.")
    return [Control(**control) for control in controls]


def _check_control(key: str, folder: Path, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a folder of no ControlNet, or of one for another prior; reads configurations alone."""
    config = check_lone(key, folder, "ControlNet", "ControlNetModel")
    if config.get("global_pool_conditions"):
        raise InputError(f"{key} pools its control over the picture, which windows do not allow.")
    for name in ("cross_attention_dim", "addition_embed_type", "block_out_channels"):
        has, wants = (_plain(settings.get(name)) for settings in (config, unet))
        if unet and has != wants:
            raise InputError(f"{key} is for another prior: its {name} is {has}, and the UNet's {wants}.")
    steps = len(config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)) - 1
    if vae and steps != len(vae["block_out_channels"]) - 1:
        raise InputError(
            f"{key} is for another prior: its control has {2**steps} pixels to a latent, and the autoencoder "
            f"{2 ** (len(vae['block_out_channels']) - 1)}."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
