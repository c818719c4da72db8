"""The files of a run folder, each written atomically: a crash never leaves half a file.

config.yaml          the effective recipe; `--config` with it repeats the run
environment.json     versions, hardware, commit, command, the choices of `auto`, fingerprints
metrics.jsonl        a line for each epoch
checkpoint.pt        everything that a run needs to continue (not the teacher's weights)
checkpoint-previous.pt  the previous checkpoint, until the run is finished
student.safetensors  the last epoch's weights; metadata: the network's name, classes, preprocessing
maps.npz             attention maps of a few validation images, for the report
predictions.npz      the classes that student and teacher give the validation images
report.html          opens from disk
summary.json         only when the run is finished
logs/                the files of `--log`, and the last step of each logger
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import socket
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .authors_log import MODEL_FILE, is_authors_run
from .errors import RunError, UserError, first_line, nearest
from .run_lock import RunLock
from .run_schema import Config, Environment, MetricsRow, Summary, validated

ZOO = "zoo:"  # prefix for networks of the package; each is a run folder in zoo/
ZOO_FOLDER = Path(__file__).parent / "zoo"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `path` if the block succeeds.

    A link is kept, and its target is replaced. A device or a pipe is written to.

    Raises:
        RunError: if the disk is full; the old file is kept.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / "content"
            yield partial
            _write_special(path, partial.read_bytes())
        return
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename cannot cross file systems. Hidden, because a killed
    # process leaves it, and the checks for an empty folder skip hidden files. With the host and the
    # process's number, so that two processes that write the same file do not mix their contents.
    partial = target.with_name(f".{target.name}.{_host()}-{os.getpid()}.partial")
    remove_partial_files(target.parent, target.name)
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        if error.filename == str(partial):
            error.filename = str(path)  # the name that the user knows
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"cannot write {path}: {error.strerror}; the last good one is kept: "
            "make room and run the command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path, file_name: str | None = None) -> None:
    """Removes what killed processes of this host left of `replacing`: of one file, or of all."""
    pattern = "*" if file_name is None else glob.escape(file_name)
    for partial in folder.glob(f".{pattern}.*.partial"):
        name = re.fullmatch(rf"\..+\.{_host()}-([0-9]+)\.partial", partial.name)
        if name is not None and partial.is_file() and not _is_running(int(name[1])):
            partial.unlink(missing_ok=True)


def _host() -> str:
    """Eight characters for this host; a container has its own name."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_running(process: int) -> bool:
    if sys.platform == "win32":
        return True  # unknown: there, `os.kill` ends a process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def is_special(path: Path) -> bool:
    """Whether `path` is a device, a pipe or an open file of this process, such as /dev/stdout.

    Raises:
        OSError: for a name that is too long, and for circular links.
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: Path) -> int | None:
    """The number of an open file of this process, if `path` names one."""
    standard = {"/dev/stdout": 1, "/dev/stderr": 2}
    if str(path) in standard:
        return standard[str(path)]
    match = re.fullmatch(r"(?:/dev|/proc/self)/fd/(\d{1,9})", str(path))
    return int(match[1]) if match else None


def _write_special(path: Path, content: bytes) -> None:
    descriptor = _descriptor(path)
    if descriptor is None:
        path.write_bytes(content)
        return
    # Opening /dev/stdout again would truncate the file that it is redirected to.
    sys.stdout.flush()
    try:
        stream = os.fdopen(os.dup(descriptor), "wb")
    except OSError as error:
        error.filename = str(path)
        raise
    with stream:
        stream.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def zoo_names() -> list[str]:
    """The networks that come with the package, as `zoo:NAME`."""
    return [ZOO + file.parent.name for file in sorted(ZOO_FOLDER.glob("*/config.yaml"))]


def run_path(name: str | os.PathLike[str]) -> Path:
    """The folder of a run: `name` itself, or that of `zoo:NAME`.

    Raises:
        UserError: for a network that does not come with the package.
    """
    if not str(name).startswith(ZOO):
        return Path(name)
    names = zoo_names()
    if str(name) not in names:
        raise UserError(
            f"the package has no model {str(name)!r}: expected one of "
            f"{', '.join(names) or 'none yet'}{nearest(str(name), names)}"
        )
    return ZOO_FOLDER / str(name).removeprefix(ZOO)


def is_folder_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a folder, or `zoo:NAME`."""
    return run_path(name).is_dir()


class RunFolder:
    """Reads and writes a run's folder. A missing file is read as None or as empty."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = run_path(path)
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoint_file = self.path / "checkpoint.pt"
        self.previous_checkpoint_file = self.path / "checkpoint-previous.pt"
        self.student_file = self.path / "student.safetensors"
        self.maps_file = self.path / "maps.npz"
        self.predictions_file = self.path / "predictions.npz"
        self.report_file = self.path / "report.html"
        self.summary_file = self.path / "summary.json"
        self.lock = RunLock(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        return self.config_file.is_file()

    @property
    def files(self) -> list[Path]:
        """The files that training writes: all paths among the attributes but the folder itself."""
        return [p for p in vars(self).values() if isinstance(p, Path) and p != self.path]

    @property
    def finished(self) -> bool:
        return self.summary_file.is_file()

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint_file.is_file() or self.previous_checkpoint_file.is_file()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run folder.

        Raises:
            UserError: if `path` is not a run.
        """
        run = cls(path)
        if not run.exists:
            seeds = sorted(run.path.glob("seed-*/config.yaml"))
            if seeds:
                raise UserError(f"{path} holds several seeds: name one, like {seeds[0].parent}")
            problem = "does not exist"
            if run.path.is_dir():
                problem = "is not a run folder: it has no config.yaml"
            raise UserError(
                f"{path} {problem}; name the folder that train or distill wrote (--out)"
            )
        return run

    def config(self) -> dict[str, Any]:
        if not self.exists:
            return {}
        return validated(read_yaml_mapping(self.config_file), Config, self.config_file)

    def write_config(self, config: Mapping[str, Any]) -> None:
        import yaml

        with replacing(self.config_file) as partial:
            partial.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def environment(self) -> dict[str, Any]:
        return read_json(self.environment_file, Environment) or {}

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.summary_file, Summary)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of finished epochs, oldest first, without keys that are null.

        A last line cut short by a crash is left out.

        Raises:
            UserError: for any other line that is damaged; the message names it.
        """
        if not self.metrics_file.is_file():
            return []
        rows = []
        lines = _read_text(self.metrics_file).splitlines()
        for number, line in enumerate(lines, start=1):
            source = f"{self.metrics_file}, line {number},"
            try:
                value = parse_json(line, source)
            except UserError:
                if number == len(lines):
                    break
                raise
            row = validated(value, MetricsRow, source)
            rows.append({key: item for key, item in row.items() if item is not None})
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file: a continued run drops the epochs after its checkpoint."""
        with replacing(self.metrics_file) as partial:
            partial.write_bytes(_json_lines(rows))

    def restore_metrics(self, rows: list[dict[str, Any]]) -> bool:
        """Rewrites metrics.jsonl unless it begins with `rows`; returns whether it was rewritten."""
        expected = _json_lines(rows)
        if self.metrics_file.is_file() and self.metrics_file.read_bytes().startswith(expected):
            return False
        self.write_metrics(rows)
        return True


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_json(path: Path, schema: type[BaseModel]) -> dict[str, Any] | None:
    """The object in a JSON file, checked against `schema`, or None if there is no file.

    Raises:
        UserError: for a file that is not JSON, and for a value of another type.
    """
    if not path.is_file():
        return None
    return validated(parse_json(_read_text(path), path), schema, path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def parse_json(content: str, source: str | Path) -> Any:
    """The value of a JSON text; `source` names the text in an error.

    Raises:
        UserError: for a text that is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {first_line(error)}") from error


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UserError: for a file that is not YAML or not a mapping.
        OSError: for a file that cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses repeated keys; PyYAML would silently take the last value."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"the key {key!r} is given twice")
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a {type(value).__name__}: expected options as KEY: VALUE lines"
        )
    return value


def is_run_config(file: Path) -> bool:
    """Whether a recipe file is the config.yaml that a run wrote."""
    run = RunFolder(file.resolve().parent)
    # Any other file of a run, so that a run cannot pass for a recipe after somebody removed one.
    # `compare` writes a report.html, too.
    others = [own for own in run.files if own not in (run.config_file, run.report_file)]
    return file.resolve() == run.config_file and any(own.is_file() for own in others)


def find_runs(paths: list[str | os.PathLike[str]]) -> list[RunFolder]:
    """The runs in `paths`: each path is a run, or a folder with runs at any depth.

    Runs of the authors' scripts are included; folders inside a run, such as its logs, are not.

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
                runs[folder.resolve()] = RunFolder(folder)  # once, even if it is named twice
    return list(runs.values())
