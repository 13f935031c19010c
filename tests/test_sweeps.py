"""Multiruns: what finished is not run again, launchers, searches, and the studies in sweeps/."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from slurm import slurm

import csd_exp
from csd_exp import cli, identity
from csd_exp.build import constructed
from csd_exp.config import check_values, composed, conf_dir
from csd_exp.errors import InputError
from csd_exp.figures.runs import run_in
from csd_exp.saved import FAILED, runs_below
from csd_exp.svgd import NoKernel

RUN = [
    *("experiment=panorama", "prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "prompt=warm"),
    *(
        "modality.path=picture.png",
        "logger=csv",
        "metrics=none",
        "callbacks.metrics.every_n_steps=0",
        "steps=2",
    ),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


class TestFinished:
    def test_the_same_command_makes_again_what_failed_alone(self, folder: Path, capsys) -> None:
        sweep = ["-m", *RUN, "skip_finished=true"]
        with pytest.raises(InputError, match="1 of 2 jobs failed"):
            cli.csd([*sweep, "optimizer.lr=1e38,1"])
        before = contents(folder)
        with pytest.raises(InputError, match="1 of 1 jobs failed"):
            cli.csd([*sweep, "optimizer.lr=1e38,1"])
        after = contents(folder)
        assert before.items() <= after.items()
        runs = [run_in(run) for run in runs_below(folder)]
        assert [(run.folder.name, run.settings["optimizer.lr"], run.failed is None) for run in runs] == [
            *(("0", 1e38, False), ("1", 1, True), ("0", 1e38, False)),
        ]
        capsys.readouterr()
        cli.csd([*sweep, "optimizer.lr=1"])  # of which there is nothing left to do
        assert contents(folder) == after
        assert capsys.readouterr().out.startswith("finished before, in outputs/panorama/multirun_")

    @pytest.mark.parametrize(
        ("where", "there", "then"),
        [
            ("mine", ["mine", "mine_2", "mine_4"], "mine_3"),
            ("a/${now:%H-%M}/${name}", ["a/08-15/panorama", "a/09-30/panorama"], None),
            ("'a [b]/${name}_${now:%f}'", ["a [b]/panorama_01"], None),
        ],
    )
    def test_earlier_folders_differ_in_their_time_alone(self, folder: Path, where, there, then) -> None:
        for made in [*there, "a/08-15/other", "mine_b", "a b/panorama_01"]:
            (folder / made).mkdir(parents=True)
        earlier, again = cli._earlier(composed([*RUN, f"hydra.sweep.dir={where}"]))
        assert [str(found) for found in earlier] == [made for made in there if made != "mine_4"]
        assert again == ([f'hydra.sweep.dir="{then}"'] if then else [])

    def test_what_touches_what_a_run_says_is_made_again(self, folder: Path) -> None:
        """Other settings, other metrics, another picture in the file, a run that did not come to its end."""
        run = csd_exp.edit(*RUN).run_dir

        def skipped(*more: str) -> bool:
            config = cli._job_config([*RUN, *more], 0, "run")
            return identity.asked(config, identity.inputs(config)) in identity.finished([run])

        assert skipped()
        assert skipped("trainer.log_every_n_steps=7", "prior.row_chunk=3")
        assert not skipped("seed=1")
        assert not skipped("kernel=none")
        assert not skipped("+metrics.ssim={_target_: csd_exp.metrics.SSIM}")
        (run / FAILED).touch()
        assert not skipped()
        (run / FAILED).unlink()
        os.utime(run / "config.yaml")  # lengthened, and stopped without a word
        assert not skipped()
        os.utime(run / "metrics.json")
        assert skipped()
        Image.new("RGB", (24, 16)).save("picture.png")
        assert not skipped()

    def test_weights_that_are_younger_are_others(self, folder: Path) -> None:
        weights = folder / "weights/unet/model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        run = folder / "run"
        run.mkdir()
        OmegaConf.save({"prior": {"path": str(folder / "weights")}}, run / "config.yaml")
        (run / "metrics.json").touch()
        assert list(identity.finished([run]).values()) == [run]
        later = time.time() + 10
        os.utime(weights, (later, later))
        assert identity.finished([run]) == {}

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ([*RUN, "skip_finished=true"], "skip_finished=true is of multiruns, csd -m;"),
            (["-m", *RUN, "skip_finished=maybe"], "skip_finished must be true or false"),
        ],
    )
    def test_where_it_has_no_sense(self, folder: Path, command, said) -> None:
        with pytest.raises(InputError, match=said):
            cli.csd(command)
        assert [path.name for path in folder.iterdir()] == ["picture.png"]


PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit": "hydra_submitit_launcher",
    "slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}


def needs(plugin: str) -> None:
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")


def csd(*args: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", "csd_exp", *args],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def latent(run: Path) -> torch.Tensor:
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]["particles.latent"]


@pytest.mark.parametrize("launcher", sorted(PLUGINS))
def test_every_launcher_runs_the_jobs_and_tells_which_failed(folder: Path, launcher: str) -> None:
    """Slurm's own commands are those of tests/slurm.py."""
    needs(PLUGINS[launcher])
    environment = slurm(folder / "bin") if launcher == "slurm" else {}
    sweep = [*RUN, f"launcher={launcher}", "optimizer.lr=1,1e38", "hydra.sweep.dir=sweep"]
    done = csd("-m", *sweep, **environment)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "jobs failed" in line or "sweep/1: " in line]
    assert said[0] == "csd: 1 of 2 jobs failed:"
    assert said[1].startswith("  sweep/1: The residual is not finite at step 1, timestep ")
    assert run_in(Path("sweep/0")).failed is None
    assert torch.equal(latent(Path("sweep/0")), latent(csd_exp.edit(*RUN, "optimizer.lr=1").run_dir))


# A callback that ends its process in the first step, as the system does where memory is short.
DYING = """
import os
from lightning import Callback

class Dying(Callback):
    def on_train_batch_end(self, *_):
        os._exit(9)
"""


@pytest.mark.soak
@pytest.mark.parametrize("launcher", sorted(PLUGINS))
def test_jobs_that_a_launcher_loses_have_failed(folder: Path, launcher: str) -> None:
    needs(PLUGINS[launcher])
    environment = slurm(folder / "bin") if launcher == "slurm" else {}
    (folder / "dying.py").write_text(DYING)
    dying = ["allow=[dying]", "+callbacks.dying._target_=dying.Dying"]
    sweep = [*RUN, *dying, f"launcher={launcher}", "seed=1,2", "hydra.sweep.dir=sweep"]
    done = csd("-m", *sweep, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "jobs failed" in line or "sweep/" in line]
    why = "no metrics.json: stopped without a word, or still running"
    assert said == ["csd: 2 of 2 jobs failed:", *(f"  sweep/{number}: {why}" for number in range(2))]


def test_what_a_launcher_raises_itself_ends_no_sweep_and_a_bug_does() -> None:
    lost = type("TerminatedWorkerError", (RuntimeError,), {"__module__": "joblib.externals.loky"})
    with cli._outliving(searches=False):
        raise lost
    said = r"has ended without a word \(TerminatedWorkerError\)"
    with pytest.raises(InputError, match=said), cli._outliving(searches=True):
        raise lost
    with pytest.raises(ZeroDivisionError), cli._outliving(searches=False):
        raise ZeroDivisionError


@pytest.mark.parametrize("file", sorted(file.stem for file in (conf_dir() / "launcher").glob("*.yaml")))
def test_every_launcher_composes_with_a_folder_of_ones_own(folder: Path, file: str) -> None:
    """What our own file says of how a sweep starts is not taken for what a file of others says."""
    needs(PLUGINS[file])
    (folder / "conf/experiment").mkdir(parents=True)
    own = folder / "conf/experiment/mine.yaml"
    own.write_text("# @package _global_\nsteps: 3\n")
    path = f"hydra.searchpath=['file://{folder}/conf']"
    words = [word for word in RUN if not word.startswith("experiment=")]
    assert composed([path, "experiment=mine", *words, f"launcher={file}"]).hydra.launcher
    own.write_text(f"# @package _global_\ndefaults: [{{override /launcher: {file}}}]\n")
    with pytest.raises(InputError, match=r"hydra\.launcher\..* may be given on the command line alone"):
        composed([path, "experiment=mine", *words])


class TestSearch:
    """Optuna's, with a study in a file."""

    SEARCH = (
        *(word for word in RUN if word != "metrics=none"),
        *("~metrics/perceptual", "hparams_search=optuna", "optimized_metric=ssim"),
        "hydra.sweeper.params={kernel.normalize: 'choice(n, rms)', optimizer.lr: 'choice(1, 2)'}",
    )

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        needs("hydra_optuna_sweeper")

    def trials(self, where: str = "outputs/panorama/optuna.db") -> list:
        import optuna

        (summary,) = optuna.get_all_study_summaries(f"sqlite:///{where}")
        return optuna.load_study(study_name=summary.study_name, storage=f"sqlite:///{where}").trials

    def test_it_goes_on_until_there_are_all_trials(self, folder: Path, capsys) -> None:
        cli.csd(["-m", *self.SEARCH, "hydra.sweeper.n_trials=1"])
        cli.csd(["-m", *self.SEARCH, "hydra.sweeper.n_trials=3"])
        assert "has 1 trials; the best has" in capsys.readouterr().out
        trials = self.trials()
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
        runs = [run_in(run) for run in runs_below(folder)]
        assert [trial.value for trial in trials] == [run.metrics["ssim"]["value"] for run in runs]
        assert [trial.params["optimizer.lr"] for trial in trials] == [
            run.settings["optimizer.lr"] for run in runs
        ]
        before = contents(folder)
        cli.csd(["-m", *self.SEARCH, "hydra.sweeper.n_trials=3"])
        assert contents(folder) == before
        assert "has 3 trials; the best has" in capsys.readouterr().out

    def test_one_that_diverged_is_a_trial_too(self, folder: Path) -> None:
        search = [*self.SEARCH[:-1], "hydra.sweeper.params={optimizer.lr: 'choice(1e38, 2e38)'}"]
        with pytest.raises(InputError, match="No trial of this search has finished"):
            cli.csd(["-m", *search, "hydra.sweeper.n_trials=1", "hydra.sweeper.storage=sqlite:///a.db"])
        assert [trial.state.name for trial in self.trials("a.db")] == ["FAIL"]

    def test_a_mistake_leaves_no_study(self, folder: Path) -> None:
        with pytest.raises(InputError, match="seed must lie in"):
            cli.csd(["-m", *self.SEARCH, "seed=-1"])
        with pytest.raises(InputError, match="skip_finished=true is not for a search"):
            cli.csd(["-m", *self.SEARCH, "skip_finished=true"])
        assert [path.name for path in folder.iterdir()] == ["picture.png"]

    def test_all_processes_take_the_parameters_of_one_trial(self, folder: Path) -> None:
        """A process with another guidance scale would score its own windows otherwise."""
        own = ["optimizer.lr=1", "kernel.normalize=rms"]  # no parameters of the search then
        ddp = ["trainer=ddp", "trainer.accelerator=cpu", "hydra.sweep.dir=two", "hydra.sweeper.n_trials=1"]
        done = csd("-m", *self.SEARCH[:-1], "prior.guidance_scale=interval(1,8)", *own, *ddp)
        assert done.returncode == 0, done.stderr
        (trial,) = self.trials()
        scale = trial.params["prior.guidance_scale"]
        one = latent(csd_exp.edit(*RUN, *own, f"prior.guidance_scale={scale}").run_dir)
        assert (one - latent(folder / "two/0")).abs().max() < 1e-5 * one.abs().max()
        other = latent(csd_exp.edit(*RUN, *own, "prior.guidance_scale=9").run_dir)
        assert (one - other).abs().max() > 1e-2 * one.abs().max()


STUDIES = sorted((conf_dir().parent / "sweeps").glob("*.yaml"))


def grid(study: Path) -> dict[str, list]:
    """The values of each parameter."""
    sweep = yaml.safe_load(study.read_text())
    assert (sweep["program"], sweep["method"]) == ("csd_exp", "grid")
    return {key: of["values"] for key, of in sweep["parameters"].items()}


def trials(study: Path) -> list[dict[str, Any]]:
    """Every point of the grid, of one seed: what `${args_no_hyphens}` stands for."""
    values = grid(study) | {"seed": [0]}
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def command(study: Path, overrides: list[str]) -> list[str]:
    """What `wandb agent` starts, after `/usr/bin/env python`."""
    words = yaml.safe_load(study.read_text())["command"]
    assert words[:2] == ["${env}", "python"]
    return [own for word in words[2:] for own in (overrides if word == "${args_no_hyphens}" else [word])]


@pytest.mark.soak
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.stem)
def test_every_trial_of_a_study_can_be_run(study: Path) -> None:
    """What it varies is there, each two trials differ, and what it aims at is a metric of its runs."""
    goal = yaml.safe_load(study.read_text())["metric"]["name"]
    of_groups: dict[tuple, DictConfig] = {}  # groups are chosen by composing, which takes long
    different = set()
    for trial in trials(study):
        groups = {key: value for key, value in trial.items() if (conf_dir() / key).is_dir()}
        if tuple(groups.values()) not in of_groups:
            words = command(study, [f"{key}={value}" for key, value in trial.items()])[2:]
            config = of_groups[tuple(groups.values())] = composed(words)
            assert goal in config.metrics
            chosen = {key: config.hydra.runtime.choices[key] for key in groups}
            plain = {key: OmegaConf.select(config, key) for key in trial.keys() - groups.keys()}
            assert chosen | plain == trial
        config = of_groups[tuple(groups.values())].copy()
        for key in trial.keys() - groups.keys():
            OmegaConf.update(config, key, trial[key])
        check_values(config)
        kernel, timestep = constructed(config.kernel), constructed(config.schedule.timestep)
        scaled = isinstance(kernel, NoKernel) or config.kernel.normalize
        said = [config.prior.guidance_scale, config.prior.image_guidance_scale, vars(timestep), scaled]
        different.add(f"{type(kernel).__name__} {said}")
    assert len(different) == len(trials(study))


@pytest.mark.soak
def test_a_trial_of_a_study_runs_without_a_network(folder: Path) -> None:
    (study,) = [study for study in STUDIES if study.stem == "kernel"]
    tiny = [word for word in RUN if not word.startswith(("experiment=", "logger=", "metrics="))]
    first = [f"{key}={value}" for key, value in trials(study)[0].items()]
    words = command(study, [*first, *tiny, "~metrics/perceptual", "hydra.run.dir=run"])
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(Path("run/wandb").glob("offline-run-*/*.wandb"))) == 1
    assert run_in(Path("run")).failed is None
