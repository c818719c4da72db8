"""Student + teacher + pairs + methods -> loss, logits, parts."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError, check_choice
from .methods.base import Method, Progress, StepInputs
from .ops.activation_loss import wide
from .second_order import (
    SECOND_ORDER_MODES,
    BatchStatisticsWarning,
    Run,
    along,
    batch_dependent_layers,
    defer_batch_norm_counters,
    has_stochastic_layers,
    is_deterministic,
    logits_and_input_gradient,
)
from .taps import Tap, call_uncompiled, evaluating, match_stages, stages, unwrap

Transform = Callable[[Tensor], Tensor]

_CHANGES = (
    "second_order='forward-over-reverse' runs the student twice a step, and this one changes from one pass to the next "
    "(dropout, or batch normalisation in training mode): use another way"
)


class Output(NamedTuple):
    """What a step gives: `parts` are the weighted terms and sum to `loss`; `logits` are the student's."""

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor]


class Transfer(nn.Module):
    """A student that is trained under a teacher's guidance: `transfer(x, y)` is one forward pass of both and the loss.

    This, not the student in it, is what one compiles or wraps in DDP. The teacher is copied, frozen in eval mode, and
    is never in `state_dict()`; the one handed in is left alone.

    Args:
        student: images (N, C, H, W) -> logits (N, K). A compiled or wrapped one is unwrapped.
        teacher: the same, trained; None where no method needs one.
        methods: `ActivationTransfer`, `KnowledgeDistillation`, … ; none of them is training on labels alone.
        pairs: [(student layer, teacher layer)], or "auto": the stages of equal stride (needs `example`); "last2" and
            the like: the last so many of these.
        example: a batch like those to come, (N, C, H, W), with which the networks are run once, in eval mode.
        student_transform, teacher_transform: each network's own preprocessing of the batch, its normalisation say.
        second_order: how the methods on input gradients get their second derivatives: `double-backward`, `func`,
            `forward-over-reverse` (see `gradients.py`), or `auto`: the first, and inside a compiled region the second.
        label_smoothing: of the cross-entropy, in [0, 1); the input gradients are of the labels as they are.

    Raises:
        UserError: (a ValueError) where a method needs a teacher or an example that is not there, two methods have the
            same name, a layer does not exist, or the features of a pair do not fit together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        methods: Sequence[Method] = (),
        pairs: str | Sequence[tuple[str, str]] = "auto",
        example: Tensor | None = None,
        *,
        student_transform: Transform | None = None,
        teacher_transform: Transform | None = None,
        second_order: str = "auto",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        _check_methods(methods, teacher, example)
        check_choice("second_order", second_order, SECOND_ORDER_MODES)
        if (
            isinstance(label_smoothing, bool)
            or not isinstance(label_smoothing, (int, float))
            or not 0 <= label_smoothing < 1
        ):
            raise UserError(f"label_smoothing is {label_smoothing!r}: expected a number in [0, 1)")
        self.second_order, self.label_smoothing = second_order, float(label_smoothing)
        self.student = unwrap(student)
        self.methods = cast(Sequence[Method], nn.ModuleList(methods))
        self.student_transform = nn.Identity() if student_transform is None else student_transform
        # A tuple keeps the teacher out of modules(), parameters() and state_dict(); _apply moves it all the same.
        needed = teacher if any(m.needs_teacher for m in methods) else None
        self._frozen = _frozen_copies(needed, teacher_transform)
        self.pairs: list[tuple[str, str]] = []
        xs, xt = self._views(example)
        if self._frozen and any(m.needs_features for m in methods):
            self.pairs = self._resolve(pairs, xs, xt)
        self._student_tap = (
            Tap(self.student, [s for s, _ in self.pairs], xs) if self.pairs else None
        )
        self._teacher_tap = (
            Tap(self._frozen[0], [t for _, t in self.pairs], xt) if self.pairs else None
        )
        self._on_gradients = [m for m in methods if m.needs_gradient]
        self._looked = not self._on_gradients
        if example is not None:
            self._dry_run(example)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen copy of the teacher."""
        return self._frozen[0] if self._frozen else None

    def forward(self, x: Tensor, y: Tensor, progress: Progress = None) -> Output:
        """The loss of one batch.

        Args:
            x: images (N, C, H, W), before any network's own normalisation.
            y: labels (N,), int64; or of mixed images, the probabilities (N, K) of each class.
            progress: the share of the training that is done, in [0, 1], for methods that decay; a float or 0-d tensor.
        """
        if not self._looked and self.training and not torch.compiler.is_compiling():
            self._look(x)
        return self._student_side(x, y, progress, *self._teacher_side(x, y))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles this module in place, in two regions: a single one mixes both networks' kernels and runs slower.

        Raises:
            UserError: for methods on input gradients with `second_order="double-backward"`.
        """
        if self._on_gradients:
            self._check_way(compiled=True)
        self._teacher_side = torch.compile(self._teacher_side, *args, **kwargs)  # type: ignore[method-assign]
        self._student_side = torch.compile(self._student_side, *args, **kwargs)  # type: ignore[method-assign]

    def _teacher_side(
        self, x: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
        """Logits, features and, given the labels, J where a method needs it."""
        if not self._frozen:
            return None, [], None
        teacher, transform = self._frozen
        names = [t for _, t in self.pairs]

        def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return _run(teacher, self._teacher_tap, transform(x), names)

        if y is not None and any(m.needs_teacher for m in self._on_gradients):
            way = "func" if torch.compiler.is_compiling() else "double-backward"
            j, logits, features = logits_and_input_gradient(run, x, y, create_graph=False, way=way)
            return logits, features, j
        with torch.no_grad():
            return *run(x), None

    def _student_side(
        self,
        x: Tensor,
        y: Tensor,
        progress: Progress,
        teacher_logits: Tensor | None,
        teacher_features: list[Tensor],
        teacher_gradient: Tensor | None,
    ) -> Output:
        step = StepInputs(
            y,
            None,
            teacher_logits,
            teacher_features=teacher_features,
            teacher_gradient=teacher_gradient,
        )
        names = [s for s, _ in self.pairs]

        def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return _run(self.student, self._student_tap, self.student_transform(x), names)

        attached = None
        if self._on_gradients:
            attached = self._second_order(run, step, x, progress)
        else:
            step.student_logits, step.student_features = run(x)
        logits = step.student_logits
        assert logits is not None
        # The losses in float32 whatever the autocast.
        with torch.autocast(x.device.type, enabled=False):
            share: float | Tensor = 1.0
            for method in self.methods:
                share = share * method.cross_entropy_share(progress)
            parts = {"ce": self._cross_entropy(logits, y) * share}
            for method in self.methods:
                parts[method.part] = method(step) * method.weight(progress)
        if attached is not None:
            # The values are there, without a graph; what the weights get of all of them comes with the first.
            part = self._on_gradients[0].part
            parts[part] = parts[part] + (attached - attached.detach())
        return Output(torch.stack(list(parts.values())).sum(), logits, parts)

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        logits = wide(logits)
        if y.is_floating_point():
            if y.shape != logits.shape:
                raise UserError(
                    f"soft labels {tuple(y.shape)} for logits {tuple(logits.shape)}: expected both (N, K)"
                )
            y = y.to(logits.dtype)
        elif y.dtype != torch.int64 or y.shape != logits.shape[:1]:
            raise UserError(
                f"labels {y.dtype} {tuple(y.shape)} for logits {tuple(logits.shape)}: expected int64 (N,), or (N, K) "
                "of probabilities"
            )
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    def _second_order(
        self, run: Run, step: StepInputs, x: Tensor, progress: Progress
    ) -> Tensor | None:
        """Fills in logits, features and J. By `forward-over-reverse` J has no graph, and a scalar comes back whose
        gradient is that of the terms on J."""
        n, y = len(x), step.labels
        flips = any(m.needs_flipped for m in self._on_gradients)
        if flips:
            x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        way = self._check_way(torch.compiler.is_compiling())
        forward = way == "forward-over-reverse" and torch.is_grad_enabled()
        first = way
        if way == "forward-over-reverse":
            first = "func" if torch.compiler.is_compiling() else "double-backward"
        with defer_batch_norm_counters(self.student, first):
            j, logits, features = logits_and_input_gradient(
                run, x, y, torch.is_grad_enabled() and not forward, first
            )

        def fill(j: Tensor) -> None:
            step.student_gradient = j[:n]
            step.flipped_gradient = j[n:].flip(-1) if flips else None

        attached = None
        if forward:
            if torch.compiler.is_compiling() and has_stochastic_layers(self.student):
                raise UserError(_CHANGES)

            def terms(j: Tensor) -> Tensor:
                fill(j)
                return torch.stack([m(step) * m.weight(progress) for m in self._on_gradients]).sum()

            with torch.autocast(x.device.type, enabled=False):
                v = torch.func.grad(terms)(j.detach())
            attached, logits, features = along(run, x, y, v)
        fill(j)
        step.student_logits, step.student_features = logits[:n], [f[:n] for f in features]
        return attached

    def _check_way(self, compiled: bool) -> str:
        """The way of second derivatives, `auto` settled."""
        if self.second_order == "auto":
            return "func" if compiled else "double-backward"
        if compiled and self.second_order == "double-backward":
            raise UserError(
                "second_order='double-backward' cannot be compiled (PyTorch does not differentiate a compiled region "
                "twice): choose func or forward-over-reverse, or do not compile"
            )
        return self.second_order

    def batch_dependence_warning(self) -> str | None:
        """What is wrong with input gradients of the student in the mode it is in: layers that join the samples."""
        layers = batch_dependent_layers(self.student) if self._on_gradients else []
        if not layers:
            return None
        return (
            f"{len(layers)} layers of the student normalise by their batch ({layers[0]}, …), so that its input "
            f"gradients depend on the rest of the batch, and {', '.join(m.name for m in self._on_gradients)} with "
            "them: take a student without batch normalisation, or put it in eval mode"
        )

    def _look(self, x: Tensor) -> None:
        """Once, at the first step: what stands between the student and its second derivatives."""
        self._looked = True
        if text := self.batch_dependence_warning():
            warnings.warn(text, BatchStatisticsWarning, stacklevel=3)
        if self.second_order == "forward-over-reverse":
            with torch.no_grad():
                same = is_deterministic(self.student, self.student_transform(x[:2]))
            if not same:
                raise UserError(_CHANGES)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The student's parameters and the adapters': what the optimiser gets."""
        return (p for p in self.parameters() if p.requires_grad)

    def weights(self, progress: Progress) -> dict[str, float]:
        """The weights in effect at `progress`: β of each method that has one (`at.beta`, … where several have), α."""
        found = [(method.name, method.weights(progress)) for method in self.methods]
        count = Counter(key for _, weights in found for key in weights)
        return {
            (f"{name}.{key}" if count[key] > 1 else key): value
            for name, weights in found
            for key, value in weights.items()
        }

    def close(self) -> None:
        """Takes the hooks off the student; they also go with this object."""
        for tapped in (self._student_tap, self._teacher_tap):
            if tapped is not None:
                tapped.close()

    def train(self, mode: bool = True) -> Transfer:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Transfer:
        super()._apply(fn, recurse)
        for module in self._frozen:
            module._apply(fn)
        return self

    def _resolve(
        self, pairs: str | Sequence[tuple[str, str]], xs: Tensor | None, xt: Tensor | None
    ) -> list[tuple[str, str]]:
        if not isinstance(pairs, str):
            for pair in pairs:
                if isinstance(pair, str) or len(pair) != 2:
                    raise UserError(f"pairs has {pair!r}: expected (student layer, teacher layer)")
            return [(s, t) for s, t in pairs]
        if pairs != "auto" and not re.fullmatch(r"last[1-9]\d*", pairs):
            raise UserError(
                f"pairs is {pairs!r}: expected 'auto', 'last2' or a list of (student layer, teacher layer)"
            )
        if xs is None or xt is None:
            raise UserError(
                f"pairs={pairs!r} needs example=, a batch of images (N, C, H, W), to find the layers with"
            )
        found = match_stages(stages(self.student, xs), stages(self._frozen[0], xt))
        last = len(found) if pairs == "auto" else int(pairs.removeprefix("last"))
        if last > len(found):
            raise UserError(
                f"pairs is {pairs!r}, but there are {len(found)}: {', '.join('='.join(p) for p in found)}"
            )
        return found[-last:]

    def _views(self, example: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if example is None:
            return None, None
        with torch.no_grad():
            return self.student_transform(example), self._frozen[1](
                example
            ) if self._frozen else None

    def features(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The features of the pairs, the student's and the teacher's, in eval mode and without gradients."""
        with evaluating(self.student):
            teacher_features = Transfer._teacher_side(self, x)[1]
            names = [s for s, _ in self.pairs]
            return _run(self.student, self._student_tap, self.student_transform(x), names)[
                1
            ], teacher_features

    def _dry_run(self, example: Tensor) -> None:
        student, teacher = self.features(example)
        for method in self.methods:
            method.prepare(self.pairs, student, teacher)


def _run(
    model: nn.Module, tapped: Tap | None, x: Tensor, names: list[str]
) -> tuple[Tensor, list[Tensor]]:
    if tapped is None:
        return call_uncompiled(model, x), []
    logits, features = tapped(x)
    return logits, [features[n] for n in names]


def _check_methods(
    methods: Sequence[Method], teacher: nn.Module | None, example: Tensor | None
) -> None:
    for method in methods:
        if not isinstance(method, Method):
            raise UserError(f"methods has {method!r}: expected objects, like ActivationTransfer()")
    names = [m.name for m in methods]
    if len(set(names)) < len(names):
        raise UserError(f"methods {names} has one twice: expected each at most once")
    needing = [type(m).__name__ for m in methods if m.needs_teacher]
    if needing and teacher is None:
        raise UserError(f"{', '.join(needing)} needs a teacher, and teacher is None")
    if example is None and (needing := [type(m).__name__ for m in methods if m.needs_example]):
        raise UserError(
            f"{', '.join(needing)} needs example=, a batch of images (N, C, H, W), to know its sizes by"
        )


def _as_module(transform: Transform | None) -> nn.Module:
    if transform is None:
        return nn.Identity()
    return transform if isinstance(transform, nn.Module) else _Function(transform)


class _Function(nn.Module):
    def __init__(self, function: Transform):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _frozen_copies(teacher: nn.Module | None, transform: Transform | None) -> tuple[nn.Module, ...]:
    """The teacher and its transform; empty where there is no teacher."""
    if teacher is None:
        return ()
    return _frozen_copy(unwrap(teacher)), _frozen_copy(_as_module(transform))


def _frozen_copy(module: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(module).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen
