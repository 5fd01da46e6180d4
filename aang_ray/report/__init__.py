"""Tables, figures and significance, from the store alone."""

from aang_ray.report.formats import Format, render
from aang_ray.report.table import build_table, trace

__all__ = ["Format", "build_table", "render", "trace"]
