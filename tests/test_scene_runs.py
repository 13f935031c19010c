"""What a finished run's scene is taken away by: films of other paths, and a mesh."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from plyfile import PlyData
from scenes import write_scene
from test_voxels import cube, filled

import csd_exp
from csd_exp.errors import InputError
from csd_exp.scene import runs
from csd_exp.scene.cameras import focus
from csd_exp.scene.splats import Splats
from csd_exp.scene.voxels import Voxels


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_scene(folder / "scene", 4, 3, 16)
    small = ["modality.reconstruction_steps=6", "modality.field.resolutions=[8]", "modality.field.rays=32"]
    csd_exp.edit(
        *("experiment=scene", "prior=analytic", "prior.window=16", "+prior.prompts.x=[0,1]", "prompt=x"),
        *(f"modality.path={folder}/scene", f"modality.cache={folder}/cache", "modality.trajectory=orbit"),
        *("modality.frames=3", "modality.views=2", "modality.edit_steps=1", "modality.fit_steps=2", *small),
        *("steps=2", "logger=csv", "metrics=none", f"hydra.run.dir={folder}/run"),
    )
    return folder / "run"


def said(monkeypatch, capsys, main, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["csd", *map(str, words)])
    try:
        main()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    return code, *capsys.readouterr()


def frames(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def told(file: Path) -> dict[str, str]:
    with av.open(str(file), options={"export_xmp": "1"}) as container:
        return dict(container.metadata)


def test_a_run_is_rendered_again_without_its_prior(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("csd_exp.build.constructed", None)
    code, out, _ = said(monkeypatch, capsys, runs.render, run, "--to", tmp_path)
    assert (code, out.strip()) == (0, str(tmp_path / "render.mp4"))
    again, before = frames(tmp_path / "render.mp4"), frames(run / "media" / "edited.mp4")
    assert len(again) == len(before) == 3
    for one, other in zip(again, before, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 2
    for name in ("xmp", "comment"):
        assert told(tmp_path / "render.mp4")[name] == told(run / "media" / "edited.mp4")[name] != ""
    wide = ["--frames", 2, "--size", 24, 32, "--elevation", 50, "--closer", 1.5]
    assert said(monkeypatch, capsys, runs.render, run, "--to", tmp_path / "new", *wide)[0] == 0
    assert [frame.shape for frame in frames(tmp_path / "new" / "render.mp4")] == [(24, 32, 3)] * 2
    assert (tmp_path / "new" / "render.gif").is_file()


def test_the_source_is_found_from_another_folder(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(f"{run.parent}/cache", "cache"))
    provenance = json.loads((run / "provenance.json").read_text()) | {"launched_in": str(run.parent)}
    (copy / "provenance.json").write_text(json.dumps(provenance))
    monkeypatch.chdir(tmp_path)
    source, known = runs.opened(copy).source, runs.opened(run).source
    assert source is not None
    assert torch.equal(source.density, known.density)


def test_edited_photographs_say_what_made_them(run):
    kept = sorted((run / "views").iterdir())
    assert len(kept) == 4
    for file in kept:
        with Image.open(file) as image:
            said = json.loads(image.info["Comment"])
        assert (said["prompt"], said["model"], said["step"]) == (
            "x",
            "GaussianMixture",
            int(file.stem[:5]) + 1,
        )
        assert said["digital_source_type"].endswith("compositeWithTrainedAlgorithmicMedia")


def test_another_path_is_as_high_and_as_near_as_it_is_told(run):
    cameras = runs.opened(run).film
    there = runs.flown(cameras, 5, 40.0, 2.0)
    target = focus(cameras)
    up = torch.nn.functional.normalize(-cameras.pose[:, :, 1].mean(0), dim=0)
    away = there.positions - target
    torch.testing.assert_close(
        away.norm(dim=1), (cameras.positions - target).norm(dim=1).median().expand(5) / 2
    )
    risen = torch.rad2deg(torch.asin(away @ up / away.norm(dim=1)))
    torch.testing.assert_close(risen, torch.full((5,), 40.0).double(), atol=0.1, rtol=0)


def test_a_film_from_within_turns_and_comes_no_closer(run):
    cameras = runs.opened(run).film
    outward = cameras.pose.clone()
    outward[:, :, [0, 2]] *= -1
    inside = replace(cameras, pose=outward)
    there = runs.flown(inside, 7, None, 1)
    assert len(there) == 7
    assert (there.forward * (there.positions - there.positions.mean(0))).sum(1).min() > 0
    with pytest.raises(InputError, match="looks at no one point; leave out --elevation and --closer"):
        runs.flown(inside, 7, 20.0, 1)


@pytest.mark.parametrize("kind", ["glb", "ply"])
def test_a_ball_leaves_as_a_mesh_of_its_size_and_colour(tmp_path, kind):
    field = Voxels(cube(half=2.0)._replace(centre=torch.tensor([1.0, 2.0, 3.0]).double()), (64,))
    filled(field, lambda x: 100 * (0.9 - 1.5 * x.norm(dim=1)).clamp(min=0))
    with torch.no_grad():
        field.colour.view(-1, 3, 4)[:, :, 0] = torch.tensor([6.0, 0.0, -6.0])
    field.write(tmp_path / f"ball.{kind}")
    mesh = trimesh.load(tmp_path / f"ball.{kind}", force="mesh", process=False)
    radius = np.linalg.norm(mesh.vertices - [1, 2, 3], axis=1)
    level = -np.log(0.5) * 63 / 3.2  # density at which a cell has half of the light
    wanted = (0.9 - level / 100) / 1.5 * 2
    assert radius.mean() == pytest.approx(wanted, rel=0.02)
    assert radius.std() < 0.02 * wanted
    assert mesh.is_watertight or kind == "ply"
    colours = mesh.visual.vertex_colors[:, :3].mean(0)
    expected = 255 / (1 + np.exp(-0.28209479 * np.array([6.0, 0.0, -6.0])))
    np.testing.assert_allclose(colours, expected, atol=2)


def test_a_run_tells_what_its_field_was(run):
    """The reconstruction in the cache, which the film of the source shows."""
    scene = runs.opened(run)
    field, source, film = scene.field, scene.source, scene.film
    assert source is not None
    before = frames(run / "media" / "source.mp4")[1]
    shown = (source(film[[1]]).rgb[0].permute(1, 2, 0).clamp(0, 1) * 255).detach().numpy()
    assert np.abs(shown - before).mean() < 2
    assert any(not torch.equal(a, b) for a, b in zip(field.parameters(), source.parameters(), strict=True))


def test_splats_leave_as_the_splats_that_they_are(tmp_path):
    """Without a GPU: a file that another library reads, and a state that brings its own reach and number."""
    field = Splats(cube(half=2.0), count=7, harmonics=1)
    again = Splats.of_state(field.state_dict(), "learned")
    assert all(torch.equal(a, b) for a, b in zip(field.parameters(), again.parameters(), strict=True))
    assert (again.bounds.half, again.bounds.near) == (field.bounds.half, field.bounds.near)
    again.write(tmp_path / "a.ply", 0.5)
    read = PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    np.testing.assert_allclose(read["x"], field.splats["means"][:, 0].detach().numpy(), atol=1e-6)
    with pytest.raises(InputError, match=r"a\.glb must end in \.ply"):
        again.write(tmp_path / "a.glb", 0.5)


def test_a_run_leaves_as_a_mesh(run, monkeypatch, capsys, tmp_path):
    code, out, err = said(
        monkeypatch, capsys, runs.export, run, "--to", tmp_path / "a.ply", "--opacity", 0.01
    )
    assert (code == 0 and out.strip().endswith("a.ply")) or "no surface" in err
    for words, what in (
        ([run, "--to", "a.fbx"], "must end in .glb"),
        ([run, "--opacity", "2"], "--opacity must lie between 0 and 1"),
        ([run.parent], "config.yaml"),
    ):
        code, _, err = said(monkeypatch, capsys, runs.export, *words)
        assert code == 2
        assert what in err
        assert len(err.splitlines()) == 1
    code, _, err = said(monkeypatch, capsys, runs.render, run, "--closer", "100")
    assert (code, err) == (2, "csd-render: --closer must lie between 0.1 and 10, not 100.0.\n")
