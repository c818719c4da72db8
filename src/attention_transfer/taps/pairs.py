"""Pairs of the stages of two networks, and their descriptions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import UserError, about, shown
from .stages import Stage, stages

_AUTOMATIC = re.compile(r"auto|last[1-9]\d*")


def pair_stages(
    student: nn.Module, teacher: nn.Module, example: Tensor | tuple[Tensor, Tensor]
) -> list[tuple[str, str]]:
    """Pairs (student layer, teacher layer) of equal stride from the input, by round(log2 stride).

    Args:
        student, teacher: modules; they run once on the example, in eval mode without gradients.
        example: images (N, C, H, W) for both, or (the student's, the teacher's) if their inputs
            differ in size. Strides are relative to each network's own input.

    Returns:
        Pairs of dotted layer names, from input to output; a layer is in at most one pair.

    Raises:
        UserError: if the networks have no stride in common; the message lists the stages.
    """
    if isinstance(example, Tensor):
        example = (example, example)
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise UserError(
            f"example is {shown(example)}: expected images (N, C, H, W), or "
            "(the student's, the teacher's)"
        )
    with about("the student"):
        student_stages = stages(student, example[0])
    with about("the teacher"):
        teacher_stages = stages(teacher, example[1])
    return match_stages(student_stages, teacher_stages)


def match_stages(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[tuple[str, str]]:
    """As `pair_stages`, for known stages. A layer is in at most one pair, of the nearest stride."""
    candidates = []
    for i, s in enumerate(student):
        for j, t in enumerate(teacher):
            if _octave(s) == _octave(t):
                # Of equally near pairs, the later layers come first, hence the signs.
                candidates.append((abs(math.log2(s.stride / t.stride)), -i, -j))
    pairs: dict[int, int] = {}
    for _, i, j in sorted(candidates):
        if -i not in pairs and -j not in pairs.values():
            pairs[-i] = -j
    if not pairs:
        raise UserError(
            "no stage of the student has the stride of one of the teacher's; "
            f"student: {describe(student)}; teacher: {describe(teacher)}; name the pairs yourself "
            "(--pairs STUDENT_LAYER=TEACHER_LAYER,…; in Python "
            "pairs=[(student layer, teacher layer), …])"
        )
    return [(student[i].name, teacher[j].name) for i, j in sorted(pairs.items())]


def describe(stages: Sequence[Stage]) -> str:
    """One line for a list of stages: name, channels×height×width, stride, depth."""
    texts = []
    for stage in stages:
        shape = "×".join(map(str, (stage.channels, *stage.size)))
        texts.append(f"{stage.name} {shape} (stride {stage.stride:.3g}, depth {stage.depth})")
    return ", ".join(texts)


def explain(student: Stage, teacher: Stage) -> str:
    """Why `match_stages` pairs these two, and at which size their maps are compared."""
    s, t = f"{student.stride:.3g}", f"{teacher.stride:.3g}"
    reason = f"stride {s} in both"
    if s != t:
        reason = f"strides {s} and {t}, both nearest to {2 ** _octave(student)}"
    if student.size == teacher.size:
        return reason
    smaller = [str(min(sides)) for sides in zip(student.size, teacher.size, strict=True)]
    return f"{reason}; maps are compared at {'×'.join(smaller)}"


def unpaired_stages(
    student: Sequence[Stage], teacher: Sequence[Stage]
) -> list[tuple[str, str, str]]:
    """(side, layer, reason) of the stages that `match_stages` leaves out."""
    paired_students, paired_teachers = zip(*match_stages(student, teacher), strict=True)
    unpaired = []
    for side, side_stages, paired, other, other_stages in (
        ("student", student, paired_students, "teacher", teacher),
        ("teacher", teacher, paired_teachers, "student", student),
    ):
        octaves = {_octave(stage) for stage in other_stages}
        for stage in side_stages:
            if stage.name in paired:
                continue
            reason = f"the {other} has none of stride {stage.stride:.3g}"
            if _octave(stage) in octaves:
                reason = f"the {other}'s stage of its stride is in a nearer pair"
            unpaired.append((side, stage.name, reason))
    return unpaired


def _octave(stage: Stage) -> int:
    return round(math.log2(stage.stride))


def parse_pairs(text: str) -> str | list[tuple[str, str]]:
    """ "auto" and "last2" unchanged; "a=b,c=d" -> [("a", "b"), ("c", "d")].

    Raises:
        UserError: for anything else.
    """
    if _AUTOMATIC.fullmatch(text):
        return text
    pairs = []
    for pair in text.split(","):
        student, _, teacher = (word.strip() for word in pair.partition("="))
        if not student or not teacher or "=" in teacher:
            raise UserError(
                f"--pairs is {text!r}: expected auto, last2, or STUDENT_LAYER=TEACHER_LAYER,… "
                "(see `stages`)"
            )
        pairs.append((student, teacher))
    return pairs


def _checked_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if not isinstance(pairs, Sequence):
        raise UserError(
            f"pairs is {shown(pairs)}: expected a list of (student layer, teacher layer)"
        )
    for pair in pairs:
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not all(isinstance(name, str) for name in pair):
            raise UserError(f"pairs has {shown(pair)}: expected (student layer, teacher layer)")
    return [(s, t) for s, t in pairs]


def resolve_pairs(
    pairs: str | Sequence[tuple[str, str]],
    student: nn.Module,
    teacher: nn.Module | Sequence[Stage],
    xs: Tensor | None,
    xt: Tensor | None,
) -> list[tuple[str, str]]:
    """The given pairs; for "auto" and "last2" the pairs of the stages on each network's example.

    The teacher may be given as its stages; it then needs no example.

    Raises:
        UserError: for wrong pairs, and if the stages are needed but there is no example.
    """
    if not isinstance(pairs, str):
        return _checked_pairs(pairs)
    if not _AUTOMATIC.fullmatch(pairs):
        raise UserError(
            f"pairs is {pairs!r}: expected 'auto', 'last2' or a list of "
            "(student layer, teacher layer)"
        )
    if xs is None or xt is None:
        raise UserError(
            f"pairs={pairs!r} needs example=, a batch of images (N, C, H, W), to find the layers"
        )
    if isinstance(teacher, nn.Module):
        matches = pair_stages(student, teacher, (xs, xt))
    else:
        with about("the student"):
            student_stages = stages(student, xs)
        matches = match_stages(student_stages, teacher)
    if pairs == "auto":
        return matches
    count = int(pairs.removeprefix("last"))
    if count > len(matches):
        names = ", ".join("=".join(pair) for pair in matches)
        raise UserError(
            f"pairs is {pairs!r}, but there are {len(matches)}: {names}; "
            f"choose auto or last{len(matches)}"
        )
    return matches[-count:]
