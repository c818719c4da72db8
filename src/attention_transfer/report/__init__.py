"""Tables, plots and a self-contained HTML page from run folders; needs no GPU and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .html import write_report as write_report
    from .load_run import Run as Run
    from .load_run import read_run as read_run
    from .overlays import MapColumn as MapColumn
    from .overlays import save_maps_figure as save_maps_figure
    from .rows import Row as Row
    from .rows import group_runs as group_runs
    from .table import print_table as print_table

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "html": ["write_report"],
        "load_run": ["Run", "read_run"],
        "overlays": ["MapColumn", "save_maps_figure"],
        "rows": ["Row", "group_runs"],
        "table": ["print_table"],
    },
)
