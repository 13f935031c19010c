"""Tiny runs and images, made on the spot.

Packages that take long are imported where they are needed: the process that hands out tests reads this, too.
"""

import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What is kept for later runs lies in no user's folder; processes that a test starts have it too."""
    before = os.environ.get("CSD_EXP_CACHE")
    os.environ["CSD_EXP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("CSD_EXP_CACHE")
    if before is not None:
        os.environ["CSD_EXP_CACHE"] = before


@pytest.fixture
def write_image(tmp_path):
    """Write random uint8 pixels [height, width, 3] as a PNG and return its path."""

    def write(height: int, width: int, seed: int = 0, name: str | None = None) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path / (name or f"{height}x{width}-{seed}.png")
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that draws WebGL without a GPU."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium or Chrome is installed")
    from playwright.sync_api import sync_playwright

    drawn = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found[0], args=drawn)
        yield opened
        opened.close()


@pytest.fixture
def here(monkeypatch, capsys):
    """`csd` in this process: its exit code, standard output and standard error."""
    from csd_exp import cli

    root, before = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["csd", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    yield run
    root.handlers[:], root.level = before  # Hydra's configuration of logging outlives its job


@pytest.fixture
def refused(monkeypatch, capsys):
    """Give a command what it cannot use: exit code 2 and one line on standard error."""

    def refused(main, command: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"{command}: ")
        assert len(err.splitlines()) == 1

    return refused


@pytest.fixture
def build():
    """A CSD-Edit module with the settings of the public code, any changed by keyword, at its start."""
    import torch

    from csd_exp import methods
    from csd_exp.module import CSDModule
    from csd_exp.schedules import Timesteps
    from csd_exp.svgd import RBF

    def build(prior, particles, **changes) -> CSDModule:
        settings = {
            "residual": methods.dds,
            "kernel": RBF(),
            "timestep": Timesteps(t_min=20, t_max=500),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=2.0),
        }
        module = CSDModule(prior, particles, **settings | changes)
        module.begin()
        return module

    return build


@pytest.fixture
def fit(tmp_path):
    """Fit a module for a number of steps on the CPU and return the trainer."""
    import lightning as L

    def fit(module, steps: int, loader=range(1000), ckpt_path=None, **trainer) -> L.Trainer:
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer = L.Trainer(max_steps=steps, **{"accelerator": "cpu", "devices": 1} | quiet | trainer)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return trainer

    return fit
