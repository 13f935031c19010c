"""Files of video as their containers lay them out, where FFmpeg does not say what a user should know."""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import av

BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"sidx", b"free", b"skip", b"wide", b"uuid")
HELD = (b"moov", b"moof", b"mdat")  # without their end there are pictures missing
SPHERE = b"\xff\xcc\x82\x63\xf8\x55\x4a\x93\x88\x14\x58\x7a\x02\x52\x1f\xdd" + (
    b'<?xml version="1.0"?><rdf:SphericalVideo xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
    b'xmlns:GSpherical="http://ns.google.com/videos/1.0/spherical/">'
    b"<GSpherical:Spherical>true</GSpherical:Spherical><GSpherical:Stitched>true</GSpherical:Stitched>"
    b"<GSpherical:StitchingSoftware>csd_exp</GSpherical:StitchingSoftware>"
    b"<GSpherical:ProjectionType>equirectangular</GSpherical:ProjectionType></rdf:SphericalVideo>"
)
EBML, SEGMENT, CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def open_media(path: str | Path, mode: Any = "r", **settings: Any) -> Any:
    """`av.open` of a file by any name; `12:30.mp4` by itself would be a protocol."""
    return av.open(str(Path(path).absolute()), mode, **settings)


def is_cut_off(path: Path) -> bool:
    """Whether a file ends inside of what it has begun: MP4 and MOV, Matroska and WebM, GIF, AVI.

    Of other formats it is not known, nor of a file that ends between two parts of a number it does not give.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(12)
        if head[4:8] in BOXES:
            return any(end > size for name, _, end in _boxes(file, 0, size) if name in HELD)
        if head[:4] == EBML:
            return _elements_cut_off(file, size)
        if head[:4] == b"GIF8":
            return _gif_cut_off(file)
        return head[:4] == b"RIFF" and head[8:12] == b"AVI " and _chunks_cut_off(file, size)


def mark_sphere(path: Path) -> None:
    """Say in an MP4 whose index comes last that its first track is a 360-degree video, equirectangular.

    Source: Google's Spherical Video metadata, version 1: a box in the track, which FFmpeg reads, not writes.
    """
    with open(path, "r+b") as file:
        at = {name: at for name, at, _ in _boxes(file, 0, os.fstat(file.fileno()).st_size)}[b"moov"]
        file.seek(at)
        index = bytearray(file.read())
        _, track, end = next(box for box in _boxes(BytesIO(index), 8, len(index)) if box[0] == b"trak")
        added = (8 + len(SPHERE)).to_bytes(4, "big") + b"uuid" + SPHERE
        for box in (0, track):
            index[box : box + 4] = (int.from_bytes(index[box : box + 4], "big") + len(added)).to_bytes(
                4, "big"
            )
        index[end:end] = added
        file.seek(at)
        file.write(index)


def _boxes(file: BinaryIO, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of ISO/IEC 14496-12's boxes, each the length of all of it, a name and a content."""
    while at < size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # to the end of the file, or no box at all
            return
        yield head[4:8], at, at + length
        at += length


def _elements_cut_off(file: BinaryIO, size: int) -> bool:
    """RFC 8794: an element is its name, the length of its content, where that is known, and its content."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        named = _width(head)
        start = named + _width(head[named:])
        if not named < start <= len(head):
            return len(head) < 12
        unknown = (1 << 7 * (start - named)) - 1
        length = int.from_bytes(head[named:start], "big") & unknown
        at += start
        if length != unknown:
            at += length
        elif head[:named] not in (SEGMENT, CLUSTER):
            return False
    return at > size


def _width(content: bytes) -> int:
    """How many bytes an EBML number has; 0 for none."""
    return 9 - content[0].bit_length() if content and content[0] else 0


def _gif_cut_off(file: BinaryIO) -> bool:
    """GIF89a: blocks of one or more strings of at most 255 bytes, and a semicolon at the end."""
    file.seek(10)
    flags = int.from_bytes(file.read(1), "big")
    file.seek(2 + _colours(flags), os.SEEK_CUR)
    while (kind := file.read(1)) in (b"!", b","):
        if kind == b",":
            file.seek(8, os.SEEK_CUR)
            file.seek(_colours(int.from_bytes(file.read(1), "big")), os.SEEK_CUR)
        file.seek(1, os.SEEK_CUR)
        while length := int.from_bytes(string := file.read(1), "big"):
            file.seek(length, os.SEEK_CUR)
        if not string:
            return True
    return not kind


def _colours(flags: int) -> int:
    """The bytes of a table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _chunks_cut_off(file: BinaryIO, size: int) -> bool:
    """AVI: chunks of a name, the length of their content, 0 in an unfinished one, and their content."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or not length:
            return False
        at += 8 + length
    return at > size
