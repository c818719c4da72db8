"""Makes tables, charts and a page from run folders; needs no GPU, no model code and no torch."""

# These modules import numpy, matplotlib, jinja2 and rich only within functions: a training run
# imports this package long before it writes its report.
from .charts import convergence_figure
from .grouping import group_runs
from .html import check_page_file, check_report, write_report
from .json_numbers import comparison_numbers
from .load_run import LoadedRun
from .map_figure import MapColumn, check_figure_file, maps_figure, save_maps_figure
from .open_run import read_run
from .rows import SettingRow
from .run_maps import save_run_maps
from .table import print_table
