"""Tables and significance, from the store alone."""

from aang_ray.report.formats import Format, render
from aang_ray.report.table import Column, Entry, Table, table_from

__all__ = ["Column", "Entry", "Format", "Table", "render", "table_from"]
