"""Tables, plots and a self-contained HTML page from run folders; needs no GPU, no model code and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .html import write_report as write_report
    from .load_run import Run as Run
    from .load_run import read_run as read_run
    from .overlays import MapColumn as MapColumn
    from .overlays import save_maps_figure as save_maps_figure
    from .rows import Row as Row
    from .rows import group_runs as group_runs
    from .table import print_table as print_table

_HOME = {
    "Run": "load_run",
    "read_run": "load_run",
    "Row": "rows",
    "group_runs": "rows",
    "print_table": "table",
    "write_report": "html",
    "MapColumn": "overlays",
    "save_maps_figure": "overlays",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
