"""Before the first step: a dry forward that looks for what makes a transfer worthless without making it fail."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..methods import Method
from ..second_order import BatchStatisticsWarning
from ..taps import evaluating, unwrap
from ..transfer import Output, Transfer
from .findings import (
    Finding,
    NetworkIO,
    check_depths,
    check_frozen,
    check_layers,
    check_modes,
    check_range,
    networks,
)

DRY_IMAGES = 32  # of the batch; a dead layer or a lost gradient shows with as many
TEACHER_IMAGES = 400
TEACHER_CHUNK = 25  # a good teacher is known after one
CHANCE = 0.01  # a teacher this likely to be guessing is named
CLEAR = 1e-6  # one less likely needs no more images (it is asked after every chunk, so far below CHANCE)
WORSE = 0.05  # points of accuracy below a teacher's own that sampling does not explain
ROUNDING = (
    1e-12  # what is no larger, before its weight, is the difference of equals: 0 but for rounding
)
PROGRESS = tuple(k / 10 for k in range(11))


def preflight(
    transfer: Transfer,
    x: Tensor,
    y: Tensor,
    *,
    images: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher_accuracy: float | None = None,
) -> list[Finding]:
    """What a dry step says about a transfer, errors first; call it just before training, in the modes of training.

    Looks at modes and frozen parameters, the batch's range, the features and the depth of every pair, every term of the
    loss and its gradient, and the teacher's accuracy. Nothing is changed: modes, gradients, buffers and random states
    are afterwards what they were. Costs about as much as a step of 100 images, uncompiled.

    Args:
        transfer: student, teacher and methods; a compiled or wrapped one is unwrapped.
        x: a training batch (N, C, H, W) on the transfer's device, as it will be given; the first 32 images are used.
        y: its labels (N,), int64.
        images: labelled validation batches (x, y), balanced over the classes, a DataLoader say; without them the
            teacher's accuracy is not looked at. At most 400 images are, fewer where it is soon clear.
        teacher_accuracy: the teacher's known validation accuracy, in [0, 1].

    Raises:
        UserError: (a ValueError) for a batch or an accuracy that is none.
    """
    plain = unwrap(transfer)
    if not isinstance(plain, Transfer):
        raise UserError(f"preflight got a {type(plain).__name__}: expected a Transfer")
    _check_arguments(x, y, teacher_accuracy)
    x, y = x[:DRY_IMAGES].detach(), y[:DRY_IMAGES]
    found = [*check_modes(plain), *check_frozen(plain)]
    if text := plain.batch_dependence_warning():
        found.append(Finding("warning", text))
    # Compiled code would be compiled for this one batch: run what it was made from.
    with (
        _unchanged(plain, x.device),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", BatchStatisticsWarning)
        try:
            with _watching(plain) as seen:
                features = plain.features(x)
        except UserError as error:
            return _sorted(
                [*found, Finding("error", f"the networks cannot be run on the batch: {error}")]
            )
        found += [
            *check_range(x, seen),
            *check_layers(plain, features, x),
            *check_depths(plain, features, seen),
        ]
        found += _dry_step(plain, x, y, seen)
        if images is not None and plain.teacher is not None:
            with _watching(plain) as seen:
                found += _teacher(plain, images, teacher_accuracy, seen, x.device)
    return _sorted(found)


def _sorted(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda f: ("error", "warning", "note").index(f.level))


def _check_arguments(x: Tensor, y: Tensor, teacher_accuracy: float | None) -> None:
    if x.ndim != 4 or not x.is_floating_point() or not len(x):
        raise UserError(
            f"preflight got x {x.dtype} {tuple(x.shape)}: expected floating-point images (N, C, H, W)"
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(
            f"preflight got y {y.dtype} {tuple(y.shape)}: expected int64 labels ({len(x)},)"
        )
    if teacher_accuracy is not None and not 0 <= teacher_accuracy <= 1:
        raise UserError(f"teacher_accuracy is {teacher_accuracy!r}: expected a share in [0, 1]")


@contextmanager
def _unchanged(transfer: Transfer, device: torch.device) -> Iterator[None]:
    """Gives back modes, buffers (BN's statistics) and the random generators' states at the end of the block."""
    modules = [
        m
        for network in (transfer, transfer.teacher)
        if network is not None
        for m in network.modules()
    ]
    modes = [(m, m.training) for m in modules]
    attributes = dict(vars(transfer))
    buffers = [
        (m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None
    ]
    restore = [
        _keep(torch.get_rng_state, torch.set_rng_state),
        _keep(random.getstate, random.setstate),
    ]
    restore.append(_keep(np.random.get_state, np.random.set_state))
    if device.type != "cpu":
        generator, where = (
            torch.get_device_module(device),
            (device,) if device.type == "cuda" else (),
        )
        restore.append(
            _keep(
                lambda: generator.get_rng_state(*where),
                lambda state: generator.set_rng_state(state, *where),
            )
        )
    try:
        yield
    finally:
        vars(transfer).update(attributes)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # What did not change is not written to: a graph that somebody holds may need it.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for back in restore:
            back()


def _keep(get: Callable[[], Any], put: Callable[[Any], Any]) -> Callable[[], Any]:
    state = get()
    return lambda: put(state)


@contextmanager
def _watching(transfer: Transfer) -> Iterator[NetworkIO]:
    seen = NetworkIO()

    def watch(side: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                seen.inputs[side] = args[0].detach()
            if isinstance(output, Tensor):
                seen.outputs[side] = output.detach()

        return hook

    handles = [network.register_forward_hook(watch(side)) for side, network in networks(transfer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The terms of the loss.


def _dry_step(transfer: Transfer, x: Tensor, y: Tensor, seen: NetworkIO) -> list[Finding]:
    """The loss of the batch with its gradients, and what each of its terms does."""
    classes = {side: k for side, _ in networks(transfer) if (k := seen.classes(side)) is not None}
    if (own := classes.get("student")) is not None and not 0 <= int(y.min()) <= int(y.max()) < own:
        text = f"the labels go from {int(y.min())} to {int(y.max())}, but the student's logits have {own} classes"
        return [Finding("error", f"{text}: expected 0 to {own - 1}")]
    # What the labels are is nobody's concern here, and one that a teacher does not know could not be looked up.
    y = y.clamp(max=min(classes.values(), default=1 << 62) - 1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _terms(transfer, x, y)
    except UserError as error:
        if len(set(classes.values())) < 2:
            return [
                Finding(
                    "error", f"the loss cannot be taken: {_with_layers(str(error), transfer.pairs)}"
                )
            ]
        text = " and ".join(f"the {side}'s logits have {k}" for side, k in classes.items())
        return [Finding("error", f"{text} classes, and a method compares them: {error}")]


def _with_layers(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A message on `pair 0` with the names of its layers."""
    for j, (s, t) in enumerate(pairs):
        text = re.sub(rf"\bpair {j}\b(?! \()", f"pair {j} ({s} ← {t})", text)
    return text


def _terms(transfer: Transfer, x: Tensor, y: Tensor) -> list[Finding]:
    parameters = [p for p in transfer.student.parameters() if p.requires_grad]
    found, silent = [], []
    for progress, parts in _by_progress(transfer.methods).items():
        out = transfer(x, y, progress)
        bad = [p for p in parts if not out.parts[p].isfinite()]
        found += [
            Finding("error", f"the term {p} is not finite: {out.parts[p].item()}") for p in bad
        ]
        least = {m.part: ROUNDING * float(m.weight(progress)) for m in transfer.methods}
        quiet = [p for p in parts if abs(out.parts[p].item()) <= least.get(p, 0.0)]
        silent += [
            p for p in quiet if p != "ce"
        ]  # the cross-entropy may be left no share of the loss
        for part in (p for p in parts if p not in (*bad, *quiet)):
            if parameters and not _reaches(_with_graph(transfer, out, part), parameters):
                text = f"the term {part} does not depend on the student: none of its parameters gets a gradient from it"
                found.append(Finding("error", text))
        if not bad and parameters:
            found += _broken_gradients(out, parts, parameters)
    return found + _silent(silent, _same_weights(transfer)) + _weightless(transfer.methods)


def _by_progress(methods: Sequence[Method]) -> dict[float, list[str]]:
    """The parts to look at, by progress: all at one where each has much of its weight, if there is one.

    Those that weigh nothing there have one of their own; those that weigh 0 throughout are left out.
    """
    weights = {m.part: [float(m.weight(p)) for p in PROGRESS] for m in methods}
    live = {part: w for part, w in weights.items() if max(w) > 0}
    best = max(
        range(len(PROGRESS)), key=lambda k: min((w[k] / max(w) for w in live.values()), default=0.0)
    )
    found = {PROGRESS[best]: ["ce"]}
    for part, w in live.items():
        found.setdefault(PROGRESS[best if w[best] > 0 else w.index(max(w))], []).append(part)
    return found


def _with_graph(transfer: Transfer, out: Output, part: str) -> Tensor:
    """A term, or the sum of those on input gradients where one of them holds the graph for all."""
    together = [m.part for m in transfer.methods if m.needs_gradient]
    if out.parts[part].requires_grad or part not in together:
        return out.parts[part]
    return torch.stack([out.parts[p] for p in together]).sum()


def _weightless(methods: Sequence[Method]) -> list[Finding]:
    idle = [m for m in methods if not any(float(m.weight(p)) > 0 for p in PROGRESS)]
    return [
        Finding("note", f"the term {m.part} weighs 0 from start to end, so it does nothing")
        for m in idle
    ]


def _reaches(term: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether one of the parameters gets a gradient other than 0; the last are asked first, as the way there is short.

    Only as much of the backward pass is run as leads to those that are asked.
    """
    rest, size = list(reversed(parameters)), 4
    while rest and term.requires_grad:
        asked, rest, size = rest[:size], rest[size:], 2 * size
        gradients = torch.autograd.grad(term, asked, retain_graph=True, allow_unused=True)
        if any(g is not None and bool(g.any()) for g in gradients):
            return True
    return False


def _broken_gradients(
    out: Output, parts: Sequence[str], parameters: Sequence[nn.Parameter]
) -> list[Finding]:
    """Terms that are finite while their gradient is not; one backward pass where all is well."""

    def broken(term: Tensor) -> bool:
        if not term.requires_grad:
            return False
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        return any(g is not None and not bool(g.isfinite().all()) for g in gradients)

    if not broken(out.loss):
        return []
    return [
        Finding("error", f"the gradient of the term {p} is not finite")
        for p in parts
        if broken(out.parts[p])
    ]


def _silent(parts: Sequence[str], same: bool) -> list[Finding]:
    if same:
        text = "student and teacher are the same network with the same weights"
        zero = f", so {' and '.join(parts)} {'are' if len(parts) > 1 else 'is'} 0" if parts else ""
        return [Finding("warning", f"{text}{zero}: is it the right teacher?")]
    return [Finding("warning", f"the term {p} is 0, so it teaches nothing") for p in parts]


def _same_weights(transfer: Transfer) -> bool:
    if transfer.teacher is None:
        return False
    ours, theirs = (dict(network.named_parameters()) for _, network in networks(transfer))
    if not ours or ours.keys() != theirs.keys():
        return False
    return all(p.shape == theirs[n].shape and torch.equal(p, theirs[n]) for n, p in ours.items())


# The teacher's accuracy.


def _teacher(
    transfer: Transfer,
    images: Iterable[tuple[Tensor, Tensor]],
    known: float | None,
    seen: NetworkIO,
    device: torch.device,
) -> list[Finding]:
    assert transfer.teacher is not None
    right = total = 0
    classes = 1
    with evaluating(transfer.teacher):
        for x, y in _chunks(images, device):
            transfer.features(x)
            own, theirs = seen.classes("student"), seen.classes("teacher")
            if theirs is None or theirs < 2:
                return []
            if theirs != own:
                text = f"its logits have {theirs} classes, the student's {own}"
                return [Finding("note", f"the teacher's accuracy is not looked at: {text}")]
            classes = theirs
            right += int((seen.outputs["teacher"].argmax(1) == y).sum())
            total += len(y)
            if (
                at_least(right, total, 1 / classes) < CLEAR
                and right / total >= (known or 0.0) - WORSE
            ):
                break
    return _accuracy_findings(right, total, classes, known) if total else []


def _chunks(
    images: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    left = TEACHER_IMAGES
    for x, y in images:
        x, y = x[:left], y[:left]
        left -= len(y)
        # Every so-manyth image: in a batch that is sorted by class, the first ones are all alike.
        count = math.ceil(len(y) / TEACHER_CHUNK)
        for k in range(count):
            yield x[k::count].to(device), y[k::count].to(device)
        if left <= 0:
            return


def _accuracy_findings(right: int, total: int, classes: int, known: float | None) -> list[Finding]:
    share, chance = right / total, 1 / classes
    said = f"the teacher is right for {right} of {total} validation images"
    # A handful of images cannot tell a good teacher from chance: low in itself it has to be, too.
    if at_least(right, total, chance) > CHANCE and share < (1 + chance) / 2:
        text = f"{said}, no more than guessing among {classes} classes gives"
        return [
            Finding(
                "warning",
                f"{text}: are its weights, its normalisation and the order of the classes right?",
            )
        ]
    if (
        known is not None
        and share < known - WORSE
        and at_least(total - right, total, 1 - known) < CHANCE
    ):
        text = f"{said} ({share:.1%}), but was for {known:.1%} in its own run"
        return [Finding("warning", f"{text}: is it the same data and normalisation?")]
    return []


def at_least(right: int, total: int, chance: float) -> float:
    """P(X ≥ right) for X of Binomial(total, chance): how often guessing is right as often."""
    terms = (
        math.comb(total, k) * chance**k * (1 - chance) ** (total - k)
        for k in range(right, total + 1)
    )
    return min(1.0, math.fsum(terms))
