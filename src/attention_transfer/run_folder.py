"""The files of a run folder, each written so that a crash never leaves half of one.

config.yaml          the effective recipe; `--config` of it runs the same thing again
environment.json     versions, hardware, commit, command, what `auto` decided
metrics.jsonl        a line for each epoch
checkpoint.pt        all that is needed to continue (not the teacher's weights)
student.safetensors  the last epoch's weights; metadata: the network's name, classes, preprocessing
maps.npz             attention maps of a few validation images, for the report
report.html          opens from disk
summary.json         only when the run is finished
logs/                what `--log` wrote, and the last step of each logger
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .authors_log import MODEL_FILE, is_authors_run
from .errors import RunError, UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`, which replaces it if the block succeeds.

    Raises:
        RunError: if the disk is full; the old file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"cannot write {path}: {error.strerror}; the last good one is kept: "
            "make room and run the command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


class RunFolder:
    """Reads and writes a run's folder. A missing file reads as None or as empty."""

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
            UserError: if `path` holds no run.
        """
        run = cls(path)
        if not run.exists:
            seeds = sorted(run.path.glob("seed-*/config.yaml"))
            if seeds:
                # It is what --out named, as the message below would say.
                raise UserError(f"{path} holds several seeds: name one, like {seeds[0].parent}")
            problem = "does not exist"
            if run.path.is_dir():
                problem = "is not a run folder: it has no config.yaml"
            raise UserError(
                f"{path} {problem}; a run folder is what --out of train or distill named"
            )
        return run

    def config(self) -> dict[str, Any]:
        if not self.exists:
            return {}
        return read_yaml_mapping(self.config_file)

    def write_config(self, config: Mapping[str, Any]) -> None:
        import yaml

        with replacing(self.config_file) as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def environment(self) -> dict[str, Any]:
        return read_json(self.environment_file) or {}

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.summary_file)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of finished epochs, oldest first, without a last line that a crash cut short."""
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
        """Replaces the file: a continued run drops the epochs after its checkpoint."""
        with replacing(self.metrics_file) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file.

    Raises:
        UserError: for a file that is not JSON.
    """
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return value


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UserError: for a file that is not YAML or holds no mapping.
        OSError: for a file that cannot be read.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a {type(value).__name__}: expected options as KEY: VALUE lines"
        )
    return value


def find_runs(paths: list[str | os.PathLike[str]]) -> list[RunFolder]:
    """The runs that `paths` name: each path a run, or a folder with runs at any depth.

    Runs of the authors' scripts count; folders inside a run, such as its logs, do not.

    Raises:
        UserError: for a path without a run.
    """
    runs: dict[Path, RunFolder] = {}
    for path in paths:
        folders = [Path(path)]
        if not RunFolder(path).exists and not is_authors_run(Path(path)):
            files = [*Path(path).rglob("config.yaml"), *Path(path).rglob(MODEL_FILE)]
            folders = sorted({file.parent for file in files})
        if not folders:
            raise UserError(
                f"no run in {path}: expected a run folder (with config.yaml, or the authors' "
                f"{MODEL_FILE}) or a folder of them"
            )
        for folder in folders:
            if not any(other in folder.parents for other in folders):
                runs[folder.resolve()] = RunFolder(folder)  # once, however often it is named
    return list(runs.values())
