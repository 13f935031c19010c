"""What files of a run say of themselves, read back by others: Pillow, FFmpeg, ElementTree, ExifTool."""

import base64
import io
import json
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import av
import pytest
import torch
from PIL import Image

import csd_exp
from csd_exp import report
from csd_exp.files import sha256
from csd_exp.formats.containers import is_cut_off
from csd_exp.formats.labels import Label, label_gif, packet
from csd_exp.formats.spheres import read_sphere
from csd_exp.images import write_png
from csd_exp.origin import EDITED, SOFTWARE, Origin
from csd_exp.videos import Frames, write_gif, write_mp4

TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
XMP = "{http://ns.adobe.com/xap/1.0/}"
PROMPT = 'make it "warm" & <bright>, été'
ANALYTIC = (
    *("prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "metrics=none", "logger=csv"),
    "callbacks.metrics.every_n_steps=0",
)


def edited(folder: Path, *overrides: str, **values: object) -> Path:
    given = {"hydra.run.dir": folder / "run", "prompt": "warm", **values}
    return csd_exp.edit(*ANALYTIC, *overrides, **given).run_dir


def properties(xmp: bytes | str) -> dict[str, str]:
    """The simple properties of a packet, as any parser of XML has them."""
    text = xmp.decode() if isinstance(xmp, bytes) else xmp
    root = ElementTree.fromstring(re.sub(r"<\?xpacket.*?\?>", "", text))
    return {name: value for element in root.iter() for name, value in element.attrib.items()}


def of_picture(file: Path) -> tuple[dict[str, str], dict, str | None]:
    """Pillow's reading of a PNG: XMP, the comment, the software."""
    with Image.open(file) as image:
        image.load()
        said = properties(image.info["xmp"])
        return said, json.loads(image.info["Comment"]), image.info.get("Software")


def edited_panorama(file: Path) -> Path:
    own = ["experiment=panorama", "steps=2", "seed=7", "negative_prompt=blur", "callbacks.media.at=[1]"]
    own += ["modality.mask=[0,0,30,16]", "+prior.prompts.blur=[1,0]"]
    return edited(file.parent, *own, **{"modality.path": file})


@pytest.fixture(scope="module")
def panorama(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("edited") / "private_name.png"
    Image.effect_noise((40, 16), 60).convert("RGB").save(file)
    return edited_panorama(file)


def test_an_edited_picture_says_that_a_model_has_edited_it_and_how(panorama):
    for name, step in (("edited", 2), ("edited_000001", 1), ("difference_x2", 2)):
        said, record, software = of_picture(panorama / f"media/{name}.png")
        assert software == said[f"{XMP}CreatorTool"] == SOFTWARE
        assert said[f"{IPTC}DigitalSourceType"] == f"{TYPES}compositeWithTrainedAlgorithmicMedia"
        assert said[f"{IPTC}AISystemUsed"] == "GaussianMixture"
        assert said[f"{IPTC}AIPromptInformation"] == "warm (negative: blur)"
        assert record["digital_source_type"] == said[f"{IPTC}DigitalSourceType"]
        assert record["weights"] in said[f"{IPTC}AISystemVersionUsed"]
        assert (record["prompt"], record["step"]) == ("warm", step)
        settings = record["settings"]
        assert (settings["seed"], settings["steps"], settings["kernel.normalize"]) == (7, 2, "rms")
        source = panorama.parent / "private_name.png"
        assert settings["modality.path"] == [sha256(source)]


def test_no_file_names_a_path_or_who_has_run_it(panorama):
    for file in (panorama / "media").glob("*.png"):
        content = file.read_bytes()
        assert b"private_name" not in content
        assert str(panorama.parent).encode() not in content
        assert str(Path.home()).encode() not in content


def test_what_no_model_has_touched_claims_no_model(panorama):
    for name in ("source", "mask"):
        said, record, software = of_picture(panorama / f"media/{name}.png")
        assert software == SOFTWARE
        assert record == {"software": SOFTWARE, "shows": "an input of the run"}
        assert not any(key.startswith(IPTC) for key in said)


def test_the_same_run_gives_the_same_bytes(panorama, tmp_path):
    shutil.copy(panorama.parent / "private_name.png", tmp_path / "other.png")
    other = edited_panorama(tmp_path / "other.png")
    for name in ("source", "edited", "difference_x2"):
        files = [run / f"media/{name}.png" for run in (panorama, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_page_of_a_run_keeps_what_its_pictures_say(panorama):
    small = report._picture(panorama / "media/edited.png", "edited", most_bytes=1)
    assert small.uri.startswith("data:image/jpeg;base64,")
    content = base64.b64decode(small.uri.partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert properties(image.info["xmp"])[f"{IPTC}DigitalSourceType"].startswith(TYPES)


def test_a_generated_picture_says_that_a_model_has_made_it(tmp_path):
    run = edited(
        tmp_path,
        *("experiment=generate", "prior=analytic", "steps=1", "modality.prompts=null", "modality.count=2"),
        **{"modality.size": 16},
    )
    for i in range(2):
        said, record, _ = of_picture(run / f"media/edited_{i:02d}.png")
        assert said[f"{IPTC}DigitalSourceType"] == f"{TYPES}trainedAlgorithmicMedia"
        assert record["digital_source_type"] == f"{TYPES}trainedAlgorithmicMedia"


def test_labels_can_be_left_out(tmp_path):
    Image.new("RGB", (32, 16), (9, 99, 199)).save(tmp_path / "x.png")
    own = ["experiment=panorama", "steps=1", "callbacks.media.labels=false"]
    run = edited(tmp_path, *own, **{"modality.path": tmp_path / "x.png"})
    for name in ("source", "edited"):
        with Image.open(run / f"media/{name}.png") as image:
            assert not {"xmp", "Software", "Comment"} & image.info.keys()


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    (folder / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 16), (50 * i, 99, 199)).save(folder / f"frames/{i}.png")
    return edited(folder, "experiment=video", "steps=1", **{"modality.path": folder / "frames"})


def test_a_video_says_it_to_ffmpeg_and_its_frames_to_pillow(video):
    for name in ("edited", "side_by_side"):
        with av.open(str(video / f"media/{name}.mp4"), options={"export_xmp": "1"}) as container:
            said, record = properties(container.metadata["xmp"]), json.loads(container.metadata["comment"])
            assert sum(1 for _ in container.decode(video=0)) == 3
        assert said[f"{IPTC}DigitalSourceType"] == f"{TYPES}compositeWithTrainedAlgorithmicMedia"
        assert said[f"{IPTC}AIPromptInformation"] == record["prompt"] == "warm"
        assert record["settings"]["seed"] == 0
        assert not is_cut_off(video / f"media/{name}.mp4")
    assert of_picture(video / "media/edited/000002.png")[1]["prompt"] == "warm"
    with av.open(str(video / "media/source.mp4"), options={"export_xmp": "1"}) as container:
        assert f"{IPTC}DigitalSourceType" not in properties(container.metadata["xmp"])


def test_a_gif_says_it_too(video):
    file = video / "media/edited.gif"
    with Image.open(file) as image:
        assert json.loads(image.info["comment"])["prompt"] == "warm"
        assert image.n_frames == 3
    assert not is_cut_off(file)
    content = file.read_bytes()
    xmp = content[content.index(b"XMP DataXMP") + 11 : content.index(b'<?xpacket end="r"?>')]
    assert properties(xmp)[f"{IPTC}DigitalSourceType"] == f"{TYPES}compositeWithTrainedAlgorithmicMedia"


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not there")
def test_exiftool_reads_all_of_them(panorama, video):
    files = [panorama / "media/edited.png", video / "media/edited.mp4", video / "media/edited.gif"]
    command = ["exiftool", "-json", "-n", *map(str, files)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for one in found:
        assert one["DigitalSourceType"] == f"{TYPES}compositeWithTrainedAlgorithmicMedia"
        assert one["CreatorTool"] == SOFTWARE
        assert json.loads(one["Comment"])["digital_source_type"] == one["DigitalSourceType"]


def test_any_prompt_comes_back_from_any_file(tmp_path):
    label = Origin(EDITED, "A model", "0123").of_made(PROMPT, 1, {"ProjectionType": "equirectangular"})
    picture = torch.rand(3, 16, 16)
    write_png(picture, tmp_path / "x.png", label)
    write_mp4([picture] * 2, tmp_path / "x.mp4", Fraction(24), None, True, label)
    write_gif(lambda: [picture] * 2, tmp_path / "x.gif", Fraction(24), label)
    said, record, _ = of_picture(tmp_path / "x.png")
    assert said[f"{IPTC}AIPromptInformation"] == record["prompt"] == PROMPT
    assert read_sphere(tmp_path / "x.png") == {"ProjectionType": "equirectangular"}
    with av.open(str(tmp_path / "x.mp4"), options={"export_xmp": "1"}) as container:
        said, record = properties(container.metadata["xmp"]), json.loads(container.metadata["comment"])
    assert said[f"{IPTC}AIPromptInformation"] == record["prompt"] == PROMPT
    assert Frames(tmp_path / "x.mp4").sphere
    with Image.open(tmp_path / "x.gif") as image:
        assert json.loads(image.info["comment"])["prompt"] == PROMPT


def test_a_packet_holds_any_text_that_xml_can():
    said = {"xmp:CreatorTool": 'a "b" <c> & \x00\x1f\n\U0001f600'}
    assert properties(packet(said)) == {f"{XMP}CreatorTool": 'a "b" <c> & \n\U0001f600'} | {
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}about": ""
    }
    assert packet({}) == ""


def test_a_gif_without_a_label_stays_as_it_is(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "x.gif")
    before = (tmp_path / "x.gif").read_bytes()
    label_gif(tmp_path / "x.gif", Label())
    assert (tmp_path / "x.gif").read_bytes() == before


CHARTS = {
    "advice_night",
    "bias_night",
    "fig5",
    "fig8",
    "flow",
    "matched_step",
    "particles",
    "table1",
    "taper_night",
}


def test_every_picture_of_the_documents_says_what_made_it():
    files = list((Path(__file__).parents[1] / "docs").rglob("*.jpg"))
    assert len(files) > 20
    for file in files:
        with Image.open(file) as image:
            assert (EDITED.encode() in image.info.get("xmp", b"")) == (file.stem not in CHARTS), file
