"""What a file says of itself: who made it and how, where each format has room for it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import quoteattr

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
NAMESPACES = {
    "GPano": "http://ns.google.com/photos/1.0/panorama/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
}
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" %s/></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="r"?>'
)
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # its identifier in ISO media files
BLOCK = 255  # most bytes of a string in a GIF


class Label(NamedTuple):
    """software: its name and version. xmp: a packet, see `packet`. comment: any text of ASCII."""

    software: str = ""
    xmp: str = ""
    comment: str = ""


UNLABELLED = Label()


def packet(properties: Mapping[str, str]) -> str:
    """The XMP packet (ISO 16684-1) of simple properties, such as `xmp:CreatorTool`; "" where there are none.

    Prefixes are those of NAMESPACES. Characters that XML cannot hold are left out.
    """
    if not properties:
        return ""
    prefixes = dict.fromkeys(name.partition(":")[0] for name in properties)
    named = [f'xmlns:{prefix}="{NAMESPACES[prefix]}"' for prefix in prefixes]
    said = [f"{name}={quoteattr(_xml(text))}" for name, text in properties.items()]
    return PACKET % " ".join([*named, *said])


def _xml(text: str) -> str:
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)


def label_mp4(path: Path, xmp: str) -> None:
    """Put a packet at the end of an MP4, in the box that is for it (XMP, part 3, MPEG-4)."""
    content = b"uuid" + XMP_BOX + xmp.encode()
    with open(path, "ab") as file:
        file.write((4 + len(content)).to_bytes(4, "big") + content)


def label_gif(path: Path, label: Label) -> None:
    """Put a comment and a packet before the pictures of a GIF (GIF89a, extensions; XMP, part 3, GIF)."""
    content = path.read_bytes()
    flags = content[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # behind the table of colours
    comment = label.comment.encode("ascii", "replace")
    strings = [comment[i : i + BLOCK] for i in range(0, len(comment), BLOCK)]
    said = b"!\xfe" + b"".join(bytes([len(s)]) + s for s in strings) + b"\0" if comment else b""
    if label.xmp:
        # The packet is no chain of strings: whatever a reader takes for a length ends in this trailer.
        trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
        said += b"!\xff\x0bXMP DataXMP" + label.xmp.encode() + trailer
    path.write_bytes(content[:at] + said + content[at:])
