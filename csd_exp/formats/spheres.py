"""360-degree pictures and videos: what their files say of the projection, and how a copy says the same."""

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from csd_exp.formats.labels import NAMESPACES
from csd_exp.images import opened_image

GPANO = NAMESPACES["GPano"]


def read_sphere(path: str | Path, key: str = "modality.path") -> dict[str, str]:
    """The GPano properties of an image file by name, such as ProjectionType; none where it has none.

    Raises InputError as `csd_exp.images.read_image`. Source: Google's Photo Sphere XMP metadata.
    """
    with opened_image(path, key) as image:
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = packet.encode() if isinstance(packet, str) else packet
    try:
        elements = list(ElementTree.fromstring(packet.strip(b"\0")).iter())
    except ElementTree.ParseError:
        return {}
    found = [*(pair for element in elements for pair in element.attrib.items())]
    found += [(element.tag, (element.text or "").strip()) for element in elements]
    return {
        name.removeprefix(f"{{{GPANO}}}"): text for name, text in found if name.startswith(f"{{{GPANO}}}")
    }


def properties(sphere: Mapping[str, str]) -> dict[str, str]:
    """These GPano properties, for a packet of XMP; others, such as an orientation, hold no longer."""
    return {f"GPano:{name}": text for name, text in sphere.items()}


def goes_round(sphere: Mapping[str, str]) -> bool:
    """Whether the left and right border of a picture with these properties meet, in equirectangular form."""
    width = sphere.get("CroppedAreaImageWidthPixels")
    return (
        sphere.get("ProjectionType") == "equirectangular"
        and sphere.get("FullPanoWidthPixels", width) == width
    )
