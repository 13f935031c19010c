"""`csd-bench`: what a step costs beyond the network and the bare step, beside another code, at which size."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from csd_exp.bench.noise import draw
from csd_exp.build import silence_lightning
from csd_exp.config import RunConfig, check, composed, literal
from csd_exp.errors import InputError
from csd_exp.files import too_large, unwritable
from csd_exp.launch import is_first

USAGE = """csd-bench [step | peer | scaling | overhead | memory] [KEY=VALUE ...]

step     Times whole optimisation steps and, in turn, the bare network on the same rows.
peer     Times them beside a straightforward step, as the public code takes it, and tells why it is slower.
scaling  Times them against particles, width, frames and processes, `scaling.AXIS=[...]`; writes a plot, too.
overhead What finite checks, draws, logs and callbacks cost, each against the bare step of the same run.
memory   What a prior's weights and its rows take of memory at every precision; nothing is allocated.

Each prints and writes a table.

  csd-bench                                                              the embedded prior on the CPU
  csd-bench prior=random_sd15 prior.dtype=bfloat16 trainer=gpu           the size of Stable Diffusion 1.5
  csd-bench repeats=100 modality.batch=null prior.row_chunk=64 json=big.json
  csd-bench peer prior=random_sd15 prior.dtype=bfloat16 prior.compile=true trainer=gpu "drawn=[512,1920]"
  csd-bench scaling prior=random_sd15 extrapolate=true "scaling.particles=[256]" warmup=1 repeats=3 \
      prior.row_chunk=4 "scaling.width=[]" "scaling.frames=[]" "scaling.processes=[]"
  csd-bench memory prior=flux                                            FLUX.1, or the folder prior.path

KEY is any of csd's, or one of the benchmark's. drawn: pictures of noise in place of modality.path,
[height, width] of one, [n, height, width] of n. extrapolate: of a step's network calls of equally many rows
make the first alone and count it as often; latents begin as noise.

"""
# And what each has where nothing else is given.
COMMANDS: dict[str, list[str]] = {
    "step": [],
    "peer": ["preset=official"],
    "scaling": [],
    "overhead": ["callbacks=default", "logger=csv", "warmup=1", "repeats=5"],
    "memory": [],
}
EXTRAPOLATED = ("step", "scaling")
OWN = ["warmup", "repeats", "json", "drawn", "extrapolate", "scaling"]


@dataclass
class BenchConfig(RunConfig):
    """The keys of a run, and: steps that are not timed, steps that are, and the file to write.

    command: which of the benchmarks it is. drawn: pictures of noise, see `csd_exp.bench.noise`. extrapolate:
    whether one network call stands for all of a step, see `csd_exp.bench.step`. scaling: of each axis, where
    it is measured.
    """

    command: str = "step"
    warmup: int = MISSING
    repeats: int = MISSING
    json: str = MISSING
    drawn: Any = None
    extrapolate: bool = False
    scaling: Any = MISSING


ConfigStore.instance().store("bench_schema", BenchConfig)


def main() -> None:
    """The command line `csd-bench`: exit code 2 and one sentence for anything a user got wrong."""
    silence_lightning()
    words = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(words):
            print(USAGE + OmegaConf.to_yaml(OmegaConf.masked_copy(composed([], "bench"), OWN)))
        elif words[:1] and "=" not in words[0]:
            bench(words[0], words[1:])
        else:
            bench("step", words)
    except InputError as e:
        _refuse(e)
    except OSError as e:
        _refuse(unwritable(e, "give another file, json=FILE"))
    except (MemoryError, RuntimeError) as e:
        _refuse(too_large(e))


def _refuse(error: InputError) -> NoReturn:
    if is_first():
        print(f"csd-bench: {error}", file=sys.stderr)
    sys.exit(2)


def bench(command: str, overrides: Sequence[str]) -> Any:
    """What one of the benchmarks finds, printed and written; overrides are of conf/bench.yaml.

    Raises InputError, before anything runs, where a key cannot be used.
    """
    if command not in COMMANDS:
        raise InputError(f"csd-bench {command} is no benchmark; accepted are {', '.join(COMMANDS)}.")
    given = {override.partition("=")[0] for override in overrides}
    own = [override for override in COMMANDS[command] if override.partition("=")[0] not in given]
    config = composed([*own, *overrides, f"command={command}"], "bench")
    if config.warmup < 0 or config.repeats < 1:
        raise InputError(
            f"repeats must be at least 1 and warmup at least 0, not {config.repeats} and {config.warmup}."
        )
    if config.extrapolate and command not in EXTRAPOLATED:
        raise InputError(f"extrapolate is for csd-bench {' and '.join(EXTRAPOLATED)}, not for {command}.")
    file = Path(config.json).absolute()
    there = next(folder for folder in file.parents if folder.exists())
    if file.is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"json={config.json} cannot be written; give a file in a folder that can be.")
    with TemporaryDirectory() as folder:
        config.dir = literal(folder)  # where callbacks would write
        draw(config)
        check(config)
        return import_module(f"csd_exp.bench.{command}").bench(config)
