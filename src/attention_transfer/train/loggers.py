"""`--log`: each epoch's row of metrics to Lightning's loggers, in RUN/logs or at a service."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ..config import Recipe
from ..errors import UserError
from ..run_folder import RunFolder, read_json, write_json
from .options import logger_names

PROJECT = "attention-transfer"
# Any one of these will do; csv needs none.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}

Row = Mapping[str, Any]


def check_loggers(recipe: Recipe) -> None:
    """Raises `UserError` for a logger whose package is missing."""
    for name in logger_names(recipe):
        packages = PACKAGES.get(name, ())
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(
                f"--log {name} needs the package {packages[0]}: pip install 'attention-transfer[{name}]'"
            )


def flat(row: Row) -> dict[str, float]:
    """The numbers of a row by one name each: parts/at, weights/at; without the step, which loggers take by itself."""
    found: dict[str, float] = {}
    for key, value in row.items():
        pairs = (
            [(f"{key}/{k}", v) for k, v in value.items()]
            if isinstance(value, Mapping)
            else [(key, value)]
        )
        found.update({k: v for k, v in pairs if isinstance(v, (int, float))})
    found.pop("step", None)
    return found


class Loggers:
    """The loggers of one run. RUN/logs/state.json keeps how far each has come, so that a run that continues repeats
    no epoch and leaves none out.

    Args:
        say: what a person should know.

    Raises:
        UserError: for a logger that cannot begin, as a service without a key.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: RunFolder,
        options: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self.say = say
        self.place = folder.path / "logs"
        self.state: dict[str, dict[str, Any]] = read_json(self.place / "state.json") or {}
        self.open: dict[str, Any] = {}
        for name in names:
            state = self.state.setdefault(name, {"step": 0, "id": None})
            try:
                with _quiet():
                    self.open[name] = _begin(name, folder, state, options)
            except Exception as error:
                key = "a key (wandb login) and the network, or WANDB_MODE=offline"
                expected = key if name == "wandb" else "a folder that can be written to"
                raise UserError(
                    f"--log {name} cannot begin ({_first_line(error)}): expected {expected}; see to it, or leave it out"
                ) from error

    def write(self, rows: Sequence[Row]) -> None:
        """Logs those of a run's rows that are new. A logger that fails is done without: the run is worth more."""
        for name, logger in list(self.open.items()):
            state = self.state[name]
            try:
                with _quiet():
                    for row in rows:
                        if row["step"] > state["step"]:
                            logger.log_metrics(flat(row), step=row["step"])
                            state["step"] = row["step"]
                    logger.save()
                write_json(self.place / "state.json", self.state)
            except Exception as error:
                del self.open[name]
                self.say(
                    f"warning: --log {name} failed ({_first_line(error)}): the run goes on without it; metrics.jsonl "
                    "has every epoch"
                )

    def close(self, status: str) -> None:
        for name, logger in self.open.items():
            try:
                with _quiet():
                    logger.finalize(status)
                    if name == "wandb":
                        logger.experiment.finish()  # else the next run of this process would be taken for the same
            except Exception as error:
                self.say(f"warning: --log {name} did not end well ({_first_line(error)})")


@contextmanager
def logging_to(
    recipe: Recipe, folder: RunFolder, say: Callable[[str], None], here: bool
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """What takes the rows of a run so far; where it is not `here` (another process logs), nothing is done with them."""
    names = logger_names(recipe) if here else []
    loggers = Loggers(names, folder, recipe.to_dict(), say)
    status = "failed"
    try:
        yield loggers.write
        status = "success"
    finally:
        loggers.close(status)


def _begin(name: str, folder: RunFolder, state: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """A logger that has begun to write; of a run that continues, where it stopped."""
    place = folder.path.resolve() / "logs"
    if name == "csv":
        from lightning.fabric.loggers import CSVLogger

        # It cannot append to what another process wrote: all is written again, from the rows.
        state["step"] = 0
        (place / "csv" / "metrics.csv").unlink(missing_ok=True)
        (place / "csv").mkdir(parents=True, exist_ok=True)
        made: Any = CSVLogger(place, name="csv", version="")
    elif name == "tensorboard":
        from lightning.fabric.loggers import TensorBoardLogger

        # TensorBoard forgets what a killed process had written beyond this step.
        after = {"purge_step": state["step"] + 1} if state["step"] else {}
        made = TensorBoardLogger(place, name="tensorboard", version="", **after)
    else:
        from lightning.pytorch.loggers import WandbLogger

        state["id"] = (
            state["id"] or uuid.uuid4().hex[:8]
        )  # by which a run that continues is the same run there
        place.mkdir(parents=True, exist_ok=True)
        title = "/".join(folder.path.resolve().parts[-2:])
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        made = WandbLogger(
            name=title, save_dir=place, project=project, id=state["id"], resume="allow"
        )
        made.log_hyperparams(dict(options))
    assert made.experiment is not None  # it begins here
    return made


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Loggers warn of what is meant here: folders that hold an earlier part of the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
