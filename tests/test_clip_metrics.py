"""CLIP scores on embeddings small enough to work out by hand, and on an open_clip model made on the spot."""

import math

import open_clip
import pytest
import torch
from torch import Tensor

from csd_exp.errors import InputError
from csd_exp.features import OpenClip
from csd_exp.metrics import (
    CLIPDirectionalSimilarity,
    CLIPDirectionConsistency,
    CLIPDirectionConsistencyAsPrinted,
    CLIPEditConsistency,
    CLIPGeometry,
    CLIPImageConsistency,
    CLIPImageSimilarity,
    CLIPJanus,
    CLIPTextSimilarity,
    CLIPTextureless,
)
from csd_exp.metrics.clip import Clip, named_clip
from csd_exp.scene.cameras import Cameras

ANGLES = {"a photograph": 0.0, "a photograph, make it night": 90.0, "a lake": 20.0, "a lake at night": 140.0}
SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Plane:
    """Embeds a picture in the plane at the angle of its first value, a text at that of `ANGLES`."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return unit(images[:, 0, 0, 0].double() * 360)

    def texts(self, texts: list[str]) -> Tensor:
        return unit(torch.tensor([ANGLES[text] for text in texts]).double())


def unit(degrees: Tensor) -> Tensor:
    radians = torch.deg2rad(degrees)
    return torch.stack([radians.cos(), radians.sin()], -1)


def at(degrees: float) -> Tensor:
    return torch.full((3, 4, 4), degrees / 360)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def value(metric, *pictures, **facts) -> float:
    for edited, source in pictures:
        metric.update(at(edited), at(source), **facts)
    return float(metric.compute())


@pytest.fixture
def plane() -> Clip:
    return Clip(Plane())


class TestByHand:
    """A chord from angle a to b points to (a + b) / 2 + 90 degrees, for a < b."""

    def test_image_similarity(self, plane):
        found = value(CLIPImageSimilarity(plane), (100, 40), (10, 10))
        assert found == pytest.approx((cosine(60) + 1) / 2)

    def test_text_similarity_is_with_the_target_caption(self, plane):
        assert value(CLIPTextSimilarity(plane), (50, 0), prompt="make it night") == pytest.approx(cosine(40))
        given = CLIPTextSimilarity(plane, target_caption="a lake at night")
        assert value(given, (50, 0), prompt="make it night") == pytest.approx(cosine(90), abs=1e-6)

    def test_directional_similarity(self, plane):
        # The texts point to 45 + 90 degrees; the pictures to 30 + 90, and then away from it.
        metric = CLIPDirectionalSimilarity(plane)
        assert value(metric, (50, 10), prompt="make it night") == pytest.approx(cosine(15))
        metric.reset()
        assert value(metric, (10, 50), prompt="make it night") == pytest.approx(-cosine(15))
        given = CLIPDirectionalSimilarity(
            plane, source_caption="a lake", target_caption="a lake at night"
        )  # to 80 + 90 degrees
        assert value(given, (50, 10)) == pytest.approx(cosine(50))

    def test_nothing_edited_has_no_direction(self, plane):
        assert value(CLIPDirectionalSimilarity(plane), (50, 50), prompt="make it night") == 0

    def test_each_consistency_has_its_own_formula(self, plane):
        # Edited frames at 40, 60 and 100 degrees, of sources at 10, 30 and 50.
        frames = ((40, 10), (60, 30), (100, 50))
        expected = {
            CLIPImageConsistency: (cosine(20) + cosine(40)) / 2,
            # Sources move towards 20 + 90 and 40 + 90, edited frames towards 50 + 90 and 80 + 90.
            CLIPDirectionConsistency: (cosine(30) + cosine(40)) / 2,
            # The edit points to 25 + 90, 45 + 90 and 75 + 90.
            CLIPEditConsistency: (cosine(20) + cosine(30)) / 2,
            # The edit of the first of two frames against where edited frames move to.
            CLIPDirectionConsistencyAsPrinted: (cosine(50 - 25) + cosine(80 - 45)) / 2,
        }
        for kind, mean in expected.items():
            assert value(kind(plane), *frames) == pytest.approx(mean, abs=1e-6), kind
        assert len({round(mean, 3) for mean in expected.values()}) == 4

    def test_a_picture_is_embedded_once_for_all_metrics_and_then_forgotten(self, plane):
        metrics = [CLIPImageSimilarity(plane), CLIPEditConsistency(plane), CLIPTextSimilarity(plane)]
        for _ in range(3):
            edited, source = at(30), at(10)
            for metric in metrics:
                metric.update(edited, source)
        assert metrics[-1].compute().isnan()  # nothing was asked of it
        assert plane.embedder.seen == 6
        del edited, source
        assert len(plane._images) == 0


def test_an_open_clip_model_by_its_name(tmp_path, monkeypatch):
    open_clip.factory._MODEL_CONFIGS["Csd-Test-4"] = SMALL
    try:
        torch.manual_seed(0)
        model = open_clip.create_model("Csd-Test-4").eval()
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        clip = named_clip(f"csd_test_4/{tmp_path / 'weights.pt'}")
        assert clip is named_clip(f"csd_test_4/{tmp_path / 'weights.pt'}")
        image = torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(0))
        embedder = OpenClip("Csd-Test-4", str(tmp_path / "weights.pt"))
        assert torch.equal(clip.image(image), embedder(image[None])[0].double())
        with torch.no_grad():
            tokens = open_clip.get_tokenizer("Csd-Test-4")(["make it night"])
            expected = model.encode_text(tokens, normalize=True)[0]
        assert torch.allclose(clip.text("make it night").float(), expected, atol=1e-6)
    finally:
        del open_clip.factory._MODEL_CONFIGS["Csd-Test-4"]


@pytest.mark.parametrize("name", ["vit_bigg", "no-such-model", "ViT-B-32-sigmoid-nothing/openai"])
def test_names_that_open_clip_does_not_have(name):
    with pytest.raises(InputError, match=rf"metrics\.clip={name} is no CLIP; give tiny"):
        named_clip(name)


def test_weights_that_are_not_there_are_one_sentence(tmp_path, caplog):
    with pytest.raises(InputError, match=r"^metrics\.clip=ViT-B-32//.*missing\.pt: clip\.pretrained="):
        named_clip(f"ViT-B-32/{tmp_path}/missing.pt")
    assert not caplog.records


def test_the_name_of_the_paper_is_open_clips(monkeypatch):
    asked = []
    monkeypatch.setattr("csd_exp.metrics.clip.OpenClip", lambda *names: asked.append(names))
    named_clip.__wrapped__("vit_bigg_14")
    named_clip.__wrapped__("ViT-L-14/openai", "cuda")
    assert asked == [("ViT-bigG-14", "laion2b_s39b_b160k", "cpu"), ("ViT-L-14", "openai", "cuda")]


def test_the_shipped_clip_is_checked_at_once_and_loaded_for_the_first_picture(tmp_path, monkeypatch):
    loaded = []

    def load(device: str) -> Plane:
        loaded.append(device)
        return Plane()

    monkeypatch.setattr("csd_exp.metrics.clip.OpenClip", load)
    clip = named_clip.__wrapped__("tiny")
    assert not loaded
    assert torch.allclose(clip.image(at(40)) @ clip.image(at(100)), torch.tensor(cosine(60)).double())
    clip.text("a lake")
    assert loaded == ["cpu"]
    monkeypatch.setattr("csd_exp.metrics.clip.TINY_FOLDER", tmp_path / "clip")
    with pytest.raises(InputError, match="has no checksums of clip"):
        named_clip.__wrapped__("tiny")


def depths(near: float, far: float) -> Tensor:
    """A slope from near to far, with nothing in its first row."""
    depth = torch.linspace(near, far, 36).view(6, 6)
    depth[0] = 0
    return depth


def test_geometry_sees_the_depth_near_white_and_nothing_black():
    seen = []

    class Watching(Plane):
        def __call__(self, images):
            seen.append(images)
            return super().__call__(images)

    clip = Clip(Watching())
    metric = CLIPGeometry(clip=clip, target_caption="a lake")
    metric.update(torch.zeros(3, 6, 6), depths(2.0, 5.0), "x")
    (shown,) = seen
    assert shown.shape == (1, 3, 6, 6)
    assert not shown[0, :, 0].any()
    assert float(shown[0, 0, 1, 0]) == pytest.approx(1.0)  # the nearest that there is
    assert float(shown[0, 0, 5, 5]) == pytest.approx(0.2)
    assert float(metric.compute()) == pytest.approx(math.cos(math.radians(20)))  # a black first value
    metric.reset()
    metric.update(torch.zeros(3, 6, 6), None, "x")
    metric.update(torch.zeros(3, 6, 6), torch.zeros(6, 6), "x")
    assert math.isnan(metric.compute())


def test_a_surface_without_texture_is_lit_where_it_faces_the_light():
    """A wall in the grey that Lambert's cosine says, before white."""
    seen = []

    class Watching(Plane):
        def __call__(self, images):
            seen.append(images)
            return super().__call__(images)

    middle = torch.full((1, 2), 8.0).double()
    camera = Cameras(torch.eye(3, 4).double()[None], 16 * torch.ones(1, 2).double(), middle, (16, 16))
    depth = torch.full((16, 16), 2.0).double()
    depth[:, :4] = 0
    metric = CLIPTextureless(clip=Clip(Watching()), target_caption="a lake")
    metric.update(torch.zeros(3, 16, 16), depth, camera, "x")
    (shown,) = seen
    assert (shown[0, :, :, :3] == 1).all()
    point = torch.tensor([2 * 0.5 / 16, 2 * 0.5 / 16, 2.0])  # pixel 8, 8; the light is 2 above the camera
    towards = torch.tensor([0.0, -2.0, 0.0]) - point
    cosine = float(-towards[2] / towards.norm())
    assert float(shown[0, 0, 8, 8]) == pytest.approx(0.85 * (0.3 + 0.7 * cosine), abs=1e-5)
    metric.reset()
    metric.update(torch.zeros(3, 16, 16), None, None, "x")
    assert math.isnan(metric.compute())


def test_janus_holds_the_back_against_the_front():

    metric = CLIPJanus(clip=Clip(Plane()))
    for angle in (10.0, 50.0, 70.0, 300.0):
        metric.update(torch.full((3, 4, 4), angle / 360))
    assert float(metric.compute()) == pytest.approx(math.cos(math.radians(60)), abs=1e-6)
    metric.reset()
    assert math.isnan(metric.compute())
