"""Checks that each term of the loss is finite, not 0, and gives the student a gradient."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.base import Method
from ..numerics import IGNORED_LABEL
from ..teacher import TeacherOutput
from ..transfer import Transfer
from .balance import gradients
from .findings import Finding, NetworkIO

ROUNDING = 1e-12  # a term this small, before its weight, is 0 up to rounding
PROGRESS = tuple(k / 10 for k in range(11))


def check_loss(
    transfer: Transfer, x: Tensor, y: Tensor, io: NetworkIO, teacher: TeacherOutput | None = None
) -> list[Finding]:
    """The loss of the batch, each of its terms, and their gradients."""
    classes = io.classes
    count = classes.get("student")
    labels = y[y != IGNORED_LABEL].tolist()
    lowest, highest = min(labels, default=0), max(labels, default=0)
    if count is not None and not 0 <= lowest <= highest < count:
        text = f"the labels go from {lowest} to {highest}, but the student's logits have"
        return [Finding("error", f"{text} {count} classes: expected 0 to {count - 1}")]
    # The checks do not depend on the labels; clamp them for a teacher with fewer classes.
    y = y.clamp(max=min(classes.values(), default=1 << 62) - 1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return list(_check_terms(transfer, x, y, teacher))
    except UserError as error:
        text = f"the loss cannot be computed: {_name_layers(str(error), transfer.pairs)}"
        if len(set(classes.values())) > 1:
            counts = " and ".join(f"the {s}'s logits have {k}" for s, k in sorted(classes.items()))
            text = f"{counts} classes, and a method compares them: {error}"
        return [Finding("error", text)]


def _name_layers(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Adds the names of its layers to each `pair 0` in a message."""
    for j, (s, t) in enumerate(pairs):
        text = re.sub(rf"\bpair {j}\b(?! \()", f"pair {j} ({s} ← {t})", text)
    return text


def _check_terms(
    transfer: Transfer, x: Tensor, y: Tensor, teacher: TeacherOutput | None
) -> Iterator[Finding]:
    parameters = [p for p in transfer.student.parameters() if p.requires_grad]
    zero_terms = []
    for progress, terms in _terms_by_progress(transfer.methods).items():
        out = transfer(x, y, progress, teacher=teacher)
        rounding = {m.name: ROUNDING * float(m.weight(progress)) for m in transfer.methods}
        for term in terms:
            value = out.parts[term]
            if not value.isfinite():
                yield Finding("error", f"the term {term} is not finite: {value.item()}")
                continue
            is_zero = bool(value.abs() <= rounding.get(term, 0.0))
            if is_zero and term != "ce":  # with alpha = 1 the cross-entropy has weight 0
                zero_terms.append(term)
            found = gradients(value, parameters)
            if not all(g.isfinite().all() for g in found):
                yield Finding("error", f"the gradient of the term {term} is not finite")
            elif parameters and not is_zero and not any(g.any() for g in found):
                text = f"the term {term} does not depend on the student"
                yield Finding("error", f"{text}: none of its parameters gets a gradient from it")
    yield from _zero_findings(transfer, zero_terms)
    for method in transfer.methods:
        if not any(method.weight(p) > 0 for p in PROGRESS):
            text = f"the term {method.name} weighs 0 from start to end, so it does nothing"
            yield Finding("note", text)


def _terms_by_progress(methods: Sequence[Method]) -> dict[float, list[str]]:
    """{progress in [0, 1]: terms}: each term is checked at the progress of its largest weight.

    Terms whose weight is always 0 are left out.
    """
    terms = {PROGRESS[0]: ["ce"]}
    for method in methods:
        weights = [float(method.weight(p)) for p in PROGRESS]
        if max(weights) > 0:
            largest = PROGRESS[weights.index(max(weights))]
            terms.setdefault(largest, []).append(method.name)
    return terms


def _zero_findings(transfer: Transfer, terms: Sequence[str]) -> Iterator[Finding]:
    if not _same_weights(transfer):
        for term in terms:
            yield Finding("warning", f"the term {term} is 0, so it teaches nothing")
        return
    text = "student and teacher are the same network with the same weights"
    if terms:
        text += f", so {' and '.join(terms)} {'are' if len(terms) > 1 else 'is'} 0"
    yield Finding("warning", f"{text}: is it the right teacher?")


def _same_weights(transfer: Transfer) -> bool:
    if transfer.teacher is None:
        return False
    student = dict(transfer.student.named_parameters())
    teacher = dict(transfer.teacher.named_parameters())
    if not student or student.keys() != teacher.keys():
        return False
    return all(torch.equal(p, teacher[name]) for name, p in student.items())
