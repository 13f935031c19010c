"""360-degree pictures and videos: what their files say of the projection, and how a copy says the same."""

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from csd_exp.images import opened_image

GPANO = "http://ns.google.com/photos/1.0/panorama/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:GPano="{GPANO}" %s/></rdf:RDF>'
    '</x:xmpmeta><?xpacket end="r"?>'
)


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


def sphere_xmp(sphere: Mapping[str, str]) -> str | None:
    """An XMP packet with these GPano properties alone: others, such as an orientation, hold no longer."""
    return PACKET % " ".join(f"GPano:{k}={quoteattr(v)}" for k, v in sphere.items()) if sphere else None


def goes_round(sphere: Mapping[str, str]) -> bool:
    """Whether the left and right border of a picture with these properties meet, in equirectangular form."""
    width = sphere.get("CroppedAreaImageWidthPixels")
    return (
        sphere.get("ProjectionType") == "equirectangular"
        and sphere.get("FullPanoWidthPixels", width) == width
    )
