"""Settings of the site: `make docs` builds it from the pages of this folder, which a code host shows as well."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sphinx.ext.napoleon.docstring import GoogleDocstring

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import aang_ray  # noqa: E402  of this checkout, not of an installation
from aang_ray.cli import app as commands  # noqa: E402
from aang_ray.cli import main  # noqa: E402

project = "aang_ray"
release = version = aang_ray.__version__
copyright = "its contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "aang_ray"
html_css_files = ["site.css"]
html_static_path = ["_static"]
html_show_sphinx = False

myst_heading_anchors = 4  # links of the form page.md#heading, as on a code host

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_default_options = {"undoc-members": True}


def list_the_rest(app: Any, name: str, source: list[str]) -> None:
    """Put the pages that the index does not name into its last list, so that a new page needs no entry."""
    if name == "index":
        named = {line.strip() for line in source[0].splitlines()}
        rest = sorted(app.env.found_docs - named - {"index"})
        source[0] = source[0].replace("@REST@", "\n   ".join(rest))


def write_commands(app: Any) -> None:
    """Write the page of all commands from their own help texts."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    parts = ["Commands\n========\n\nWhat ``aang VERB --help`` prints.\n"]
    for verb in _verbs():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            main([*verb, "--help"])
        title = f"aang {' '.join(verb)}"
        block = textwrap.indent(shown.getvalue().strip(), "   ")
        parts.append(f"{title}\n{'-' * len(title)}\n\n.. code-block:: text\n\n{block}\n")
    page = HERE / "reference" / "commands.rst"
    text = "\n".join(parts)
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def _verbs() -> list[list[str]]:
    from typer.main import get_command

    found: list[list[str]] = []
    for name, command in sorted(get_command(commands).commands.items()):  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, verb] for verb in sorted(inner)] if inner else [[name]]
    return found


class _Docstring(GoogleDocstring):
    """Google's style, without a type at the beginning of `Returns` and of settings: types stand in the signature."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn docstrings of Google's style into reStructuredText, and add the default of a setting."""
    if what != "attribute":
        lines[:] = _Docstring(list(lines), what=what, name=name, obj=obj, options=options).lines()
        return
    owner, _, setting = name.rpartition(".")
    module, _, section = owner.rpartition(".")
    field = getattr(getattr(sys.modules[module], section, None), "model_fields", {}).get(setting)
    if field is not None and not field.is_required() and not isinstance(field.default, BaseModel):
        lines += ["", f"Default: ``{json.dumps(field.default)}``", ""]


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", write_commands)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("source-read", list_the_rest)
