"""A scene in the browser by viser: what a visitor's camera sees is rendered here and sent as a picture."""

import math
import threading
from collections.abc import Mapping

import numpy as np
import torch
import viser
from torch import Tensor
from viser.transforms import SO3

from csd_exp.images import to_uint8
from csd_exp.scene.cameras import Cameras
from csd_exp.scene.field import Field

DRAFT = 4  # how much coarser than asked a picture is while its camera moves
STILL = 0.15  # seconds without a move after which it is rendered as asked
PIXELS = (64, 1024, 320)  # of a picture's height: the least, the most, and to begin with


class Viewer:
    """Fields of one scene, one at a time, from wherever each visitor looks.

    fields: by the names of the switch, the first shown at first. film: cameras that the slider goes along;
    the first is where a visitor begins. host, port: where the page is served, or at the next free port.
    """

    def __init__(self, fields: Mapping[str, Field], film: Cameras, host: str = "127.0.0.1", port: int = 8080):
        self.fields, self.film = fields, film
        self.moved = threading.Condition()
        self.waiting: dict[int, viser.ClientHandle] = {}  # whose picture is not what they look at
        self.going = True
        self.server = viser.ViserServer(host=host, port=port, label="csd_exp", verbose=False)
        self.server.scene.set_up_direction(tuple(film.up.tolist()))
        start, ahead = film.positions[0], film.forward[0]
        at = self.server.initial_camera
        at.position, at.look_at, at.fov = start.numpy(), (start + _reach(film) * ahead).numpy(), _angle(film)
        gui = self.server.gui
        self.which = gui.add_button_group("field", list(fields))
        self.frame = gui.add_slider("frame of the film", 0, max(1, len(film) - 1), 1, 0)
        self.height = gui.add_slider("height in pixels", *PIXELS[:2], 16, PIXELS[2])
        self.which.on_click(lambda _: self._all_moved())
        self.height.on_update(lambda _: self._all_moved())
        self.frame.on_update(self._to_frame)
        self.server.on_client_connect(self._follow)
        self.server.on_client_disconnect(self._forget)

    @property
    def port(self) -> int:
        return self.server.get_port()

    def serve(self) -> None:
        """Render for all visitors until `stop`."""
        while True:
            with self.moved:
                self.moved.wait_for(lambda: self.waiting or not self.going)
                if not self.going:
                    return
                visitors, self.waiting = list(self.waiting.values()), {}
            for visitor in visitors:
                self._show(visitor, DRAFT)
            with self.moved:
                if self.moved.wait_for(lambda: self.waiting or not self.going, STILL):
                    for visitor in visitors:
                        self.waiting.setdefault(visitor.client_id, visitor)
                    continue
            for visitor in visitors:
                self._show(visitor, 1)

    def stop(self) -> None:
        """End `serve`, and the page."""
        with self.moved:
            self.going = False
            self.moved.notify_all()
        self.server.stop()

    def _follow(self, client: viser.ClientHandle) -> None:
        client.camera.on_update(lambda _: self._has_moved(client))

    def _forget(self, client: viser.ClientHandle) -> None:
        with self.moved:
            self.waiting.pop(client.client_id, None)

    def _has_moved(self, client: viser.ClientHandle) -> None:
        with self.moved:
            self.waiting[client.client_id] = client
            self.moved.notify_all()

    def _all_moved(self) -> None:
        for client in self.server.get_clients().values():
            self._has_moved(client)

    def _to_frame(self, event: viser.GuiEvent) -> None:
        """Whoever has moved the slider sees what the film shows."""
        frame = min(self.frame.value, len(self.film) - 1)
        for client in [event.client] if event.client else self.server.get_clients().values():
            with client.atomic():
                client.camera.position = self.film.positions[frame].numpy()
                client.camera.wxyz = SO3.from_matrix(self.film.pose[frame, :, :3].numpy()).wxyz

    def _show(self, client: viser.ClientHandle, coarser: int) -> None:
        camera = seen_by(client.camera, max(PIXELS[0] // DRAFT, self.height.value // coarser))
        if client.client_id not in self.server.get_clients():
            return  # who has left is still waited for
        with torch.no_grad():
            rgb = self.fields[self.which.value](camera).rgb[0].clamp(0, 1).cpu()
        client.scene.set_background_image(to_uint8(rgb), jpeg_quality=90)


def seen_by(camera: viser.CameraHandle, height: int) -> Cameras:
    """A browser's camera at a height in pixels."""
    width = max(1, round(height * camera.aspect))
    turn = torch.from_numpy(SO3(np.asarray(camera.wxyz)).as_matrix())
    pose = torch.cat([turn, torch.from_numpy(np.asarray(camera.position))[:, None]], 1)[None].double()
    focal = torch.full((1, 2), height / 2 / math.tan(camera.fov / 2), dtype=torch.float64)
    return Cameras(pose, focal, torch.tensor([[width / 2, height / 2]]).double(), (height, width))


def _angle(film: Cameras) -> float:
    """The vertical field of view of a film, in radians."""
    return 2 * math.atan(film.size[0] / 2 / float(film.focal[0, 1]))


def _reach(film: Cameras) -> Tensor:
    """How far in front of a film's cameras the middle of all of them is, at least a little."""
    return (film.positions - film.positions.mean(0)).norm(dim=1).mean().clamp(min=1e-3)
