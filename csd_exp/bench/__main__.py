"""`csd-bench` as `python -m csd_exp.bench`."""

from csd_exp.bench import main

if __name__ == "__main__":
    main()
