"""`csd`, also as `python -m csd_exp`."""

from csd_exp.interruption import SIGNALS, handled, leave


def main() -> None:
    """Answer signals from the first moment, while the rest is imported."""
    with handled(SIGNALS, leave):
        from csd_exp.cli import main as command

        command()


if __name__ == "__main__":
    main()
