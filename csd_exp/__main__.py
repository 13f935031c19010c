"""`python -m csd_exp` is `csd`."""

from csd_exp.cli import main

main()
