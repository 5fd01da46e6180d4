"""The configurations that a search has asked for: `<store>/.progress/searches/<study>.json`."""

from __future__ import annotations

from typing import Any

from aang_ray.store.files import open_location
from aang_ray.sweep.progress_files import FOLDER, read_folder, write_json

SEARCHES = "searches"

Parameters = dict[str, Any]
"""Setting -> value, as Optuna has them."""


class SearchMemory:
    """Lets a search that is started again go on with what it asked for.

    How those configurations scored is in the rows. Without this memory others would be asked for; nothing is lost.
    """

    def __init__(self, uri: str) -> None:
        self._location = open_location(uri)
        found = read_folder(self._location, FOLDER, SEARCHES)
        self._asked: dict[str, list[Parameters]] = {content["study"]: content["asked"] for _, content in found}

    def read(self, study: str) -> list[Parameters]:
        """In the order in which they were asked for; none for a new search."""
        return self._asked.get(study, [])

    def write(self, study: str, asked: list[Parameters]) -> None:
        """All that a search has asked for so far."""
        path = self._location.path(FOLDER, SEARCHES, f"{study}.json")
        write_json(self._location, path, {"study": study, "asked": asked})
