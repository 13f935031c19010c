"""The steps at which a callback acts."""

from collections.abc import Sequence

from csd_exp.errors import InputError


class Steps:
    """After every n steps (0 for none), and after each number of steps in `at`: 0 is before the first.

    what: is between them, for the InputError of a negative number.
    """

    def __init__(self, what: str, every_n_steps: int, at: Sequence[int] = ()):
        if every_n_steps < 0:
            raise InputError(f"The steps between {what} must be at least 0, not {every_n_steps}.")
        if any(step < 0 for step in at):
            raise InputError(f"The steps at which there are {what} must be at least 0, not {min(at)}.")
        self.every_n_steps, self.at = every_n_steps, frozenset(at)

    def __bool__(self) -> bool:
        return self.every_n_steps > 0 or bool(self.at)

    def __contains__(self, step: int) -> bool:
        """step: how many have been taken."""
        every = self.every_n_steps
        return step in self.at or (step > 0 and every > 0 and step % every == 0)
