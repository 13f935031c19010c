"""A scene as a visitor sees it: the page opened in a real browser, its switch and its slider moved."""

import io
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import around
from test_voxels import cube, filled
from viser.transforms import SO3

from csd_exp.scene.viewer import Viewer, seen_by
from csd_exp.scene.voxels import Voxels

VIEWPORT = {"width": 640, "height": 300}


def ball(colours: tuple[float, float, float]) -> Voxels:
    """A ball in one colour of the direction, off the middle, before white."""
    field = Voxels(cube(), (24,), background="white")
    filled(field, lambda x: 60.0 * ((x - torch.tensor([0.3, 0.2, 0.0])).norm(dim=1) < 0.4))
    with torch.no_grad():
        field.colour.view(-1, 3, 4)[:, :, 0] = torch.tensor(colours)
        field.colour.view(-1, 3, 4)[:, :, 1] = 4.0
    return field.requires_grad_(False)


def test_a_browsers_camera_is_the_one_that_it_was_put_to():
    film = around(3, 24)
    for i in range(3):
        camera = SimpleNamespace(
            wxyz=SO3.from_matrix(film.pose[i, :, :3].numpy()).wxyz,
            position=film.positions[i].numpy(),
            fov=2 * math.atan(12 / float(film.focal[i, 1])),
            aspect=1.0,
        )
        seen = seen_by(camera, 24)
        for name in ("pose", "focal", "centre"):
            torch.testing.assert_close(getattr(seen, name), getattr(film[[i]], name))
    wide = seen_by(SimpleNamespace(**{**vars(camera), "aspect": 1.5}), 24)
    assert wide.size == (24, 36)
    torch.testing.assert_close(wide.centre, torch.tensor([[18.0, 12.0]]).double())


@pytest.fixture
def viewer():
    fields = {"edit": ball((6.0, -6.0, -6.0)), "source": ball((-6.0, -6.0, 6.0))}
    viewer = Viewer(fields, around(4, 48), port=18080)
    served = threading.Thread(target=viewer.serve)
    served.start()
    yield viewer
    viewer.stop()
    served.join(timeout=10)
    assert not served.is_alive()


def test_source_and_edit_are_seen_from_the_film_in_a_browser(viewer, browser):
    page = browser.new_page(viewport=VIEWPORT)
    page.goto(f"http://127.0.0.1:{viewer.port}")
    page.get_by_role("button", name="source").wait_for()
    for name, frame in (("edit", 0), ("source", 1)):
        page.get_by_role("button", name=name).click()
        page.get_by_role("textbox").first.fill(str(frame))
        page.keyboard.press("Enter")
        wanted = _expected(viewer, name, frame)
        assert _becomes(page, wanted), f"{name}, frame {frame} does not show what its field does"
    page.close()


def _expected(viewer: Viewer, name: str, frame: int) -> np.ndarray:
    film, (height, width) = viewer.film, (VIEWPORT["height"], VIEWPORT["width"])
    camera = SimpleNamespace(
        wxyz=SO3.from_matrix(film.pose[frame, :, :3].numpy()).wxyz,
        position=film.positions[frame].numpy(),
        fov=2 * math.atan(film.size[0] / 2 / float(film.focal[frame, 1])),
        aspect=width / height,
    )
    seen = viewer.fields[name](seen_by(camera, 160)).rgb[0].permute(1, 2, 0).numpy()
    return np.asarray(Image.fromarray((seen * 255).astype("uint8")).resize((width, height))).astype(float)


def _becomes(page, wanted: np.ndarray) -> bool:
    """Whether the middle of the page comes to look as wanted, before long; corners hold the controls."""
    for _ in range(40):
        shown = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(float)
        if np.abs(shown - wanted)[140:, 150:490].mean() < 6:
            return True
        page.wait_for_timeout(250)
    return False
