"""Automated auxiliary learning on Ray (AANG, ICLR 2023).

    import aang_ray as aang

    aang.train({"method": "aang", "data": {"task": "my-folder"}})   # one run
    aang.sweep("jobs/demo.yaml", seeds=[0, 1, 2])                   # a grid of runs
    aang.table("results")                                           # its table, a pandas DataFrame
    aang.objectives("td")                                           # the objectives of a search space, a DataFrame
    aang.load_classifier("my-model").predict(["A warm film."])      # a classifier that a run exported
    aang.RunConfig, aang.Store                                      # a run's configuration; the results of runs

Importing the package loads none of this: each name is loaded when it is first used.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aang_ray.api import objectives, sweep, table, train
    from aang_ray.config import RunConfig
    from aang_ray.errors import RunFailure, UserError
    from aang_ray.store import CellRecord, Store
    from aang_ray.train.export import load_classifier

__version__ = "0.1.0"

__all__ = [
    "CellRecord",
    "RunConfig",
    "RunFailure",
    "Store",
    "UserError",
    "__version__",
    "load_classifier",
    "objectives",
    "sweep",
    "table",
    "train",
]

_LAZY = {
    "CellRecord": "aang_ray.store",
    "RunConfig": "aang_ray.config",
    "RunFailure": "aang_ray.errors",
    "Store": "aang_ray.store",
    "UserError": "aang_ray.errors",
    "load_classifier": "aang_ray.train.export",
    "table": "aang_ray.api",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Load a name of `_LAZY` when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """A subpackage that can be called as the function of the same name in `aang_ray.api`.

    `train`, `sweep` and `objectives` are subpackages as well as functions. Python binds a subpackage to its name in
    this package whenever it is imported, so a function of that name would be lost.
    """

    @property
    def _function(self) -> Any:
        return getattr(import_module("aang_ray.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)  # cloudpickle knows plain modules only


for _name in ("train", "sweep", "objectives"):
    # Their `__init__` modules load nothing else.
    import_module(f"{__name__}.{_name}").__class__ = _CallablePackage
