"""What configurations of others may say: no code, no environment, nothing written outside a run's folder."""

import os
import pickle
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from csd_exp import cli
from csd_exp.bench import bench
from csd_exp.callbacks.checkpoint import CheckpointFiles
from csd_exp.config import PACKAGE, composed
from csd_exp.errors import InputError
from csd_exp.evaluate import evaluate
from csd_exp.figures.compare import compare
from csd_exp.figures.engine import make
from csd_exp.files import write_whole
from csd_exp.launch import check_folder
from csd_exp.run import check_run
from csd_exp.tiny import train
from csd_exp.trust import check_links

LOAD = "{_target_: joblib.load, filename: evil.pkl}"
MADE = "'${oc.create:{_target_: joblib.load, filename: evil.pkl}}'"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with a picture, a hostile pickle and a folder `conf` of somebody else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "a secret")
    Image.new("RGB", (96, 64), "teal").save("picture.png")
    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    Path("conf/preset").mkdir(parents=True)
    return tmp_path


def theirs(content: str, *more: str, at: str = "preset/theirs.yaml") -> list[str]:
    """A command line that takes one of their files."""
    Path("conf", at).parent.mkdir(parents=True, exist_ok=True)
    Path("conf", at).write_text(f"# @package _global_\n{content}\n")
    group, _, name = at.removesuffix(".yaml").rpartition("/")
    return [f"{group}={name}", f"hydra.searchpath=[file://{Path('conf').resolve()}]", *more]


RUN = ("experiment=panorama", "prior=analytic", "modality.path=picture.png", "prompt=x", "logger=csv")


def refused(*overrides: str) -> str:
    with pytest.raises(InputError) as e:
        check_run(composed([*RUN, *overrides]))
    assert not Path("ran").exists()
    assert "a secret" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (f"prior: {{means: [[{LOAD}]]}}", "prior.means.0.0._target_=joblib.load"),
        (f"metrics: {{ssim: {{x: [[{LOAD}]]}}}}", "metrics.ssim.x.0.0._target_=joblib.load"),
        (f"trainer: {{plugins: [[{LOAD}]]}}", "trainer.plugins.0.0._target_=joblib.load"),
        (f"hydra: {{callbacks: {{x: {LOAD}}}}}", "hydra.callbacks"),
        (f"hydra: {{callbacks: {{x: {MADE}}}}}", "hydra.callbacks.x uses the resolver oc.create"),
        (f"kernel: {MADE}", "kernel uses the resolver oc.create"),
        ("name: \"${asset:'${oc.env:KEY}'}\"", "name uses the resolver oc.env"),
        ("source_prompt: '${oc.env:KEY}'", "source_prompt uses the resolver oc.env"),
        ("source_prompt: \"${oc.decode:'x'}\"", "source_prompt uses the resolver oc.decode"),
        ("tags: ['${oc.env:KEY}']", "tags.0 uses the resolver oc.env"),
        ("hydra: {job: {env_copy: [KEY]}}", "hydra.job.env_copy may be given on the command line alone"),
        ("hydra: {job: {env_set: {PATH: .}}}", "hydra.job.env_set"),
    ],
)
def test_their_file_neither_runs_code_nor_reads_the_environment(folder: Path, content: str, key: str) -> None:
    assert refused(*theirs(content)).startswith(key)


def test_the_command_line_has_the_shell_for_the_environment(folder: Path) -> None:
    assert refused("negative_prompt=${oc.env:KEY}").startswith("negative_prompt uses the resolver oc.env")
    assert composed([r"prompt='\${oc.env:KEY}'"]).prompt == "${oc.env:KEY}"


CHECKPOINT = "_target_: lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("hydra: {run: {dir: /elsewhere}}", "hydra.run.dir"),
        ("hydra: {job: {name: ../elsewhere}}", "hydra.job.name"),
        ("hydra: {output_subdir: ../elsewhere}", "hydra.output_subdir"),
        (
            "hydra: {job_logging: {handlers: {file: {filename: elsewhere}}}}",
            "hydra.job_logging.handlers.file",
        ),
        ("hydra: {hydra_logging: {handlers: {console: {class: subprocess.Popen}}}}", "hydra.hydra_logging"),
        (f"callbacks: {{x: {{{CHECKPOINT}, dirpath: elsewhere}}}}", "callbacks.x.dirpath=elsewhere lies"),
        (f"callbacks: {{x: {{{CHECKPOINT}, filename: ../../elsewhere}}}}", "callbacks.x.filename=../../else"),
        ("callbacks: {media: {dir: /elsewhere}}", "callbacks.media.dir=/elsewhere lies outside"),
        ("callbacks: {media: {dir: '${dir}/../elsewhere'}}", "callbacks.media.dir=outputs/"),
        ("logger: {csv: {save_dir: elsewhere}}", "logger.csv.save_dir=elsewhere lies outside"),
        (
            "logger: {x: {_target_: lightning.pytorch.loggers.WandbLogger}}",
            "logger.x.save_dir=. lies outside",
        ),
    ],
)
def test_their_file_writes_into_the_runs_folder_alone(folder: Path, content: str, key: str) -> None:
    assert refused(*theirs(content)).startswith(key)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.name=../elsewhere",
        "hydra.output_subdir=../elsewhere",
        "hydra.job_logging.handlers.file.filename=/elsewhere",
        "+hydra.job_logging.handlers.x={class: subprocess.Popen, args: [ls]}",
        "+hydra.job_logging.handlers.x={class: logging.StreamHandler, stream: 'ext://os.environ'}",
    ],
)
def test_what_hydra_writes_is_in_the_runs_folder_too(folder: Path, override: str) -> None:
    assert refused(override).startswith(override.lstrip("+").partition("=")[0])
    check_run(composed([*RUN, "hydra.job.name=mine", "hydra.job_logging.root.level=WARNING"]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+callbacks.x={_target_: csd_exp.report.write_report, run_dir: .}", "may construct only"),
        ("+metrics.x={_target_: csd_exp.evaluate.evaluate, run_dir: .}", "may construct only"),
        ("+metrics.x={_target_: csd_exp.files.write_whole, path: x, content: x}", "may construct only"),
        ("+metrics.x={_target_: csd_exp.priors.stable_diffusion.noise_levels}", "is a function"),
        ("+callbacks.x={_target_: csd_exp.metrics.pixels, _partial_: true}", "is no Callback"),
        ("+logger.x={_target_: csd_exp.callbacks.Progress}", "is no Logger"),
        (
            "+metrics.x={_target_: torchmetrics.utilities.checks.check_forward_full_state_property}",
            "no Metric",
        ),
        ("+hydra.callbacks.x={_target_: hydra._internal.utils.get_column_widths}", "no Launcher or Sweeper"),
    ],
)
def test_a_part_is_a_class_of_its_kind(folder: Path, override: str, words: str) -> None:
    message = refused(override)
    assert message.startswith(override.lstrip("+").partition("=")[0])
    assert words in message


def test_every_command_checks_what_it_runs(folder: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"kernel uses the resolver oc\.create"):
        make(["figure=fig2", *theirs(f"kernel: {MADE}")])
    with pytest.raises(InputError, match=r"draw\._target_=joblib\.load"):
        make(["figure=fig2", "figure.draw._target_=joblib.load"])
    with pytest.raises(InputError, match=r"kernel uses the resolver oc\.create"):
        compare(theirs(f"kernel: {MADE}"))
    with pytest.raises(InputError, match=r"prior\.x\.0\.0\._target_=joblib\.load"):
        bench("step", [f"+prior.x=[[{LOAD}]]"])
    for content, words in {
        f"text: {{x: [[{LOAD}]]}}": r"text\.x\.0\.0\._target_=joblib\.load",
        "text: '${oc.create:{}}'": "text uses the resolver oc.create",
        "recipe: os.system": "recipe must be one of csd_exp",
        "export_dir: /elsewhere": "export_dir may be given on the command line alone",
        "hydra: {callbacks: {x: {}}}": r"hydra\.callbacks",
    }.items():
        with pytest.raises(InputError, match=words):
            train.checked(theirs(content, at="model/theirs.yaml"))
    assert train.checked(["model=clip", "export_dir=mine"]).export_dir == "mine"
    monkeypatch.setattr(sys, "argv", ["csd-train-prior", "model=unknown"])
    with pytest.raises(SystemExit, match="2"):
        train.main()


def test_help_does_not_start_their_logging(folder: Path) -> None:
    handler = "{class: joblib.load, filename: evil.pkl}"
    theirs(f"hydra: {{hydra_logging: {{handlers: {{console: {handler}}}}}}}")
    for flag in (["--help"], ["--cfg", "job"], ["--info", "all"]):
        with pytest.raises(InputError, match=r"hydra\.hydra_logging"):
            cli.csd([*flag, "preset=theirs", "--config-dir", "conf"])
    for flag in (["--help"], ["--cfg", "job"]):
        with pytest.raises(InputError, match="experimental-rerun is not accepted"):
            cli.csd([*flag, "--experimental-rerun", "evil.pkl"])


@pytest.mark.parametrize("metric", [f"{{x: [[{LOAD}]]}}", MADE, f"{{x: {MADE}}}", "{x: '${oc.env:KEY}'}"])
def test_a_received_folder_is_measured_as_its_configuration_is_accepted(folder: Path, metric: str) -> None:
    Path("run/media").mkdir(parents=True)
    Path("run/config.yaml").write_text(f"name: x\nmetrics: {metric}\n")
    with pytest.raises(InputError, match=r"^metrics.*(joblib\.load|the resolver)"):
        evaluate(Path("run"))
    assert not Path("ran").exists()


def test_no_link_is_followed(folder: Path) -> None:
    Path("kept").write_text("kept")
    for part in ("run/x.txt.part", "run/x.ckpt.part", "run/x.ckpt.part.part"):
        Path(part).parent.mkdir(exist_ok=True)
        Path(part).symlink_to(folder / "kept")
    write_whole(Path("run/x.txt"), "new")
    CheckpointFiles().save_checkpoint({}, "run/x.ckpt.part")
    assert Path("kept").read_text() == "kept"
    assert not Path("run/x.txt").is_symlink()
    log = Path("run/wandb/offline-run-1/logs/debug-core.log")
    log.parent.mkdir(parents=True)
    log.symlink_to("/elsewhere/core-debug.log")  # as W&B does
    check_links(Path("run"))
    Path("run/media").symlink_to(folder / "conf")
    Path("run/config.yaml").write_text("name: x\n")
    for again in (
        lambda: evaluate(Path("run")),
        lambda: check_folder(OmegaConf.create({"hydra": {"run": {"dir": "run"}}, "ckpt_path": "run/x.ckpt"})),
    ):
        with pytest.raises(InputError, match=r"run/media is a link that leads out of the run's folder"):
            again()


def test_the_packages_own_files_are_accepted(folder: Path) -> None:
    check_run(composed([*RUN[:-1], "logger=tensorboard", "callbacks=comparison"]))
    assert composed([]).modality.path == str(PACKAGE / "assets/field.jpg")
