"""The command line as a user meets it, and the same run from Python."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from scenes import write_scene

import csd_exp
from csd_exp import cli
from csd_exp.config import composed, conf_dir, quoted
from csd_exp.errors import InputError
from csd_exp.evaluate import evaluate

SIZE = (53, 37)  # width and height, no multiple of anything


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [
    "experiment=panorama",
    *("prior=analytic", "prior.window=16", "prior.guidance_scale=4", "+prior.prompts.warm=[0,1]"),
    *("modality.path=picture.png", "prompt=warm", "steps=6", "logger=csv", "kernel.normalize=rowsum"),
]


def csd(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT")} | environment
    return subprocess.run(
        [sys.executable, "-m", "csd_exp", *args], capture_output=True, text=True, env=env, timeout=300
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_dir(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("run directory: ")
    return Path(last.removeprefix("run directory: "))


def latent(folder: Path) -> torch.Tensor:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_run_leaves_everything_and_python_gives_the_same(folder: Path) -> None:
    done = csd(*RUN)
    left = run_dir(done)
    for name in ("config.yaml", "command.txt", "provenance.json", "metrics.csv", "metrics.json", "last.ckpt"):
        assert (left / name).is_file(), name
    assert (left / "report.html").stat().st_size > 10_000
    assert not list(left.rglob("*.part"))
    edited, source = pixels(left / "media/edited.png"), pixels(left / "media/source.png")
    assert edited.shape == (SIZE[1], SIZE[0], 3)
    np.testing.assert_array_equal(source, pixels(folder / "picture.png"))
    assert np.abs(edited.astype(int) - source).mean() > 5
    assert len((left / "metrics.csv").read_text().splitlines()) == 1 + 6
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr

    changed = {"modality.path": "picture.png", "kernel.normalize": "rowsum", "callbacks": "none"}
    result = csd_exp.edit(*RUN[:5], prompt="warm", steps=6, logger="csv", **changed)
    saved = torch.from_numpy(edited.copy()).permute(2, 0, 1)
    assert torch.equal((result.images[0] * 255).round().byte(), saved)
    recorded = json.loads((left / "metrics.json").read_text())
    assert recorded["psnr_outside"]["value"] is None  # without a mask
    values = {name: entry["value"] for name, entry in recorded.items()}
    assert result.metrics == {name: value for name, value in values.items() if value is not None}
    assert result.run_dir != left
    assert (result.run_dir / "report.html").is_file()


def test_a_mistake_is_one_line_exit_code_2_and_no_folder(folder: Path) -> None:
    done = csd(*RUN, "kernel.bandwith=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("csd: kernel.bandwith")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png"]


def test_a_mistake_that_only_the_run_can_see_leaves_no_folder_either(folder: Path, here) -> None:
    code, _, err = here(*RUN, "modality.stride=17")
    assert code == 2
    assert err.startswith("csd: modality.stride")
    assert len(err.splitlines()) == 1
    assert files(folder) == ["picture.png"]


MISTAKES = {
    "help": ["--help"],
    "choice": ["experiment=panoramaa"],
    "group": ["kernle=rbf"],
    "key": ["promt=x"],
    "nested key": ["kernel.bandwith=2"],
    "chosen twice": ["kernel=rbf", "kernel=imq"],
    "quoting": ["prompt=a, b"],
    "no prompt": ["prompt="],
    "no path": ["experiment=panorama", "prompt=x"],
    "type": ["steps=many"],
    "name": ["name='a b'"],
    "steps": ["steps=0"],
    "seed": ["seed=-1"],
    "precision": ["trainer.precision=16-mixed"],
    "class": ["kernel._target_=os.system"],
    "package": ["allow=mine"],
    "flag": ["--foo"],
    "folder": ["hydra.run.dir=."],
    "nothing to continue": ["ckpt_path=last"],
    "sweep": ["-m", "seed=0,1", "hydra.sweep.subdir=same"],
    "sweep of a mistake": ["-m", "steps=0,1"],
    "mode": ["hydra.mode=MULTIRUN"],
}


def test_help_and_what_composition_refuses_cost_no_import_of_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom csd_exp.cli import main\n"
        f"for args in {list(MISTAKES.values())!r}:\n"
        "    sys.argv = ['csd', *args]\n"
        "    try: main()\n"
        "    except SystemExit as e: print('exit', e.code)\n"
        "slow = 'torch', 'lightning', 'diffusers', 'torchmetrics', 'csd_exp.run'\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert [line for line in lines if line.startswith("exit")] == [
        "exit 0",
        *["exit 2"] * (len(MISTAKES) - 1),
    ]
    said = done.stderr.splitlines()
    assert len(said) == len(MISTAKES) - 1
    assert all(sentence.startswith("csd: ") for sentence in said)
    for word in ("bandwidth", "csd --help", "16-mixed", "allow=[my_package]", "chosen twice"):
        assert word in done.stderr
    assert files(folder) == ["picture.png"]


@pytest.mark.parametrize("window", [0, -8])
def test_a_window_of_no_size_is_refused(folder: Path, window: int) -> None:
    with pytest.raises(InputError, match=rf"modality\.window must be a positive multiple .* not {window}\."):
        csd_exp.edit(*RUN, f"modality.window={window}")
    assert sorted(p.name for p in folder.iterdir()) == ["picture.png"]


def test_stopped_lengthened_and_resumed_gives_the_same_bits(folder: Path) -> None:
    bare = [*RUN, "metrics=none", "callbacks.metrics.every_n_steps=0"]
    whole = csd_exp.edit(*bare, name="whole").run_dir
    csd_exp.edit(*bare, name="halves", **{"trainer.max_steps": 3})
    csd_exp.edit(*bare, name="longer", steps=3)
    for name in ("halves", "longer"):
        resumed = csd_exp.edit(*bare, name=name, ckpt_path="last").run_dir
        assert [p.parent for p in folder.glob(f"outputs/{name}/*/last.ckpt")] == [folder / resumed]
        assert torch.equal(latent(whole), latent(resumed))
        np.testing.assert_array_equal(
            pixels(whole / "media/edited.png"), pixels(resumed / "media/edited.png")
        )
        assert len((resumed / "metrics.csv").read_text().splitlines()) == 1 + 6

    for change, reason in {
        "seed=3": "had seed=0, not 3",
        "steps=5": "had steps=6, not 5",
        "+trainer.gradient_clip_val=1.0": "trainer.gradient_clip_val=None, not 1.0",
    }.items():
        with pytest.raises(InputError, match=reason):
            cli.csd([*RUN, "name=halves", "ckpt_path=last", change])
    Image.new("RGB", SIZE).save(folder / "picture.png")
    with pytest.raises(InputError, match=r"another content of modality\.path=picture\.png"):
        cli.csd([*RUN, "name=halves", "ckpt_path=last"])


KERNEL = """
from csd_exp.svgd import RBF

class Mine(RBF):
    def forward_of_mine(self): ...
"""


@pytest.mark.soak
def test_two_processes_give_the_result_of_one_also_in_a_multirun(folder: Path) -> None:
    """With a kernel of the user's own, which all processes find."""
    (folder / "my_kernels.py").write_text(KERNEL)
    own = [*RUN, "allow=[my_kernels]", "kernel._target_=my_kernels.Mine"]
    done = csd("-m", *own, "seed=0,1", "trainer=ddp", "trainer.accelerator=cpu", "hydra.sweep.dir=two")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {"picture.png", "my_kernels.py", "two"}
    for seed in (0, 1):
        one = csd_exp.edit(*RUN, seed=seed).run_dir
        a, b = latent(one), latent(folder / f"two/{seed}")
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
    assert not torch.equal(latent(folder / "two/0"), latent(folder / "two/1"))


class TestFolders:
    """What was there stays, and two runs never share a folder."""

    def test_a_refused_sweep_removes_what_it_has_made_and_nothing_else(self, folder: Path, here) -> None:
        (folder / "mine").mkdir()
        (folder / "mine/results.txt").write_text("years of work")
        before = files(folder)
        wrong = ["-m", *RUN, "modality.stride=17,18"]  # which only the run sees
        code, out, err = here(*wrong, "hydra.sweep.dir=mine")
        assert (code, err.count("modality.stride must lie")) == (2, 2), out + err
        left = ["mine/multirun.yaml"]  # Hydra's record, in a folder that was there
        assert files(folder) == sorted([*before, *left])
        (folder / "mine/multirun.yaml").unlink()
        assert here(*wrong, "hydra.sweep.dir=new/one")[0] == 2
        assert here(*wrong)[0] == 2
        assert files(folder) == before

    def test_the_folders_of_jobs_are_checked_like_those_of_runs(self, folder: Path) -> None:
        (folder / "X/mine").mkdir(parents=True)
        (folder / "X/mine/results.txt").write_text("years of work")
        sweep = ["-m", *RUN, "hydra.sweep.dir=X"]
        for jobs, reason in {
            ("seed=0", "hydra.sweep.subdir=mine", "modality.stride=17"): "subdir name X/mine, which exists",
            ("seed=0,1", "hydra.sweep.subdir=same"): "gives two jobs the folder X/same; name it",
            ("name=a,a/b", "hydra.sweep.subdir=${name}"): "name=a/b",
            ("seed=0,1", "ckpt_path=last"): "leave out ckpt_path",
            ("seed=0,1", "modality.window=8,wide"): "modality.window=wide",
        }.items():
            with pytest.raises(InputError, match=reason):
                cli.csd([*sweep, *jobs])
        (folder / "X/multirun.yaml").write_text("")
        with pytest.raises(InputError, match=r"hydra\.sweep\.dir=X holds a multirun already"):
            cli.csd([*sweep, "seed=0,1"])
        assert files(folder / "X") == ["mine", "mine/results.txt", "multirun.yaml"]


def test_an_existing_folder_is_refused(folder: Path) -> None:
    (folder / "mine").mkdir()
    with pytest.raises(InputError, match=r"hydra\.run\.dir=mine exists already"):
        cli.csd([*RUN, "hydra.run.dir=mine"])


def test_nothing_to_continue_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="ckpt_path=last finds no"):
        cli.csd([*RUN, "ckpt_path=last"])
    with pytest.raises(InputError, match=r"ckpt_path=gone\.ckpt is no file"):
        cli.csd([*RUN, "ckpt_path=gone.ckpt"])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["prompt=turn it into a painting, at night"], "turn it into a painting, at night"),
        (["prompt=what if he weren't sad"], "what if he weren't sad"),
        (["prompt=turn", "it", "into", "a", "painting"], "turn it into a painting"),
        (['prompt="turn it into', 'a painting"'], "turn it into a painting"),
        (["prompt=make it (bright"], "make it (bright"),
        (["prompt=a=b, c"], "a=b, c"),
    ],
)
def test_an_unquoted_prompt_is_answered_with_the_corrected_command(
    folder: Path, words: list[str], meant: str
) -> None:
    with pytest.raises(InputError) as e:
        cli.csd(["prior=analytic", *words, "seed=1"])
    message = str(e.value)
    assert "\n" not in message
    command = shlex.split(message[message.index("csd ") :])
    assert command[0] == "csd"
    config = composed(command[1:])
    assert (config.prompt, config.seed) == (meant, 1)


def test_a_word_that_is_no_override_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="'seed'"):
        cli.csd([*RUN, "seed"])


def test_help_is_readable(folder: Path) -> None:
    done = csd("--help")
    assert done.returncode == 0
    assert "csd experiment=demo" in done.stdout
    for group in ("kernel: imq, none, perceptual, rbf, uniform", "experiment: controlnet, demo"):
        assert group in done.stdout
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_takes_a_step(folder: Path, experiment: str) -> None:
    size = {"generate": (16, 16), "scene": (16, 16), "text_to_3d": (16, 16)}.get(experiment, SIZE)
    write_scene(folder / "scene", 4, 2, 16)
    small = ["modality.reconstruction_steps=2", "modality.field.resolutions=[8]", "modality.field.rays=16"]
    own = {
        "generate": [],
        "mask": ["modality.path=picture.png", "modality.mask=[0,0,1,0.5]"],
        "scene": ["modality.path=scene", *small],
        "text_to_3d": ["modality.field.resolutions=[8]", "modality.frames=2", "modality.directions=null"],
    }
    result = csd_exp.edit(
        f"experiment={experiment}",
        f"prior={'analytic_clips' if experiment.startswith('video_') else 'analytic'}",
        *("prior.window=16", "prompt=x", "trainer.fast_dev_run=true"),
        *own.get(experiment, ["modality.path=picture.png"]),
    )
    assert result.images[0].shape == (3, size[1], size[0])
    measured = set() if experiment in ("generate", "text_to_3d") else {"structure_similarity", "ssim"}
    assert set(result.metrics) >= measured


def test_a_run_that_diverges_says_where(folder: Path, here) -> None:
    code, _, err = here(*RUN, "optimizer.lr=1e38", "steps=8", "kernel=none")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("csd: The residual is not finite at step ")
    assert "timestep" in last
    assert "checkpoint" in last
    assert list(folder.glob("outputs/*/*/config.yaml"))


class TestYourOwn:
    """Classes and configurations of the user's own."""

    @pytest.fixture(autouse=True)
    def package(self, folder: Path, monkeypatch) -> Path:
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
        (folder / "mine_alone.py").write_text(
            KERNEL
            + "from csd_exp.metrics import MeanMetric\n"
            + "class Redness(MeanMetric):\n"
            + "    'How red it is.'\n    higher_is_better = None\n"
            + "    def update(self, edited): self.observe(edited[0].mean())\n"
        )
        yield folder
        sys.modules.pop("mine_alone", None)

    OWN = ("kernel._target_=mine_alone.Mine", "+metrics.red={_target_: mine_alone.Redness}")

    def test_are_named_on_the_command_line(self, folder: Path, here) -> None:
        code, out, err = here(*RUN, "allow=[mine_alone]", *self.OWN)
        assert code == 0, err
        left = folder / out.splitlines()[-1].removeprefix("run directory: ")
        assert json.loads((left / "metrics.json").read_text())["red"]["value"] > 0
        assert "allow=[mine_alone]" in (left / "command.txt").read_text()
        plain = csd_exp.edit(*RUN)
        assert torch.equal(latent(plain.run_dir), latent(left))

        again = evaluate(left, ["allow=[mine_alone]"])
        assert again["red"]["value"] == json.loads((left / "metrics.json").read_text())["red"]["value"]
        with pytest.raises(InputError, match=r"metrics\.red\._target_=mine_alone\.Redness is not accepted"):
            evaluate(left)
        with pytest.raises(InputError, match="mine_alone"):
            csd_exp.edit(*RUN, *self.OWN, ckpt_path=str(left / "last.ckpt"))
        csd_exp.edit(*RUN, *self.OWN, ckpt_path=str(left / "last.ckpt"), allow=["mine_alone"])

    def test_are_not_named_by_anything_else(self, folder: Path) -> None:
        for own in self.OWN:
            with pytest.raises(
                InputError, match=r"is not accepted: .* allow=\[PACKAGE\] on the command line"
            ):
                cli.csd([*RUN, own])
        with pytest.raises(InputError, match=r"mine_alone\.gone does not exist"):
            cli.csd([*RUN, "allow=[mine_alone]", "kernel._target_=mine_alone.gone"])
        (folder / "broken_alone.py").write_text("1 / 0")
        with pytest.raises(InputError, match="cannot be imported"):
            cli.csd([*RUN, "allow=[broken_alone]", "kernel._target_=broken_alone.Kernel"])

    @pytest.mark.parametrize("place", ["experiment", "preset"])
    def test_a_file_that_allows_them_is_refused(self, folder: Path, place: str) -> None:
        (folder / f"conf/{place}").mkdir(parents=True)
        (folder / f"conf/{place}/theirs.yaml").write_text("# @package _global_\nallow: [mine_alone]\n")
        given = [*RUN, f"{place}=theirs", "--config-dir", "conf"]
        given.remove("experiment=panorama") if place == "experiment" else None
        for also in ([], ["allow=[mine_alone]"], ["allow=[]"], ["allow=[another]"]):
            with pytest.raises(InputError, match="allow may be given on the command line alone"):
                cli.csd([*given, *also])
        search = "# @package _global_\nhydra: {sweeper: {params: {allow: '[mine_alone]'}}}\n"
        (folder / f"conf/{place}/theirs.yaml").write_text(search)
        with pytest.raises(InputError, match=r"hydra\.sweeper\.params sets allow"):
            cli.csd(["-m", *given])
        with pytest.raises(InputError, match="must list packages"):
            cli.csd([*RUN, "allow=${tags}"])

    def test_a_configuration_of_ones_own_is_checked_and_run_as_it_is(self, folder: Path, here) -> None:
        (folder / "conf/experiment").mkdir(parents=True)
        mine = folder / "conf/experiment/mine.yaml"
        mine.write_text("# @package _global_\ndefaults: [panorama]\nname: mine\nkernel: {scale: 2}\n")
        own = [override for override in RUN if not override.startswith("experiment")]
        code, out, err = here("--config-dir", "conf", *own, "experiment=mine")
        assert code == 0, err
        left = folder / out.splitlines()[-1].removeprefix("run directory: ")
        assert OmegaConf.load(left / "config.yaml").kernel.scale == 2
        words = shlex.split((left / "command.txt").read_text())
        assert composed(words[1:]).kernel.scale == 2  # it says where the configuration was found
        mine.write_text(mine.read_text().replace("scale", "scael"))
        code, _, err = here("--config-dir", "conf", *own, "experiment=mine")
        assert (code, err.startswith("csd: kernel.scael")) == (2, True)


class TestFromPython:
    PROMPT = 'what if it\'s "a, b", ${prompt} and \\${seed}, [x] = {y}?\\'

    def test_text_lists_and_dictionaries_arrive_as_they_are(self, folder: Path) -> None:
        regions = [
            {"prompt": self.PROMPT, "box": (0, 0, 0.5, 1)},
            {"prompt": "it's \"a\\", "mask": folder / "sky, 'at' night.png"},
        ]
        Image.new("L", SIZE, "white").save(regions[1]["mask"])
        values = {"modality.regions": regions, "+prior.prompts": {"a, b": [1, 0]}, "steps": 2}
        result = csd_exp.edit(
            *RUN[:4], "modality.path=picture.png", prompt=self.PROMPT, tags=["${x}"], **values
        )
        saved = OmegaConf.load(result.run_dir / "config.yaml")
        kept = OmegaConf.to_container(saved, resolve=True)
        assert kept["prompt"] == self.PROMPT
        assert kept["tags"] == ["${x}"]
        assert kept["modality"]["prompt"] == self.PROMPT
        assert [region["prompt"] for region in kept["modality"]["regions"]] == [self.PROMPT, "it's \"a\\"]
        assert kept["modality"]["regions"][0]["box"] == [0, 0, 0.5, 1]
        assert kept["prior"]["prompts"] == {"a, b": [1, 0]}
        known = json.loads((result.run_dir / "media/pictures.json").read_text())
        assert [facts["prompt"] for facts in known["pictures"]] == [self.PROMPT]
        command = shlex.split((result.run_dir / "command.txt").read_text())
        assert composed(command[1:]).modality.regions[0].prompt == self.PROMPT

    def test_a_prompt_file_is_text_too(self, folder: Path) -> None:
        (folder / "prompt.txt").write_text(self.PROMPT)
        result = csd_exp.edit(*RUN[:4], "modality.path=picture.png", prompt_file="prompt.txt", steps=1)
        known = json.loads((result.run_dir / "media/pictures.json").read_text())
        assert [facts["prompt"] for facts in known["pictures"]] == [self.PROMPT]

    @pytest.mark.parametrize("value", [object(), b"x", {"it's": 1}, {1.5: 2, "null": 3}, [{"a": {1}}]])
    def test_what_the_grammar_cannot_carry_is_refused(self, value) -> None:
        with pytest.raises(InputError, match="accepted are"):
            csd_exp.edit("prior=analytic", prompt=value)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.from_regex(r"[a-z_]\w{0,5}( \w+)?", fullmatch=True).filter(str.isascii), inner
                )
            ),
            max_leaves=8,
        )
    )
    @settings(deadline=None, max_examples=150)
    def test_quoted_is_the_inverse_of_what_hydra_reads(self, value) -> None:
        assume("null" not in repr(value))
        read = OverridesParser.create().parse_override(f"key={quoted(value)}").value()
        assert OmegaConf.to_container(OmegaConf.create({"key": read}), resolve=True) == {"key": value}


def test_a_program_that_has_a_hydra_of_its_own_keeps_it(folder: Path, monkeypatch) -> None:
    seen = []

    @hydra.main(version_base="1.2", config_path=str(folder))
    def app(config) -> None:
        before = (GlobalHydra.instance(), GlobalHydra.instance().hydra, version.getbase())
        result = csd_exp.edit(*RUN, steps=1)
        with pytest.raises(InputError):
            csd_exp.edit(*RUN, "kernel.bandwith=1")
        after = (GlobalHydra.instance(), GlobalHydra.instance().hydra, version.getbase())
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert HydraConfig.get().job.name == JobRuntime.instance().get("name") == "test_cli"
        assert compose(overrides=["+mine=2"]) == {"mine": 2}
        seen.append(result)

    monkeypatch.setattr(sys, "argv", ["app", "hydra.run.dir=theirs", "hydra/job_logging=none"])
    app()
    assert len(seen) == 1
    assert not GlobalHydra.instance().is_initialized()
