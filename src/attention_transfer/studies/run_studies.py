"""The studies that are tables of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config import Recipe, layered_recipe, named_recipe
from ..data.open import list_images
from ..errors import UserError, check_choice, plural
from .options import StudyOptions
from .table_file import Table, parse_table

Settings = dict[str, dict[str, Any]]
STUDENT, TEACHER = "wrn-16-1", "wrn-16-2"
# Values of β by convention, with about equal weights for maps of 32×32, 16×16 and 8×8.
BETAS = {
    "authors": (10.0, 30.0, 100.0, 300.0, 1000.0),
    "paper": (0.3, 1.0, 3.0, 10.0, 30.0),
    "caffe": (0.3, 1.0, 3.0, 10.0, 30.0),
}
DECAYS = ("constant", "linear")
SHARES = (1.0, 10.0, 100.0)  # of the labels, in percent
# Fewer labels get more epochs, by the square root: between equal epochs and equal steps.
STRETCH = 0.5
METHOD_NAMES = {"none": "student alone", "at": "AT", "kd": "KD", "at+kd": "AT+KD", "full": "F-ActT"}
# Chosen in short runs (results/cifar10-gradient.md); AT has β = auto.
GRADIENT_BETA = 0.02
GRADIENT_METHODS = ("gradient", "symmetry", "min-l2")
# If the settings have their own epochs, the user's --epochs applies to the teacher.
LENGTH = ("epochs", "milestones")
# A teacher of the same network must have another seed than the student.
TEACHER_SEED = 1000


def method_name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def method_keys(method: str) -> dict[str, Any]:
    """The method with its β, whatever β the recipe has: `auto` for AT."""
    parts = method.split("+")
    beta: dict[str, Any] = {name: GRADIENT_BETA for name in parts if name in GRADIENT_METHODS}
    if "at" in parts:
        beta["at"] = "auto"
    if not beta:
        return {"method": method}
    return {"method": method, "beta": "auto" if [*beta] == ["at"] else beta}


def beta_table(options: StudyOptions, changes: dict[str, Any]) -> Table:
    """Settings for every convention, decay and β."""
    settings: Settings = {"student alone": {"method": "none"}}
    for convention in options.conventions or tuple(BETAS):
        check_choice("convention", convention, BETAS)
        values = options.values or BETAS[convention]
        for decay in DECAYS:
            for beta in values:
                keys = {"beta": beta, "convention": convention, "decay": decay}
                settings[beta_name(convention, decay, beta)] = {"method": "at"} | keys
    settings["auto"] = method_keys("at")
    return _table("β of attention transfer", options, settings)


def beta_name(convention: str, decay: str, beta: float) -> str:
    return f"{convention}, {decay}, β = {beta:g}"


def few_labels_table(options: StudyOptions, changes: dict[str, Any]) -> Table:
    """A row for each share of the labels; the teacher sees all of them."""
    base = _student_recipe(options, changes)
    limit = base.limit_train if "limit_train" in changes else None
    images, _ = list_images(replace(base, limit_train=limit))
    epochs = base.epochs
    # The teacher gets the user's limit, each student its share of it.
    teacher = {"limit_train": None} | _take(changes, "limit_train")
    run_length = _take(changes, *LENGTH)
    rows = []
    for percent in options.values or SHARES:
        if percent > 100:
            raise UserError(f"values has {percent:g}: expected shares in percent, at most 100")
        count = max(1, round(len(images) * percent / 100))
        budget = {"limit_train": count, "epochs": round(epochs * (100 / percent) ** STRETCH)}
        settings = {
            method_name(method): method_keys(method) | budget
            for method in ("none", *(options.methods or ("at", "kd", "at+kd")))
        }
        rows.append({"name": f"{percent:g} %", "settings": settings})
    return _table("Few labels", options, {}, rows, teacher, run_length)


def mechanisms_table(options: StudyOptions, changes: dict[str, Any]) -> Table:
    """Each mechanism, with as many epochs as the FLOPs of `at` allow."""
    from .compute import step_flops

    base = _student_recipe(options, changes, "nin-thin-no-bn", lr=0.03)
    epochs, run_length = base.epochs, _take(changes, *LENGTH)
    teacher = options.teacher or "nin-wide-no-bn"
    methods = options.methods or (
        *("at", "gradient", "symmetry", "min-l2", "full", "kd"),
        *("at+kd", "at+gradient", "at+symmetry"),
    )
    flops = {m: step_flops(base, teacher, m) for m in dict.fromkeys(("none", "at", *methods))}
    settings: Settings = {}
    for method in ("none", *methods):
        budget = max(1, round(epochs * flops["at"] / flops[method]))
        settings[method_name(method)] = method_keys(method) | {"epochs": budget}
    row = {"student": base.model, "teacher": teacher}
    title = "Mechanisms at equal compute"
    return _table(title, options, settings, [row], recipe_options=run_length | {"lr": base.lr})


def same_architecture_table(options: StudyOptions, changes: dict[str, Any]) -> Table:
    """Teachers that are weaker than, the same as, and stronger than their student."""
    student = options.student or STUDENT
    teachers = {"weaker": "wrn-10-1", "same": STUDENT, "stronger": TEACHER}
    if student != STUDENT and not options.teacher:
        raise UserError(
            f"study same-architecture has a weaker and a stronger teacher for {STUDENT} only: "
            f"with --student {student}, expected --teacher, the other network to compare with"
        )
    if options.teacher:
        teachers = {"same": student, "other": options.teacher}
    settings: Settings = {
        method_name(method): method_keys(method)
        for method in ("none", *(options.methods or ("at", "kd", "at+kd")))
    }
    # All teachers train on the student's images, so that they differ only in their architecture.
    rows = [{"name": name, "teacher": teacher} for name, teacher in teachers.items()]
    table = _table("Teachers of the same, a weaker and a stronger network", options, settings, rows)
    recipe = table.recipe if options.recipe else "digits-student"
    return table.model_copy(update={"teacher_seed": TEACHER_SEED, "teacher_recipe": recipe})


def localisation_table(options: StudyOptions, changes: dict[str, Any]) -> Table:
    """Networks of different accuracy: methods, each trained for several numbers of epochs."""
    base = _student_recipe(options, changes)
    _, val = list_images(base)
    if val.boxes is None:
        raise UserError(
            f"study localisation needs boxes of objects, but {base.data} has none: "
            "expected --data digits, or folder:PATH with a boxes.csv"
        )
    epochs, run_length = base.epochs, _take(changes, *LENGTH)
    shares = (1 / 12, 1 / 4, 1 / 2, 1.0)
    lengths = [max(1, round(epochs * share)) for share in shares]
    if options.values:
        lengths = [round(epochs) for epochs in options.values]
        if lengths != [*options.values]:
            raise UserError("values are numbers of epochs here: expected whole numbers, like 1,3,6")
    settings: Settings = {}
    for method in ("none", *(options.methods or ("at", "kd", "at+kd"))):
        for length in dict.fromkeys(lengths):
            name = f"{method_name(method)}, {plural(length, 'epoch')}"
            settings[name] = method_keys(method) | {"epochs": length}
    return _table("Attention and the object", options, settings, recipe_options=run_length)


def _take(changes: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Removes these keys from the changes for all runs, and returns them."""
    return {key: changes.pop(key) for key in keys if key in changes}


def _student_recipe(
    options: StudyOptions, changes: Mapping[str, Any], student: str = STUDENT, **keys: Any
) -> Recipe:
    data = {"data": options.data} if options.data else {}
    if options.recipe:
        keys = {}
    return layered_recipe(
        named_recipe(options.recipe or "digits-student"),
        data,
        keys,
        {"model": options.student or student},
        changes,
    )


def _table(
    title: str,
    options: StudyOptions,
    settings: Settings,
    rows: list[dict[str, Any]] | None = None,
    teacher_options: Mapping[str, Any] | None = None,
    recipe_options: Mapping[str, Any] | None = None,
) -> Table:
    """A table of one or several rows on the networks and images of the options.

    `recipe_options` apply to all runs; a setting may replace them, as `epochs`.
    """
    pair = {"student": options.student or STUDENT, "teacher": options.teacher or TEACHER}
    values: dict[str, Any] = {
        "title": title,
        "recipe": options.recipe or "digits-student",
        "teacher_recipe": options.recipe or "digits-teacher",
        "options": ({"data": options.data} if options.data else {}) | dict(recipe_options or {}),
        "teacher_options": dict(teacher_options or {}),
        "settings": settings,
        "rows": [pair | row for row in rows or [{}]],
    }
    return parse_table(values, f"study {options.study}")


TABLES: dict[str, Callable[[StudyOptions, dict[str, Any]], Table]] = {
    "beta": beta_table,
    "few-labels": few_labels_table,
    "mechanisms": mechanisms_table,
    "same-architecture": same_architecture_table,
    "localisation": localisation_table,
}
