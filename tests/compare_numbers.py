"""Whether csd-compare's table still has its numbers: a new one held against the committed one, or any other.

    csd-compare
    python tests/compare_numbers.py outputs/compare/table.csv
    python tests/compare_numbers.py outputs/compare/curves.csv other/curves.csv

No test of the suite: the comparison takes a quarter of an hour. Rows are matched in their order.
"""

import csv
import sys
from pathlib import Path

COMMITTED = Path(__file__).parent.parent / "docs/comparison.csv"


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def main(new: Path, old: Path = COMMITTED) -> None:
    """Print the largest difference in each column that both have, and the columns of one alone."""
    found, before = rows_of(new), rows_of(old)
    if [row["method"] for row in found] != [row["method"] for row in before]:
        sys.exit(f"{new} and {old} do not hold the same methods in the same order.")
    shared = [column for column in before[0] if column in found[0] and column != "method"]
    for column in shared:
        pairs = [(row[column], was[column]) for row, was in zip(found, before, strict=True)]
        lost = sum((now == "") != (was == "") for now, was in pairs)
        numbers = [(float(now), float(was)) for now, was in pairs if now and was and column != "note"]
        apart = max((abs(now - was) for now, was in numbers), default=0.0)
        print(f"{column:24} {apart:.1e} at most in {len(numbers)} rows; in one alone: {lost}")
    print("columns of one alone:", ", ".join(sorted(found[0].keys() ^ before[0].keys())) or "none")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
