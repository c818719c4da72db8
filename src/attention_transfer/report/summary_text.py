"""Results in plain words, made from the numbers: titles, a line for each setting, what to bear in mind."""

from __future__ import annotations

from collections.abc import Iterable

from .formats import count, data_name, model_name, percent, seeds
from .load_run import dig, number
from .rows import Row, Spread, teacher_name


def decimals(rows: list[Row]) -> int:
    """Digits after the point of an error in percent: two once any row is below 10 %."""
    return 2 if any(row.error and row.error.mean < 10 for row in rows) else 1


def title(rows: list[Row]) -> str:
    """`WRN-16-2 → WRN-16-1 on cifar10`."""
    students = [row for row in rows if row.first.command == "distill"] or rows
    models = _several(row.model for row in students)
    teachers = _several(teacher_name(row) for row in students if row.first.command == "distill")
    data = _several(
        data_name(row.first.config["data"]) for row in rows if row.first.config.get("data")
    )
    return (f"{teachers} → " if teachers else "") + models + (f" on {data}" if data else "")


def _several(names: Iterable[str | None]) -> str:
    kept = list(dict.fromkeys(name for name in names if name))
    return ", ".join(kept) if len(kept) <= 3 else f"{', '.join(kept[:2])} and {len(kept) - 2} more"


def sentences(rows: list[Row]) -> list[str]:
    """A line for each finished row, and one for each teacher that is not itself among the rows."""
    digits = decimals(rows)
    lines = [line for row in rows if (line := sentence(row, digits))]
    for name, error, size in reversed(absent_teachers(rows)):
        tail = f", {count(size)} parameters" if size else ""
        lines.insert(0, f"{name} teacher: {percent(error, digits)} error{tail}")
    return lines


def sentence(row: Row, digits: int = 1) -> str | None:
    """`AT+KD: 25.7 % error, 8.9 points below the student alone (3 seeds; the ranges do not overlap)`."""
    error = row.error
    if error is None:
        return f"{row.label}: unfinished" if not row.finished else None
    start = f"{row.label}: {percent(error.mean, digits)} error"
    base, delta = row.baseline.error if row.baseline else None, row.delta
    if base is None or delta is None:
        return f"{start} ({seeds(error.n)})"
    size = f"{abs(delta):.{digits}f}"
    unit = "point" if float(size) == 1 else "points"
    where = f"{size} {unit} {'below' if delta < 0 else 'above'}" if float(size) else "level with"
    return f"{start}, {where} the student alone ({_confidence(error, base)})"


def _confidence(own: Spread, base: Spread) -> str:
    counted = seeds(own.n) if own.n == base.n else f"{seeds(own.n)} against {base.n}"
    if min(own.n, base.n) < 2:
        return f"{counted}; too few to know the spread"
    return f"{counted}; the ranges {'overlap' if own.overlaps(base) else 'do not overlap'}"


def absent_teachers(rows: list[Row]) -> list[tuple[str, float, float | None]]:
    """(network, error in percent, parameters) of each teacher that is not itself among the rows."""
    found = []
    for row in rows:
        facts = next((t for run in row.finished if (t := dig(run.summary, "teacher"))), None)
        accuracy = number(dig(facts, "val_accuracy"))
        if row.teacher is None and accuracy is not None:
            name = model_name(str(dig(facts, "model") or dig(facts, "name") or "the"))
            found.append((name, 100 * (1 - accuracy), number(dig(facts, "parameters"))))
    return list(dict.fromkeys(found))


def caveats(rows: list[Row]) -> list[str]:
    """What a reader should know before trusting the table."""
    lines = []
    for row in rows:
        missing = len(row.runs) - len(row.finished)
        if missing and row.finished:
            lines.append(
                f"{row.label}: {missing} of {seeds(len(row.runs))} unfinished and left out of its numbers."
            )
        known = [run.seed for run in row.runs if run.seed is not None]
        if len(set(map(str, known))) < len(known):
            lines.append(f"{row.label}: a seed occurs more than once, so its spread is too small.")
        if row.role == "student" and row.baseline is None and any(r.role == "alone" for r in rows):
            lines.append(
                f"{row.label}: no student alone with the same network, data and budget to compare with."
            )
    return lines
