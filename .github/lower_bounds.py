"""Print the lowest version that a pyproject.toml allows for each dependency, as a constraints file for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path


def lower_bounds(requirements: Iterable[str]) -> Iterator[str]:
    """Yield `name==version` for every requirement that has a lower bound.

    Args:
        requirements: Requirements as in pyproject.toml, for example `ray[train,tune]>=2.60,<2.61`.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?>=([\w.]+)(?:,.*)?", requirement.replace(" ", ""))
        if match is None:
            raise ValueError(f"{requirement}: expected a lower bound, for example name>=1.2,<2")
        yield f"{match[1]}=={match[2]}"


def main() -> None:
    """Print the constraints for the file that the command line names."""
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    print("\n".join(lower_bounds([*project["dependencies"], *extras])))


if __name__ == "__main__":
    main()
