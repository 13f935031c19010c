"""What is known of a run's pictures beside their pixels, for metrics during the run and after it.

A metric's `update` takes what it needs to know of a picture, by name:
    edited, source: [3, H, W] in [0, 1], the 8-bit pictures as saved, so that a number made during a run and
        one made from its files are the same. Pictures made from noise have no source.
    prompt: the picture's instruction.
    window: side in pixels of the windows that the prior saw; None where it saw whole pictures.
    borders: rows and columns of pixels at which one of these windows begins, or has just ended.
    outside: [H, W], true where nothing may change; None where all may.
    flow: exact optical flow [2, 2, H, W] from the previous picture to this one and back, in pixels to the
        right and down; None where it is not known.
    photograph: [3, H, W], what a rendered source should be, and was not fitted to; None elsewhere.
    depth: [H, W] of a picture of a scene along the optical axis, 0 where there is no surface; None of others.
    camera: `Cameras` of one, which saw it; None of others.
Particles say what they know by `facts(i)`, in these names: `outside` as a tensor, `flow` as a reference that
`_flow` follows, the rest as plain values. In place of a flow they may give what it follows from: `depth`
[H, W] along the optical axis, 0 where there is no surface, and `camera`, a `Cameras` of one.
"""

import json
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from csd_exp.answers.pan import sunrise
from csd_exp.errors import InputError
from csd_exp.files import whole, write_whole
from csd_exp.images import read_image, saved_pictures, write_png
from csd_exp.particles import Particles
from csd_exp.scene.cameras import Cameras, flow

VAR_POSITIONAL, VAR_KEYWORD = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
KNOWN = ("edited", "prompt", "window", "borders", "outside", "flow", "depth", "camera", "photograph")


def write_facts(particles: Particles, media: Path) -> None:
    """Write what is known of each picture into a run's folder of pictures: pictures.json and outside*.png."""
    pictures, outside, file = [], None, ""
    for i in range(particles.count):
        facts = {name: value for name, value in particles.facts(i).items() if value is not None}
        mask = facts.pop("outside", None)
        if mask is not None:
            if outside is None or not torch.equal(mask, outside):
                file = f"outside_{i:05d}.png" if i else "outside.png"
                write_png(mask.float().expand(3, -1, -1), media / file)
            facts["outside"], outside = file, mask
        if "depth" in facts:
            facts["depth"] = _write_depth(facts["depth"], media / f"depth/{i:06d}.png")
            facts["camera"] = _listed(facts["camera"])
        if "photograph" in facts:
            write_png(facts["photograph"], media / f"photographs/{i:06d}.png")
            facts["photograph"] = f"photographs/{i:06d}.png"
        pictures.append(facts)
    write_whole(media / "pictures.json", json.dumps({"pictures": pictures}, indent=2) + "\n")


def _write_depth(depth: Tensor, file: Path) -> dict[str, Any]:
    """In 16 bits: the name of the file in the folder of pictures, and the depth of one step."""
    unit = max(float(depth.max()), 1e-9) / 65535
    with whole(file) as partial:
        Image.fromarray((depth / unit).round().numpy().astype("uint16")).save(partial, "PNG")
    return {"file": f"{file.parent.name}/{file.name}", "unit": unit}


def _listed(camera: Cameras) -> dict[str, Any]:
    numbers = {name: getattr(camera, name)[0].tolist() for name in ("pose", "focal", "centre")}
    return numbers | {"size": list(camera.size)}


def camera_of(facts: Mapping[str, Any]) -> Cameras:
    """The camera that the record of a picture has."""
    known = facts["camera"]
    pose, focal, centre = (torch.tensor([known[n]]).double() for n in ("pose", "focal", "centre"))
    return Cameras(pose, focal, centre, (known["size"][0], known["size"][1]))


def _view(facts: dict[str, Any], media: Path) -> tuple[Cameras, Tensor]:
    """The camera and the depth of a picture."""
    with Image.open(media / facts["depth"]["file"]) as image:
        depth = torch.from_numpy(np.array(image).astype("float64")) * facts["depth"]["unit"]
    return camera_of(facts), depth


def read_facts(media: Path) -> Iterator[dict[str, Any]]:
    """What is known of each edited picture but for its pixels, in order; without end where it is nothing."""
    sources = saved_pictures(media, "source")
    saved, seen = _saved(media, len(sources)), None
    for i in range(len(saved)) if saved else count():
        facts: dict[str, Any] = dict.fromkeys(KNOWN[1:]) | {"prompt": "", "borders": ((), ())}
        facts |= saved[i] if saved else {}
        if facts["outside"] is not None:
            facts["outside"] = read_image(media / facts["outside"])[0] > 0.5
        facts["flow"] = _flow(facts["flow"])
        if facts["photograph"] is not None:
            facts["photograph"] = read_image(media / facts["photograph"])
        if facts["depth"] is not None:
            seen, before = _view(facts, media), seen
            facts["camera"], facts["depth"] = seen
            facts["flow"] = None if before is None else _flow_between(before, seen)
        yield facts | ({"source": sources[i]} if sources else {})


def check_known(name: str, metric: type[Metric], has_source: bool) -> None:
    """Raise InputError where a metric's `update` asks for what is not known of a run's pictures."""
    known = (*KNOWN, "source") if has_source else KNOWN
    for parameter in signature(metric.update).parameters.values():
        if parameter.name in (*known, "self") or parameter.kind in (VAR_POSITIONAL, VAR_KEYWORD):
            continue
        if parameter.name == "source" and parameter.default is Parameter.empty:
            raise InputError(
                f"metrics.{name} compares pictures with their source, and pictures made from noise have "
                f"none; leave it out with ~metrics.{name}, or choose metrics=generated."
            )
        if parameter.default is Parameter.empty:
            raise InputError(
                f"metrics.{name} asks for {parameter.name!r}, which is not known of pictures; known are "
                f"{', '.join(known)}."
            )


def _flow(known: Any) -> Tensor | None:
    """Flow there and back: of two frames of the shipped pan."""
    if known is None:
        return None
    before, now = known["pan"]
    pan = sunrise()
    return torch.stack([pan.flow(before, now), pan.flow(now, before)])


def _flow_between(before: tuple[Cameras, Tensor], now: tuple[Cameras, Tensor]) -> Tensor:
    """Flow there and back, by the depths of the scene."""
    (first, depth), (second, other) = before, now
    return torch.stack([flow(first, depth, second), flow(second, other, first)]).float()


def _saved(media: Path, sources: int) -> list[dict[str, Any]]:
    """The facts in pictures.json; of a run of before they were kept by picture, they are told apart here."""
    file = media / "pictures.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pictures": []}
    if "pictures" in saved:
        return saved["pictures"]
    windows, panned = saved["windows"], saved["panned"]
    masks = sorted(f.name for f in media.glob("outside*.png"))
    return [
        {"prompt": prompt}
        | ({"window": windows["side"], "borders": (windows["rows"], windows["columns"])} if windows else {})
        | ({"outside": masks[i if len(masks) > 1 else 0]} if masks else {})
        | ({"flow": {"pan": panned[i - 1 : i + 1]}} if panned and i else {})
        for i, prompt in enumerate(saved["prompts"])
    ]
