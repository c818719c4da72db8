"""The report's page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import shlex
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import UserError, plural
from ..run_folder import RunFolder, is_special, replacing
from ..trust import executed_file
from . import summary_text
from .browser import make_browser
from .charts import page_charts
from .confusion import compare_confusions
from .curves import make_styles
from .formats import option_value, percent, signed
from .grouping import group_runs
from .load_run import LoadedRun
from .rows import SettingRow
from .settings import PER_RUN_OPTIONS
from .svg import PAGE_COLOURS
from .table import columns
from .teachers import with_teachers

FOLDER = Path(__file__).parent
# The template ends the title with this, by which `check_report` knows a report.
SIGNATURE = "· attention transfer</title>"
SIGNATURE_WITHIN = 1 << 16  # bytes


def write_report(runs: list[LoadedRun], out: Path, title: str | None = None) -> None:
    """Writes results, curves, maps and options of the runs as one HTML file without links.

    Raises:
        UserError: without a run, or if `out` is a folder.
    """
    if not runs:
        raise UserError("no runs to report on: name at least one run folder")
    check_page_file(out)
    text = _render(group_runs(runs), title)
    with replacing(Path(out)) as file:
        # The name of a folder may use another encoding than UTF-8.
        file.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_page_file(out: Path) -> None:
    """Raises `UserError` unless `out` has the extension .html."""
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder: name the HTML file to write")
    if Path(out).suffix.lower() not in (".html", ".htm") and not is_special(Path(out)):
        raise UserError(f"--out {out}: expected an HTML page, a file ending in .html")


def check_report(file: Path, force: bool) -> None:
    """Raises `UserError` if `file`, whose name the user did not choose, is no report of this tool.

    With `force` any file may be replaced.
    """
    if force or not file.is_file():
        return
    with open(file, "rb") as stream:
        beginning = stream.read(SIGNATURE_WITHIN)
    if SIGNATURE.encode() not in beginning:
        raise UserError(
            f"{file} exists, and is no report of this tool: choose another --out, or add --force "
            "to replace it"
        )


def _render(rows: list[SettingRow], title: str | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"option_value": option_value, "percent": percent, "plural": plural}
    templates.filters |= {"rerun_command": rerun_command, "signed": partial(signed, digits=1)}
    given, rows = rows, with_teachers(rows)
    styles = make_styles(rows)
    spread, curves = page_charts(rows, styles)
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return templates.get_template("template.html.j2").render(
        title=title or summary_text.title(given),
        # The user's title may not name the data.
        data_names=summary_text.data_names(given) if title else [],
        rows=rows,
        given=given,
        styles=styles,
        columns=columns(rows),
        sentences=summary_text.sentences(rows),
        caveats=summary_text.caveats(rows),
        spread=spread,
        curves=curves,
        colours=PAGE_COLOURS,
        headline=summary_text.headline(rows),
        browser=make_browser(rows),
        confusions=compare_confusions(rows),
        script=script,
        script_hash=_hash_of(script),
        in_box_stages=list(dict.fromkeys(chain.from_iterable(row.in_box() for row in rows))),
        per_run_options=PER_RUN_OPTIONS,
        environments=_environments(given),
    )


def _hash_of(script: str) -> str:
    """The hash with which the page's content security policy allows only this script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _environments(rows: list[SettingRow]) -> list[dict[str, Any]]:
    """The machines and versions, each once, with the labels and commands of their rows."""
    environments: dict[str, dict[str, Any]] = {}
    for row in rows:
        for run in row.runs:
            if not run.environment:
                continue
            facts = {k: v for k, v in run.environment.items() if k != "command"}
            new = {"facts": facts, "labels": [], "commands": []}
            environment = environments.setdefault(repr(facts), new)
            # The commands of a row's seeds are nearly the same: show the first one.
            if row.label not in environment["labels"]:
                environment["labels"].append(row.label)
                environment["commands"].append(_command(run.environment.get("command")))
    return list(environments.values())


def rerun_command(run: LoadedRun) -> str:
    """The command that repeats a run in another folder; empty without a recipe."""
    folder = RunFolder(run.folder)
    if not folder.exists:
        return ""
    recipe, out = shlex.quote(str(folder.config_file)), shlex.quote(f"{run.folder}-again")
    networks = run.config.get("model"), run.config.get("teacher")
    trust = any(executed_file(str(name)) is not None for name in networks)
    flags = " --trust-code" if trust else ""
    return f"attention-transfer {run.command} --config {recipe} --out {out}{flags}"


def _command(command: Any) -> str:
    """A command, stored as a list of arguments or as text, for a shell."""
    if isinstance(command, list):
        return shlex.join(map(str, command))
    return str(command or "")
