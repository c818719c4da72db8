"""Describes the results: a title, a sentence for each setting, and caveats."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import plural
from ..stats import Spread
from .formats import count, data_name, significant
from .load_run import finite_number
from .rows import SettingRow, error_percent, teacher_name


def error_digits(rows: list[SettingRow]) -> int:
    """Digits after the decimal point of an error in percent: two once any row is below 10 %."""
    if any(row.error is not None and row.error.mean < 10 for row in rows):
        return 2
    return 1


def title(rows: list[SettingRow]) -> str:
    """`WRN-16-2 → WRN-16-1 on cifar10`."""
    students = [row for row in rows if row.first.command == "distill"]
    # Without students the title names the networks that were trained alone.
    text = _list_names(row.model for row in students or rows)
    teachers = _list_names(teacher_name(row) for row in students)
    data = _list_names(data_names(rows))
    if teachers:
        text = f"{teachers} → {text}"
    if data:
        text = f"{text} on {data}"
    return text


def data_names(rows: list[SettingRow]) -> list[str]:
    """The names of the rows' data sets, each once."""
    data = [row.first.config.get("data") for row in rows]
    return list(dict.fromkeys(data_name(name) for name in data if name))


def _list_names(names: Iterable[str | None]) -> str:
    """The first names, each once, and how many more there are."""
    unique = list(dict.fromkeys(name for name in names if name))
    if len(unique) > 3:
        return f"{', '.join(unique[:2])} and {len(unique) - 2} more"
    return ", ".join(unique)


def headline(rows: list[SettingRow]) -> str:
    """The accuracy, speed and size of the best student relative to its teacher, and its gain.

    Empty without a finished student.
    """
    students = [row for row in rows if row.role == "student" and row.error is not None]
    if not students:
        return ""
    best = min(students, key=lambda row: row.error.mean if row.error else math.inf)
    assert best.error is not None
    accuracy = 100 - best.error.mean
    subject = f"The student trained by {best.label}"
    if len(students) > 1:
        subject = f"The best of {len(students)} students ({best.label})"
    text = f"{subject} has {best.error.mean:.{error_digits(rows)}f} % error"
    if best.teacher is not None and best.teacher.error is not None:
        share = 100 * accuracy / max(100 - best.teacher.error.mean, 1e-9)
        text = f"{subject} keeps {share:.0f} % of the teacher's accuracy"
    text += _at_what_cost(best)
    if best.delta is not None:
        comparison = _comparison(best.delta, error_digits(rows))
        text += f". Its error is {comparison} that of {_baseline_name(best)}"
    return f"{text}."


def _at_what_cost(row: SettingRow) -> str:
    """` at 3.9 × its speed and with 25 % of its parameters`, or the part that is known."""
    costs = []
    speed = _times_teachers_speed(row)
    if speed is not None:
        costs.append(f"at {significant(speed, 2)} × its speed")
    parameters = row.times_teacher("parameters")
    if parameters is not None:
        costs.append(f"with {significant(100 * parameters, 2)} % of its parameters")
    if not costs:
        return ""
    return f" {' and '.join(costs)}"


def _times_teachers_speed(row: SettingRow) -> float | None:
    """Images per second relative to the teacher's.

    Measured together if possible, otherwise by the student's run, one after the other.
    """
    speed = row.speed("images_per_second", "median")
    teacher = row.teacher and row.teacher.speed("images_per_second", "median")
    if speed and teacher:
        return speed / teacher
    student = row.median("inference", "images_per_second")
    teacher = row.median("teacher", "inference", "images_per_second")
    if not student or not teacher:
        return None
    return student / teacher


def _baseline_name(row: SettingRow) -> str:
    if row.baseline is not None and row.baseline.role == "teacher":
        return "the same network alone, a teacher,"
    return "the student alone"


def sentences(rows: list[SettingRow]) -> list[str]:
    """A sentence for each row that has results or is unfinished."""
    digits = error_digits(rows)
    return [text for text in (sentence(row, digits) for row in rows) if text]


def sentence(row: SettingRow, digits: int = 1) -> str:
    """`AT+KD: 25.7 % error, 8.9 points below the student alone (3 seeds; the ranges overlap)`.

    It is empty for a finished run without an accuracy.
    """
    if not row.finished:
        return f"{row.label}: unfinished"
    if row.error is None:
        return ""
    text = f"{row.label}: {row.error.mean:.{digits}f} % error"
    if row.is_implied:
        parameters = row.median("parameters")
        return f"{text}, {count(parameters)} parameters" if parameters else text
    if row.delta is None or row.baseline_error is None:
        return f"{text} ({plural(row.error.n, 'seed')})"
    confidence = _confidence(row.error, row.baseline_error)
    return f"{text}, {_comparison(row.delta, digits)} {_baseline_name(row)} ({confidence})"


def _comparison(delta: float, digits: int) -> str:
    """`8.9 points below`, `level with`."""
    size = f"{abs(delta):.{digits}f}"
    if float(size) == 0:
        return "level with"
    unit = "point" if float(size) == 1 else "points"
    direction = "below" if delta < 0 else "above"
    return f"{size} {unit} {direction}"


def _confidence(error: Spread, baseline: Spread) -> str:
    """The number of seeds of a comparison, and whether their ranges overlap."""
    text = plural(error.n, "seed")
    if error.n != baseline.n:
        text += f" against {baseline.n}"
    if min(error.n, baseline.n) < 2:
        return f"{text}; too few to know the spread"
    if error.overlaps(baseline):
        return f"{text}; the ranges overlap"
    return f"{text}; the ranges do not overlap"


def caveats(rows: list[SettingRow]) -> list[str]:
    """Warnings that a reader of the table needs."""
    lines = []
    any_alone = any(row.role == "alone" for row in rows)
    precisions = {row.label: row.precision for row in rows if row.precision}
    if len(set(precisions.values())) > 1:
        named = "; ".join(f"{label} {precision}" for label, precision in precisions.items())
        lines.append(f"The settings differ in precision, which changes their speed: {named}.")
    for row in rows:
        unfinished = len(row.runs) - len(row.finished)
        if unfinished and row.finished:
            of_runs = f"{unfinished} of {plural(len(row.runs), 'seed')}"
            lines.append(f"{row.label}: {of_runs} unfinished and not included in its numbers.")
        seeds = [str(run.seed) for run in row.runs if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            lines.append(f"{row.label}: a seed occurs more than once, so its spread is too small.")
        if row.is_implied and row.first.metrics:
            lines += _other_images(row)
        if row.role == "student" and row.baseline is None and any_alone:
            lines.append(
                f"{row.label}: no student alone with the same network, data and budget"
                " to compare with."
            )
    return lines


def _other_images(teacher: SettingRow) -> list[str]:
    """A caveat if a teacher's curve and its error were measured on different images."""
    own = error_percent(finite_number(teacher.first.metrics[-1].get("val_accuracy")))
    error = teacher.error
    # Another batch size or precision can change one or two predictions.
    if own is None or error is None or abs(own - error.mean) < 0.3:
        return []
    return [
        f"{teacher.label}: its error is measured on the student's validation images; its curve, "
        f"from its own run, ends at {own:.1f} %."
    ]
