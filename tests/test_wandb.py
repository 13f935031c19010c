"""W&B: the environment decides, and what cannot log says so before there is a folder."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

import csd_exp
from csd_exp.errors import InputError
from csd_exp.loggers import Wandb

KEY = "0123456789" * 4


class Server(BaseHTTPRequestHandler):
    """Knows one account, as W&B's server does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        authorization = b"Basic " + base64.b64encode(f"api:{KEY}".encode())
        known = self.headers["Authorization"] == authorization.decode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"viewer": {"id": "x"} if known else None}}).encode())

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path: Path) -> Iterator[None]:
    """A server of W&B's kind on this machine, and nothing that the user has set."""
    with HTTPServer(("127.0.0.1", 0), Server) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{serving.server_port}")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("no_proxy", "*")
        wandb.teardown()
        yield
        serving.shutdown()
        wandb.teardown()


def test_only_a_key_that_the_server_knows_is_accepted(server, monkeypatch, tmp_path: Path) -> None:
    logger = Wandb(tmp_path, mode="online")
    with pytest.raises(InputError, match="has no API key for http"):
        logger.check()
    monkeypatch.setenv("WANDB_API_KEY", "9" * 40)
    with pytest.raises(InputError, match="does not know the API key"):
        logger.check()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger.check()
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    logger.check()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environment_decides(server, monkeypatch, tmp_path: Path, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = Wandb(tmp_path, mode="online")
    logger.check()
    assert logger.mode == mode


def test_disabled_writes_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("picture.png")
    run = csd_exp.edit(
        *(
            "experiment=panorama",
            "prior=analytic",
            "prior.window=16",
            "prompt=x",
            "modality.path=picture.png",
        ),
        *("prompt=x", "steps=1", "metrics=none", "logger=wandb_online", "hydra.run.dir=run"),
    ).run_dir
    assert not [file.name for file in [*run.iterdir(), *tmp_path.iterdir()] if "wandb" in file.name]
