"""Tables, charts and a page from run folders; needs no GPU, no model code and no torch."""

# These modules import numpy, matplotlib, jinja2 and rich only within functions: a training run
# imports this package long before it writes its report.
from .grouping import group_runs
from .html import check_page_file, write_report
from .load_run import LoadedRun
from .open_run import read_run
from .overlays import MapColumn, check_figure_file, save_maps_figure
from .rows import SettingRow
from .table import print_table

__all__ = [
    "LoadedRun",
    "MapColumn",
    "SettingRow",
    "check_figure_file",
    "check_page_file",
    "group_runs",
    "print_table",
    "read_run",
    "save_maps_figure",
    "write_report",
]
