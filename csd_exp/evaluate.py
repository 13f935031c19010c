"""What the pictures of a run measure: while it goes on, at its end, and again by `csd-eval`."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import getdoc, signature
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torchmetrics import Metric
from yaml import YAMLError

from csd_exp.build import accepted, constructed, silence_lightning
from csd_exp.config import allowed, composed, is_allow, literal
from csd_exp.errors import InputError, notice
from csd_exp.facts import check_known, read_facts
from csd_exp.files import write_whole
from csd_exp.images import saved_pictures
from csd_exp.metrics.clip import TINY, tiny_weights
from csd_exp.report import write_report
from csd_exp.targets import check_targets
from csd_exp.trust import check_links, check_resolvers

USAGE = """csd-eval RUN_DIR [metrics=NAME] [metrics.KEY=VALUE ...]

Measures the saved pictures of a finished run again, writes metrics.json and report.html in its folder.

  csd-eval outputs/demo/2026-01-31_12-00-00_000000                            the run's own metrics
  csd-eval outputs/demo/2026-01-31_12-00-00_000000 metrics=video              those of conf/metrics/video.yaml
  csd-eval outputs/demo/2026-01-31_12-00-00_000000 metrics/perceptual=lpips   another network
  csd-eval RUN_DIR allow=[my_package]                     metrics of your own, which the run was allowed too
"""


def build_metrics(group: DictConfig | None) -> dict[str, Metric]:
    """The metrics of a configuration's group by name; what else is in it is there for them to refer to."""
    return {name: constructed(cast(DictConfig, group)[name]) for name in metric_classes(group)}


def metric_classes(group: DictConfig | None) -> dict[str, type[Metric]]:
    """The classes of a group's metrics by name."""
    nodes = {str(name): node for name, node in (group or {}).items()}
    named = {
        name: get_class(node._target_)
        for name, node in nodes.items()
        if isinstance(node, DictConfig) and "_target_" in node
    }
    return {name: cls for name, cls in named.items() if issubclass(cls, Metric)}


@torch.no_grad()
def measured(metrics: Mapping[str, Metric], edited: Iterable[Tensor], media: Path) -> dict[str, float | None]:
    """The value of each metric on a run's pictures, None where nothing of them can be judged.

    edited: [3, H, W] as saved, in order; gone through once, one by one. media: the run's folder of pictures.
    Each metric gets what its `update` names; InputError names one that asks for what is not known.
    """
    takes = {name: signature(metric.update).parameters for name, metric in metrics.items()}
    for name, metric in metrics.items():
        check_known(name, type(metric), has_source=bool(saved_pictures(media, "source")))
        metric.reset()
    for image, known in zip(edited, read_facts(media), strict=False):  # without a record they have no end
        facts = {"edited": image} | known
        for name, metric in metrics.items():
            with accepted(f"metrics.{name}"):
                metric.update(**{key: facts[key] for key in takes[name] if key in facts})
    return {name: _value(name, metric) for name, metric in metrics.items()}


def _value(name: str, metric: Metric) -> float | None:
    """What a metric has come to; that one of yours is no number is said, the package's own mean it."""
    with accepted(f"metrics.{name}"):
        value = float(metric.compute()) if metric.update_called else math.nan
    if math.isfinite(value):
        return value
    if not type(metric).__module__.startswith("csd_exp."):
        notice(f"metrics.{name} has no value: it came to {value}.")
    return None


def entries(metrics: Mapping[str, Metric], group: DictConfig | None, media: Path) -> dict[str, dict]:
    """For metrics.json: each metric's value on the final pictures, its definition, sense and settings."""
    values = measured(metrics, saved_pictures(media, "edited"), media)
    return {
        name: {
            "value": values[name],
            "definition": getdoc(type(metric)),
            "higher_is_better": metric.higher_is_better,
            "settings": settings_of(cast(DictConfig, group)[name]),
        }
        for name, metric in metrics.items()
    }


def settings_of(node: DictConfig) -> dict[str, Any]:
    """What a metric's number depends on beside the pictures: its arguments, and which weights `tiny` has."""
    settings = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    weights = {"clip_weights": tiny_weights()} if settings.get("clip") == TINY else {}
    return {key: value for key, value in settings.items() if key != "_target_"} | weights


def write_metrics(metrics: Mapping[str, Mapping], run_dir: Path) -> None:
    """Write metrics.json into a run's folder."""
    write_whole(run_dir / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def evaluate(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, dict]:
    """Measure the saved pictures of a finished run again; write metrics.json and the report.

    overrides: of the group `metrics`, which is then composed anew; without any, the metrics are the run's
    own. `allow=[my_package]` may stand beside them, see `csd_exp.targets.check_targets`. What was measured
    before under other names is kept. Raises InputError, before anything is written, for a folder that no
    finished run is in, and for overrides of anything but metrics.
    """
    config = run_config(run_dir)
    changes = [override for override in overrides if not is_allow(override)]
    for override in changes:
        if not override.startswith(("metrics=", "metrics.", "metrics/", "+metrics.", "~metrics.")):
            raise InputError(f"{override} is no key of metrics; csd-eval measures pictures that are there.")
    if changes:
        config.metrics = composed(overrides).metrics
    config.dir = literal(str(run_dir))
    named = literal(OmegaConf.to_container(config.get("metrics") or DictConfig({}), resolve=True))
    checked = OmegaConf.create({"metrics": named, "allow": allowed(overrides)})
    check_targets(checked)
    group = checked.metrics
    found = entries(build_metrics(group), group, _media(run_dir))
    file = run_dir / "metrics.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_metrics(earlier | found, run_dir)
    write_report(run_dir)
    return found


def run_config(run_dir: Path) -> DictConfig:
    """The configuration of a run; raises InputError where it cannot be read or trusted."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run_dir} has no config.yaml, so it is no run directory; give one that csd wrote.")
    try:
        config = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as e:
        raise InputError(f"{file} cannot be read ({' '.join(str(e).split())}).") from e
    if not isinstance(config, DictConfig):
        raise InputError(f"{file} is no configuration of csd.")
    check_resolvers(config)
    check_links(run_dir)
    return config


def _media(run_dir: Path) -> Path:
    """The folder of a run's pictures, where each edited one has its source, or none has one."""
    media = run_dir / "media"
    edited, sources = (len(saved_pictures(media, name)) for name in ("edited", "source"))
    if not edited:
        raise InputError(f"{media} holds no edited picture; the run in {run_dir} has not finished.")
    if sources not in (0, edited):
        raise InputError(f"{media} holds {edited} edited pictures for {sources} sources; each needs one.")
    return media


def main() -> None:
    """The command line `csd-eval`: exit code 2 and one sentence for anything a user got wrong."""
    silence_lightning()
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    try:
        if {"-h", "--help"} & set(sys.argv):
            print(USAGE)
        elif len(folders) != 1:
            raise InputError(f"one run directory is needed, not {len(folders)}: csd-eval RUN_DIR.")
        else:
            for name, entry in evaluate(Path(folders[0]), overrides).items():
                print(f"{name:32} {'none' if entry['value'] is None else format(entry['value'], '.4g')}")
    except InputError as e:
        print(f"csd-eval: {e}", file=sys.stderr)
        sys.exit(2)
