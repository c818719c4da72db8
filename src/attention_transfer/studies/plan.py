"""The plan of a table: its runs, each once, in folders named after their options."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import Recipe, layered_recipe, named_recipe
from ..errors import UserError
from ..launch import Task
from ..methods.base import can_learn_from_store
from ..methods.registry import create_methods, needs_teacher
from ..options import from_mapping, option_specs
from ..run_folder import ZOO, RunFolder, is_folder_name
from ..store.header import view_options
from ..train.options import TrainingOptions
from .table_file import TEACHER, Row, Table

# The folder's name contains model, method and seed; paths of other runs enter the digest relative
# to the root.
NOT_IN_DIGEST = ("seed", "teacher", "student_weights", "model", "method")


@dataclass
class Entry:
    """A setting of a row: its runs, one per seed, and the published figures by metric."""

    row: Row
    setting: str
    folders: list[RunFolder] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    confirmed: bool = False


@dataclass
class Plan:
    """The runs of a table by folder, in the order of their dependencies, and the table's cells."""

    title: str
    root: Path
    metrics: tuple[str, ...] = ("error",)
    source: str = ""
    tasks: dict[Path, Task] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    errors: dict[Path, Exception] = field(default_factory=dict)  # of the runs that failed

    def add(self, recipe: Recipe, after: tuple[RunFolder, ...] = ()) -> RunFolder:
        """The folder of a run; adds the run to the plan unless the plan has it."""
        folder = RunFolder(self.root / "runs" / run_name(recipe, self.root))
        log = self.root / "logs" / f"{folder.path.relative_to(self.root / 'runs')}.txt"
        self.tasks.setdefault(folder.path, Task(recipe, folder, after, log))
        return folder

    @property
    def unfinished(self) -> list[Task]:
        return [task for task in self.tasks.values() if not task.folder.finished]


def run_name(recipe: Recipe, root: Path) -> str:
    """`wrn-16-1/at-3f2a91c4/seed-0`: the network, the method, a digest of all other options.

    The same run has the same name in all tables. Options with their default value are not in the
    digest, so that a new option does not rename runs.
    """
    defaults = {key: spec.default for key, spec in option_specs(Recipe).items()}
    options: dict[str, Any] = {}
    for key, value in recipe.identity().items():
        default = defaults[key]
        if isinstance(default, tuple):
            default = list(default)
        if key not in NOT_IN_DIGEST and value != default:
            options[key] = value
    for key in ("teacher", "student_weights"):
        place = getattr(recipe, key)
        if place is not None:
            # Relative to the root, so that the digest does not depend on the root.
            options[key] = str(place).removeprefix(f"{root}/")
    model = re.sub(r"[^\w.+-]+", "-", recipe.model)
    return f"{model}/{recipe.method}-{_digest(options)}/seed-{recipe.seed}"


def store_name(recipe: Recipe) -> str:
    """`4-views-3f2a91c4`: the options that runs must have in common to share a teacher's store.

    A store has room for all images of the data, so runs on a part of them share it, too.
    """
    keys = ("data", "image_size", "store_dtype", "top_k")
    options = view_options(recipe) | {key: getattr(recipe, key) for key in keys}
    return f"{recipe.views}-views-{_digest(options)}"


def _digest(options: Mapping[str, Any]) -> str:
    text = json.dumps(options, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def make_plan(
    table: Table,
    rows: list[Row],
    seeds: int,
    root: Path,
    data: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Plan:
    """All runs of the rows: pretraining, teachers, students.

    Args:
        data: data specs by name; "" is the spec for all rows.
        changes: recipe keys that override all others.

    Raises:
        UserError: for missing data, and for options that contradict each other.
    """
    root = root.resolve()  # a run's recipe names its teacher's folder
    plan = Plan(table.title, root, tuple(table.metrics), table.source)
    planner = _Planner(table, plan, _checked_data(table, rows, data or {}), dict(changes or {}))
    for row in rows:
        planner.add_row(row, seeds)
    return plan


def _checked_data(table: Table, rows: list[Row], data: Mapping[str, str]) -> dict[str, str]:
    names = list(dict.fromkeys(row.data for row in rows if row.data))
    valid = [*table.data_names]
    if table.pretraining is not None:
        valid.append(table.pretraining.data)
    for name in data:
        if name and name not in valid:
            raise UserError(
                f"--data names {name!r}: expected {', '.join(valid) or 'one spec without a name'}"
            )
    specs = dict(data)
    if "" in specs and len(names) == 1:
        specs[names[0]] = specs[""]
    missing = [name for name in names if name not in specs]
    if missing:
        example = ",".join(f"{name}=folder:{name.upper()}" for name in names)
        if len(names) == 1:
            example = f"folder:{names[0].upper()}"
        raise UserError(f"{table.title} needs your copy of {', '.join(missing)}: --data {example}")
    return specs


class _Planner:
    def __init__(self, table: Table, plan: Plan, data: dict[str, str], changes: dict[str, Any]):
        self.table, self.plan, self.data, self.changes = table, plan, data, changes

    def add_row(self, row: Row, seeds: int) -> None:
        settings = row.settings or self.table.settings
        teacher = self._teacher(row)
        for name, options in settings.items():
            entry = self._entry(row, name)
            for seed in range(seeds):
                recipe, after = self._student(row, options, teacher, seed)
                entry.folders.append(self.plan.add(recipe, after))
        if teacher is not None:
            self._entry(row, TEACHER).folders.append(teacher)

    def _entry(self, row: Row, setting: str) -> Entry:
        entry = Entry(row, setting, confirmed=setting in row.confirmed)
        figures = row.published.get(setting, [])
        if isinstance(figures, float):
            figures = [figures]
        entry.published = dict(zip(self.table.metrics, figures, strict=False))
        self.plan.entries.append(entry)
        return entry

    def _layers(self, row: Row, recipe: str | None) -> list[Mapping[str, Any]]:
        layers: list[Mapping[str, Any]] = []
        if recipe is not None:
            layers.append(named_recipe(recipe))
        options = self.table.options | row.options
        spec = self.data.get(row.data or "")
        if spec is not None:
            # A layer below the options, so that they override the defaults of the data.
            layers.append({"data": spec})
            options.pop("data", None)
        return [*layers, options]

    def _teacher(self, row: Row) -> RunFolder | None:
        if row.teacher is None:
            return None
        if is_trained(row.teacher):
            return _trained_teacher(row)
        start, after = self._start(row.teacher)
        recipe = self._recipe(
            *self._layers(row, self.table.teacher_recipe or self.table.recipe),
            self.table.teacher_options,
            row.teacher_options,
            start,
            {"command": "train", "seed": self.table.teacher_seed},
            # Only students share a teacher's outputs for fixed views.
            without=("views",),
        )
        return self.plan.add(recipe, after)

    def _student(
        self, row: Row, options: Mapping[str, Any], teacher: RunFolder | None, seed: int
    ) -> tuple[Recipe, tuple[RunFolder, ...]]:
        start, after = self._start(row.student)
        roles: dict[str, Any] = {"command": "train", "seed": seed}
        if options.get("method", "none") != "none":
            roles["command"] = "distill"
            if teacher is not None and needs_teacher(options["method"]):
                roles["teacher"] = _place(row, teacher)
                after = (*after, teacher)
        recipe = self._recipe(*self._layers(row, self.table.recipe), options, start, roles)
        if (
            teacher is not None
            and recipe.views is not None
            and can_learn_from_store(create_methods(recipe))
        ):
            # One store for all runs with this teacher, these images and these views.
            runs, place = self.plan.root / "runs", _place(row, teacher)
            name = Path(f"{teacher.path.name}-{_digest({'teacher': place})}")
            if teacher.path.is_relative_to(runs):
                name = teacher.path.relative_to(runs)
            store = self.plan.root / "stores" / name / store_name(recipe)
            recipe = replace(recipe, store=str(store))
        return recipe, after

    def _start(self, model: str) -> tuple[dict[str, Any], tuple[RunFolder, ...]]:
        """The network that a run starts from, and the run that has to be done before."""
        pretraining = self.table.pretraining
        if pretraining is None:
            return {"model": model}, ()
        if pretraining.data not in self.data:
            return {"model": f"{model}:pretrained"}, ()
        recipe = self._recipe(
            named_recipe(pretraining.recipe),
            {"data": self.data[pretraining.data], "model": model, "command": "train"},
            without=("views",),
        )
        folder = self.plan.add(recipe)
        return {"model": model, "student_weights": str(folder)}, (folder,)

    def _recipe(self, *layers: Mapping[str, Any], without: tuple[str, ...] = ()) -> Recipe:
        """Merges the layers and the changes; milestones keep their position relative to epochs."""
        changes = {key: value for key, value in self.changes.items() if key not in without}
        recipe = layered_recipe(*layers, changes)
        epochs = _epochs_of_milestones([*layers, changes])
        if recipe.schedule != "step" or epochs in (None, recipe.epochs):
            return recipe
        factor = recipe.epochs / epochs
        milestones = dict.fromkeys(1 + round((m - 1) * factor) for m in recipe.milestones)
        # A milestone at epoch 1 would only lower the initial rate.
        return replace(recipe, milestones=tuple(m for m in milestones if 1 < m <= recipe.epochs))


def is_trained(teacher: str) -> bool:
    """Whether a row's teacher is a run folder or `zoo:NAME`; a table trains all others."""
    # The name of a network stays one if a folder of the same name exists.
    is_network = re.fullmatch(r"(wrn|nin)-[\w-]+", teacher) is not None
    return not is_network and is_folder_name(teacher)


def _trained_teacher(row: Row) -> RunFolder:
    assert row.teacher is not None
    run = RunFolder.open(row.teacher)
    if not run.finished:
        raise UserError(
            f"the teacher {row.teacher} is not finished: run its command again to continue it"
        )
    if row.teacher_options:
        raise UserError(
            f"row {row.key} has teacher_options, but its teacher is trained: leave them out"
        )
    return RunFolder(run.path.resolve())


def _place(row: Row, teacher: RunFolder) -> str:
    """The teacher of a row in recipes: `zoo:NAME`, the same on all machines, or its folder."""
    assert row.teacher is not None
    return row.teacher if row.teacher.startswith(ZOO) else str(teacher)


def _epochs_of_milestones(layers: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of epochs that the milestones refer to: that of the layer which sets them."""
    epochs, milestone_epochs = option_specs(Recipe)["epochs"].default, None
    for layer in layers:
        epochs = layer.get("epochs", epochs)
        if "milestones" in layer:
            milestone_epochs = epochs
    if milestone_epochs is None:
        return None
    # A flag's value is text so far.
    return from_mapping(TrainingOptions, {"epochs": milestone_epochs}).epochs
