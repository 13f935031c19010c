"""`python -m csd_exp` is `csd`."""

from csd_exp.run import main

main()
