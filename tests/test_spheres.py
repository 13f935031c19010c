"""Pictures and videos that go all the way round say so after an edit too."""

import numpy as np
import pytest
from clips import flat, write_clip
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from csd_exp.callbacks import Media
from csd_exp.errors import InputError
from csd_exp.formats.containers import mark_sphere
from csd_exp.formats.labels import Label, packet
from csd_exp.formats.spheres import goes_round, properties, read_sphere
from csd_exp.images import write_png
from csd_exp.particles import Images, Panorama
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.videos import Frames, write_mp4

SAID = {
    "ProjectionType": "equirectangular",
    "FullPanoWidthPixels": "64",
    "FullPanoHeightPixels": "32",
    "CroppedAreaImageWidthPixels": "64",
    "CroppedAreaImageHeightPixels": "32",
}
ELEMENTS = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:p="http://ns.google.com/photos/1.0/panorama/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    ' tiff:Orientation="1">'
    + "".join(f"<p:{k}>{v}</p:{k}>" for k, v in SAID.items())
    + "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def picture(path, xmp):
    kept = {}
    if xmp and path.suffix == ".png":
        kept["pnginfo"] = PngInfo()
        kept["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    elif xmp:
        kept = {"tiffinfo": {700: xmp.encode()}} if path.suffix == ".tif" else {"xmp": xmp.encode()}
    Image.new("RGB", (64, 32), (90, 120, 200)).save(path, **kept)
    return str(path)


@pytest.mark.parametrize("xmp", [ELEMENTS, packet(properties(SAID))], ids=["as elements", "as attributes"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_sphere_is_read_and_written(tmp_path, suffix, xmp):
    file = picture(tmp_path / f"x.{suffix}", xmp)
    assert read_sphere(file) == SAID
    for particles in (Panorama(file, 1, 16, wrap=True), Images(file, 1, 4)):
        write_png(
            next(particles.originals()),
            tmp_path / "out.png",
            Label(xmp=packet(properties(particles.projection(0)))),
        )
        assert read_sphere(tmp_path / "out.png") == SAID
        with Image.open(tmp_path / "out.png") as written:
            assert "Orientation" not in written.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize("xmp", [None, "no xml <at all", "<a/>"])
def test_other_pictures_carry_nothing(tmp_path, xmp):
    file = picture(tmp_path / "x.jpg", xmp)
    assert read_sphere(file) == {}
    assert packet(properties(Images(file, 1, 4).projection(0))) == ""
    with pytest.raises(InputError, match="is no file"):
        read_sphere(tmp_path / "missing.jpg")


def test_wrap_is_suggested_where_the_borders_meet(tmp_path, capsys):
    file = picture(tmp_path / "x.jpg", packet(properties(SAID)))
    for _ in range(2):
        Panorama(file, 1, 16)
    said = capsys.readouterr().err
    assert (
        said == f"csd: modality.path={file} goes all the way round; modality.wrap=true joins its two sides.\n"
    )
    Panorama(file, 1, 16, wrap=True)
    part = SAID | {"CroppedAreaImageWidthPixels": "40"}
    Panorama(picture(tmp_path / "part.jpg", packet(properties(part))), 1, 16)
    assert capsys.readouterr().err == ""
    assert not goes_round(part)
    assert not goes_round({})


def test_a_video_of_360_degrees_says_so_again(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", flat((90, 120, 200), (90, 120, 210)), sound="aac")
    before = list(Frames(clip))
    assert not Frames(clip).sphere
    mark_sphere(clip)
    frames = Frames(clip)
    assert frames.sphere
    assert all(np.array_equal(a, b) for a, b in zip(frames, before, strict=True))
    write_mp4(frames, tmp_path / "out.mp4", frames.times, frames.sound, frames.sphere)
    again = Frames(tmp_path / "out.mp4")
    assert again.sphere
    assert again.times == frames.times
    assert again.sound is not None


def test_an_edited_panorama_is_shown_as_a_sphere(tmp_path, build, fit):
    prior = GaussianMixture(prompts={"": [0, 1], "dark": [1, 0]})
    file = picture(tmp_path / "x.jpg", packet(properties(SAID)))
    module = build(prior, Panorama(file, 1, 16, wrap=True, prompt="dark"))
    fit(module, 2, callbacks=[Media(tmp_path / "run", every_n_steps=1)])
    for name in ("source", "edited_000001", "edited"):
        assert read_sphere(tmp_path / f"run/media/{name}.png") == SAID
    assert read_sphere(tmp_path / "run/media/difference_x2.png") == {}
