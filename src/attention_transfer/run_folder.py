"""The run folder: what its files are called, and how each is written so that a crash never leaves half of one.

config.yaml          the effective recipe; `--config` of it runs the same thing again
environment.json     versions, hardware, commit, command, what `auto` decided
metrics.jsonl        a line an epoch
checkpoint.pt        all that is needed to continue (not the teacher's weights)
student.safetensors  the last epoch's weights, its metadata the network's name, classes and preprocessing
maps.npz             attention maps of a few validation images, for the report
report.html          opens from disk
summary.json         only when the run is finished
logs/                what `--log` wrote, and how far it has come
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RunError, UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` that takes its place when the block ends well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"cannot write {path}: {error.strerror}; the last good one is kept: make room and run the command again"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


class RunFolder:
    """A run's folder, read and written by the names above. Reading what is not there gives None or an empty list."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoint_file = self.path / "checkpoint.pt"
        self.student_file = self.path / "student.safetensors"
        self.maps_file = self.path / "maps.npz"
        self.report_file = self.path / "report.html"
        self.summary_file = self.path / "summary.json"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        return self.config_file.is_file()

    @property
    def finished(self) -> bool:
        return self.summary_file.is_file()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run folder.

        Raises:
            UserError: where `path` holds no run.
        """
        run = cls(path)
        if not run.exists:
            what = (
                "is not a run folder: it has no config.yaml"
                if run.path.is_dir()
                else "does not exist"
            )
            raise UserError(f"{path} {what}; a run folder is what --out of train or distill named")
        return run

    def config(self) -> dict[str, Any]:
        found = _yaml(self.config_file) or {}
        if not isinstance(found, dict):
            raise UserError(
                f"{self.config_file} holds a {type(found).__name__}: expected options as KEY: VALUE lines"
            )
        return found

    def write_config(self, config: Mapping[str, Any]) -> None:
        import yaml

        with replacing(self.config_file) as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def environment(self) -> dict[str, Any]:
        return read_json(self.environment_file) or {}

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.summary_file)

    def metrics(self) -> list[dict[str, Any]]:
        """The finished epochs, oldest first; a last line cut short by a crash is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file: a continued run drops the epochs that came after its checkpoint."""
        with replacing(self.metrics_file) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text()) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def find_runs(paths: list[str | os.PathLike[str]]) -> list[RunFolder]:
    """The run folders that `paths` name: each a run, or a folder of runs at any depth (its seeds, a whole demo).

    What lies within a run (its logs) is none.

    Raises:
        UserError: for a path with no run in it.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        run = RunFolder(path)
        inside = [run]
        if not run.exists:
            folders = [f.parent for f in sorted(run.path.rglob("config.yaml"))]
            inside = [
                RunFolder(f) for f in folders if not any(other in f.parents for other in folders)
            ]
        if not inside:
            raise UserError(
                f"no run in {path}: expected a run folder (with config.yaml) or a folder of them"
            )
        found.update({r.path.resolve(): r for r in inside})
    return list(found.values())
