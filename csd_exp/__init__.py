"""csd_exp: experiments with Collaborative Score Distillation (arXiv 2307.04787)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csd_exp.run import Result


def edit(*overrides: str, **values: object) -> "Result":
    """Run once with the command line's overrides; see `csd_exp.run.edit`."""
    from csd_exp import run  # torch takes seconds to import

    return run.edit(*overrides, **values)
