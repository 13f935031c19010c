"""The worked examples of docs/extending.md, as they are written there, in a package of somebody's own."""

import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

import csd_exp

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FILE = re.compile(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """The files of the page, and a picture."""
    folder = tmp_path_factory.mktemp("lab")
    for name, content in FILE.findall(PAGE.read_text()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "my_lab/__init__.py").touch()
    pixels = torch.rand(40, 52, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    Image.fromarray(pixels.numpy()).save(folder / "my.png")
    return folder


@pytest.fixture
def run(lab, monkeypatch, tmp_path):
    """Run csd with the package, from its folder."""
    monkeypatch.chdir(lab)
    monkeypatch.syspath_prepend(lab)

    number = count()

    def run(*overrides: str, **values):
        own = ["hydra.searchpath=[file://conf]", f"hydra.run.dir={tmp_path / 'out'}{next(number)}"]
        exact = ["prior=analytic", "prior.window=16", "+prior.prompts.x=[0,1]"]
        common = ["experiment=panorama", *exact, "steps=4", "logger=csv", "metrics=none"]
        common += ["callbacks.metrics.every_n_steps=0"]
        given = [o for o in common if o.split("=")[0] not in {o.split("=")[0] for o in overrides}]
        given = [o for o in given if not (o.lstrip("+").startswith("prior.") and "prior=grey" in overrides)]
        path = {"modality.path": "my.png", "prompt": "x"}
        return csd_exp.edit(*own, *given, *overrides, allow=["my_lab"], **path | values)

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_the_page_has_five_parts_of_one_file_and_one_configuration_each(lab):
    written = sorted(str(f.relative_to(lab)) for f in lab.rglob("*") if f.suffix in (".py", ".yaml"))
    kinds = {"residuals": "method", "kernels": "kernel", "modalities": "modality", "priors": "prior"}
    for module, group in (kinds | {"metrics": "metrics"}).items():
        assert f"my_lab/{module}.py" in written
        assert sum(name.startswith(f"conf/{group}/") for name in written) == 1


def test_the_residual(run):
    away = []
    for pull in (1.0, 0.0):
        result = run("method=anchored", f"method.residual.pull={pull}", "optimizer.lr=0.5", "steps=20")
        away.append(float((result.images[0] - _source()).abs().mean()))
    assert away[0] < 0.8 * away[1]


def test_the_kernel(run):
    from csd_exp.svgd import RBF

    wide = ["modality.stride=8", "modality.batch=null"]
    result = run("kernel=rational_quadratic", *wide, "metrics=default")
    assert result.metrics["ssim"] < 1
    from my_lab.kernels import RationalQuadratic

    phi = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near_rbf = RationalQuadratic(a=1e8)(phi)
    for ours, exact in zip(near_rbf, RBF()(phi), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


def test_the_modality_descends_through_the_grade(run):
    result = run("experiment=none", "modality=grade", "steps=60", "method=csd", "optimizer.lr=0.0002")
    before, after = _source().mean((1, 2)), result.images[0].mean((1, 2))
    towards = (torch.tensor([0.7, 0.3, -0.5]) + 1) / 2
    assert (after - towards).norm() < 0.8 * (before - towards).norm()
    state = torch.load(result.run_dir / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == ["particles.matrix", "particles.shift"]


def test_the_prior(run):
    result = run("prior=grey", "method=csd", "steps=40", "optimizer.lr=0.5", "kernel=none")
    assert result.images[0].std() < 0.6 * _source().std()


def test_the_metric(run):
    result = run("metrics=brightness")
    assert 0 < result.metrics["brightness"] < 1
    assert "luma of a pixel" in (result.run_dir / "metrics.json").read_text()


def _source() -> torch.Tensor:
    from csd_exp.images import read_image

    return read_image("my.png")
