"""Pairs of the stages of two networks, and words for both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import UserError
from .stages import Stage, stages

Example = Tensor | tuple[Tensor, Tensor]


def pair_stages(student: nn.Module, teacher: nn.Module, example: Example) -> list[tuple[str, str]]:
    """Pairs (student layer, teacher layer) of equal stride from the input, by round(log2 stride).

    Args:
        student, teacher: any two networks.
        example: images (N, C, H, W) for both, or (the student's, the teacher's) where their inputs differ in size:
            strides are then relative to each one's own input.

    Raises:
        UserError: where the two have no stride in common; both lists of stages are in the message.
    """
    xs, xt = (example, example) if isinstance(example, Tensor) else example
    return match_stages(stages(student, xs), stages(teacher, xt))


def match_stages(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[tuple[str, str]]:
    """As `pair_stages`, for stages that are known. A layer is in one pair at most: that of the nearest stride."""
    close = [
        (abs(math.log2(s.stride / t.stride)), -i, -j)
        for i, s in enumerate(student)
        for j, t in enumerate(teacher)
        if _octave(s) == _octave(t)
    ]
    chosen: dict[int, int] = {}
    for _, i, j in sorted(close):
        if -i not in chosen and -j not in chosen.values():
            chosen[-i] = -j
    if not chosen:
        raise UserError(
            f"no stage of the student has the stride of one of the teacher's; student: {describe(student)}; teacher: "
            f"{describe(teacher)}; name the pairs yourself (--pairs STUDENT_LAYER=TEACHER_LAYER,…; in Python "
            "pairs=[(student layer, teacher layer), …])"
        )
    return [(student[i].name, teacher[chosen[i]].name) for i in sorted(chosen)]


def describe(found: Sequence[Stage]) -> str:
    """One line of text for a list of stages: name, channels×height×width, stride, depth."""
    return ", ".join(
        f"{s.name} {s.channels}×{'×'.join(map(str, s.size))} (stride {s.stride:.3g}, depth {s.depth})"
        for s in found
    )


def explain(student: Stage, teacher: Stage) -> str:
    """Why `match_stages` joins these two, and what becomes of their sizes."""
    strides = [f"{s.stride:.3g}" for s in (student, teacher)]
    if strides[0] == strides[1]:
        why = f"stride {strides[0]} in both"
    else:
        why = f"strides {strides[0]} and {strides[1]}, both nearest to {2 ** _octave(student)}"
    if student.size == teacher.size:
        return why
    smaller = "×".join(str(min(a, b)) for a, b in zip(student.size, teacher.size, strict=True))
    return f"{why}; maps are compared at {smaller}"


def unpaired_stages(
    student: Sequence[Stage], teacher: Sequence[Stage]
) -> list[tuple[str, str, str]]:
    """(side, layer, why) of the stages that `match_stages` leaves out."""
    used = list(zip(*match_stages(student, teacher), strict=True))
    left = []
    for side, own, other, names in (
        ("student", student, teacher, used[0]),
        ("teacher", teacher, student, used[1]),
    ):
        for stage in (s for s in own if s.name not in names):
            taken = any(_octave(o) == _octave(stage) for o in other)
            why = (
                "that of its stride is in a nearer pair"
                if taken
                else f"none there of stride {stage.stride:.3g}"
            )
            left.append((side, stage.name, why))
    return left


def _octave(stage: Stage) -> int:
    return round(math.log2(stage.stride))
