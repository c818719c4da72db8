"""`--log`: sends each epoch's metrics to Lightning's loggers, in RUN/logs or at a service."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..quiet import quiet
from ..run_folder import RunFolder, read_json, write_json
from ..run_schema import LoggerStates
from .options import LogOptions, logger_names

PROJECT = "attention-transfer"
# A logger needs one of its packages; csv needs none.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
MAPS = "attention maps"  # the name of the picture

Row = Mapping[str, Any]


def check_loggers(options: LogOptions) -> list[str]:
    """The loggers by name. Raises `UserError` for one whose package is missing."""
    names = logger_names(options)
    for name in names:
        packages = PACKAGES.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(
                f"--log {name} needs the package {packages[0]}: "
                f"pip install 'attention-transfer[{name}]'"
            )
    return names


def flatten_row(row: Row) -> dict[str, float]:
    """The numbers of a row, each with one name such as parts/at; without the step."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{name}": number for name, number in value.items()}
        elif isinstance(value, (int, float)) and key != "step":
            numbers[key] = value
    return numbers


class Loggers:
    """The loggers of one run.

    RUN/logs/state.json keeps the last step of each, so that a run that continues neither repeats
    nor leaves out an epoch.

    Args:
        config: the options of the run, for loggers that keep them.
        say: prints a line.

    Raises:
        UserError: for a logger that cannot start, such as a service without a key.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: RunFolder,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self.say = say
        self.state_file = folder.path / "logs" / "state.json"
        self.state: dict[str, dict[str, Any]] = read_json(self.state_file, LoggerStates) or {}
        self.loggers: dict[str, Any] = {}
        for name in names:
            state = self.state.setdefault(name, {"step": 0, "id": None})
            try:
                with quiet():
                    self.loggers[name] = _begin(name, folder, state, config)
            except Exception as error:
                expected = "a folder that can be written to"
                if name == "wandb":
                    expected = "a key (wandb login) and the network, or WANDB_MODE=offline"
                elif name == "mlflow":
                    expected = "a server at MLFLOW_TRACKING_URI, or without it a writable folder"
                raise UserError(
                    f"--log {name} cannot start ({first_line(error)}): expected {expected}; "
                    f"provide it, or leave --log {name} out"
                ) from error

    def write(self, rows: Sequence[Row]) -> None:
        """Logs the new rows of a run. A logger that fails is dropped; training goes on."""
        for name, logger in list(self.loggers.items()):
            state = self.state[name]
            try:
                with quiet():
                    for row in rows:
                        if row["step"] > state["step"]:
                            logger.log_metrics(flatten_row(row), step=row["step"])
                            state["step"] = row["step"]
                    logger.save()
                write_json(self.state_file, self.state)
            except Exception as error:
                del self.loggers[name]
                self.say(
                    f"warning: --log {name} failed ({first_line(error)}): the run goes on "
                    "without it; metrics.jsonl has every epoch"
                )

    def show_maps(self, step: int, draw: Callable[[Path], bool]) -> None:
        """Hands each logger the picture of attention maps that `draw` writes to a file.

        Args:
            draw: writes a PNG, and returns whether there was anything to draw.
        """
        pictured = {name: log for name, log in self.loggers.items() if name in PACKAGES}
        if not pictured:
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "attention-maps.png"
            try:
                if not draw(file):
                    return
                for name, logger in pictured.items():
                    with quiet():
                        _log_picture(name, logger, file, step)
            except Exception as error:  # the run is finished, and its folder has the maps
                self.say(f"warning: the attention maps were not logged ({first_line(error)})")

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("success" if kind is None else "failed")

    def close(self, status: str) -> None:
        for name, logger in self.loggers.items():
            try:
                with quiet():
                    logger.finalize(status)
                    if name == "wandb":
                        # wandb would log the next run of this process as the same one.
                        logger.experiment.finish()
            except Exception as error:
                self.say(f"warning: --log {name} could not be closed ({first_line(error)})")


def _begin(name: str, folder: RunFolder, state: dict[str, Any], config: Mapping[str, Any]) -> Any:
    """A started logger, which appends after `state["step"]` if the run continues."""
    logs = folder.path.resolve() / "logs"
    logger: Any
    if name == "csv":
        from lightning.fabric.loggers import CSVLogger

        # CSVLogger cannot append to an existing file, so all rows are written again.
        state["step"] = 0
        (logs / "csv" / "metrics.csv").unlink(missing_ok=True)
        (logs / "csv").mkdir(parents=True, exist_ok=True)
        logger = CSVLogger(logs, name="csv", version="")
    elif name == "tensorboard":
        from lightning.fabric.loggers import TensorBoardLogger

        # TensorBoard then ignores the rows that a killed process wrote after this step.
        purge_step = state["step"] + 1 if state["step"] else None
        logger = TensorBoardLogger(logs, "tensorboard", version="", purge_step=purge_step)
    elif name == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            # By default MLflow writes into the current folder.
            uri, artifacts = f"sqlite:///{logs}/mlflow.db", f"file://{logs}/mlflow"
            logs.mkdir(parents=True, exist_ok=True)
        logger = MLFlowLogger(
            experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=_run_name(folder),
            tracking_uri=uri,
            artifact_location=artifacts,
            run_id=state["id"],
        )
        if state["id"] is None:
            logger.log_hyperparams(dict(config))
        state["id"] = logger.run_id
    else:
        from lightning.pytorch.loggers import WandbLogger  # Fabric has no W&B logger

        # wandb continues a run by its id.
        state["id"] = state["id"] or uuid.uuid4().hex[:8]
        logs.mkdir(parents=True, exist_ok=True)
        logger = WandbLogger(
            name=_run_name(folder),
            save_dir=logs,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=state["id"],
            resume="allow",
        )
        logger.log_hyperparams(dict(config))
    assert logger.experiment is not None  # reading this property opens the files or the connection
    return logger


def _run_name(folder: RunFolder) -> str:
    return "/".join(folder.path.resolve().parts[-2:])


def _log_picture(name: str, logger: Any, file: Path, step: int) -> None:
    if name == "tensorboard":
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        logger.experiment.add_image(MAPS, pixels, step, dataformats="HWC")
        logger.save()
    elif name == "wandb":
        # Without a step, because W&B takes no more values for the last row's step.
        logger.log_image(MAPS, [str(file)])
    else:
        logger.experiment.log_artifact(logger.run_id, str(file))
