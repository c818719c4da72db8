"""Student + teacher + pairs + methods -> loss, logits, parts."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .arguments import check_images, check_tensor
from .errors import UserError, about, shown
from .map_inputs import StoredMap
from .methods.base import Method, StepInputs, TrainingFraction
from .methods.check import check_methods, maps_to_read
from .numerics import check_logits, cross_entropy
from .second_order import (
    BatchStatisticsWarning,
    batch_dependence,
    defer_batch_norm_counters,
    logits_and_input_gradient,
)
from .taps import Tap, call_uncompiled, evaluating, resolve_pairs
from .teacher import FrozenTeacher, Store, TeacherOutput, Transform, split_transform

Pairs = list[tuple[str, str]]
# The methods of `Transfer` that `compile` compiles.
_REGIONS = ("run_teacher", "_student_step")


class Output(NamedTuple):
    """The result of a step: the weighted terms `parts`, their sum `loss`, the student's logits."""

    loss: Tensor
    logits: Tensor
    parts: dict[str, Tensor]


class Transfer(nn.Module):
    """A student and its teacher: `transfer(x, y)` runs both and returns the loss.

    Compile this or wrap it in DDP, not the student in it. The teacher is copied, frozen in eval
    mode, and never in `state_dict()`; the module that was passed does not change.
    Copies (deepcopy, pickle, `AveragedModel`) have their own networks and are not compiled.

    Args:
        student: images (N, C, H, W) -> logits (N, K). A compiled or wrapped student is unwrapped.
            If a loaded model contains its preprocessing, its `.network` is trained, in place.
        teacher: the same, trained; None if no method needs a teacher. A `TeacherStore` replaces the
            network: see `forward`.
        methods: `ActivationTransfer`, `KnowledgeDistillation`, …; by default labels only. A method
            with adapters or weights for the pairs of another `Transfer` is copied.
        pairs: [(student layer, teacher layer)], or "auto": the stages of equal stride (needs
            `example`); "last2": the last two of these, and so on.
        example: a batch of training images, (N, C, H, W); the networks run on it in eval mode.
            Several processes need the same example, because β = "auto" is computed from it.
        student_transform, teacher_transform: each network's preprocessing, such as normalisation.
        label_smoothing: of the cross-entropy, in [0, 1); input gradients take the plain labels.
        example_teacher: the teacher's outputs for the example, if they are known. By default the
            teacher runs on the example; a store gives its outputs for other images.

    Raises:
        UserError: (a ValueError) if a teacher or an example that a method needs is missing, no
            method uses the teacher, two methods have the same name, a layer does not exist, the
            features of a pair do not fit, or a method cannot learn from a store.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Store | None = None,
        methods: Sequence[Method] = (),
        pairs: str | Sequence[tuple[str, str]] = "auto",
        example: Tensor | None = None,
        *,
        student_transform: Transform | None = None,
        teacher_transform: Transform | None = None,
        label_smoothing: float = 0.0,
        example_teacher: TeacherOutput | None = None,
    ):
        super().__init__()
        if example is not None:
            check_images(example, "example")
        check_methods(methods, teacher, example)
        if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
            raise UserError(
                f"label_smoothing is {shown(label_smoothing)}: expected a number in [0, 1)"
            )
        self.label_smoothing = float(label_smoothing)
        self.student, student_transform = split_transform(student, student_transform, "student")
        # Another Transfer may train the adapters of a method.
        methods = [copy.deepcopy(m) if m.belongs_to_a_transfer else m for m in methods]
        self.methods = cast(Sequence[Method], nn.ModuleList(methods))
        self.student_transform = nn.Identity() if student_transform is None else student_transform
        # The tuple (of length 0 or 1) keeps the teacher out of modules(), parameters() and
        # state_dict(); `_apply` moves it to a device.
        self._frozen: tuple[FrozenTeacher, ...] = ()
        self.store: Store | None = None
        self.map_options = maps_to_read(methods, teacher)
        # (student, teacher): whether attention is read instead of features.
        self._attention = False, False
        for method in methods:
            if method.needs_features:  # `check_methods` has found that they agree
                self._attention = method.reads_attention
        if isinstance(teacher, nn.Module):
            self._frozen = (FrozenTeacher(*split_transform(teacher, teacher_transform, "teacher")),)
        self.pairs: Pairs = []
        self._student_tap: Tap | None = None
        self._teacher_tap: Tap | None = None
        if self._frozen and any(m.needs_features for m in methods):
            self._tap_pairs(pairs, example)
        elif teacher is not None and not self._frozen:
            self._use_store(cast(Store, teacher), pairs, example)
        # {method: the term of each pair, without β} of the last batch, to name a pair with a fault.
        self.pair_terms: dict[str, list[Tensor]] = {}
        self._map_names: list[str] = []
        if self.map_options is not None:
            self._map_names = [self.map_options.map_name(t) for _, t in self.pairs]
        self._gradient_methods = [m for m in methods if m.needs_gradient]
        self._checked_first_batch = not self._gradient_methods
        if example is not None:
            teacher_features = self._teacher_features(example, example_teacher)
            # With a graph, because a method may check which features depend on trained weights.
            with evaluating(self.student), torch.enable_grad():
                student_features = self._read_student(example)[1]
            for method in self.methods:
                method.prepare(self.pairs, student_features, teacher_features)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen copy of the teacher."""
        return self._frozen[0].network if self._frozen else None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        progress: TrainingFraction = None,
        teacher: TeacherOutput | None = None,
    ) -> Output:
        """The loss of one batch.

        Args:
            x: images (N, C, H, W), before the networks' own normalisation.
            y: labels (N,), int64, or the probabilities (N, K) of each class for mixed images. An
                image with the label -100 is left out of the cross-entropy.
            progress: the share of the training that is done, a float or 0-d tensor in [0, 1]. A
                tensor outside is clamped, because a check would wait for the device.
            teacher: the teacher's outputs for x, if they are known; otherwise the teacher runs.
                With a store, pass `transfer.store.read(rows, view)`: the numbers of the images and
                the number of their view.

        Raises:
            UserError: for a student that does not return logits (N, K), an empty batch, labels of a
                wrong shape or, in eager mode on a CPU, out of range; for a float outside [0, 1];
                with a store, if `teacher` is missing.
        """
        check_images(x, "x")
        check_tensor(y, "y")
        if not self._checked_first_batch and self.training and not torch.compiler.is_compiling():
            # In the first call, because the caller may set the student's mode after construction.
            self._checked_first_batch = True
            if text := self.batch_dependence_warning():
                warnings.warn(text, BatchStatisticsWarning, stacklevel=4)  # the caller
        if teacher is None:
            if self.store is not None:
                raise UserError(
                    "a store is in the teacher's place: call transfer(x, y, progress, "
                    "teacher=transfer.store.read(rows, view)) with the numbers of the images in x"
                )
            teacher = self.run_teacher(x, y)
        elif not isinstance(teacher, TeacherOutput):
            kind = type(teacher).__name__
            raise UserError(f"teacher= is an object of type {kind}: expected a TeacherOutput")
        output, pair_terms = self._student_step(
            x, y, progress, teacher.with_features(self._map_names)
        )
        if not torch.compiler.is_compiling():
            self.pair_terms = pair_terms
        return output

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles teacher and student in place; the arguments are those of `torch.compile`."""
        # Two regions, because one region mixes the kernels of both networks and runs slower.
        # The attributes of the instance override the methods of the class.
        for name in _REGIONS:
            setattr(self, name, torch.compile(getattr(self, name), *args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        # The compiled regions of a copy would run the networks of the original.
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _REGIONS}

    def run_teacher(self, x: Tensor, y: Tensor | None = None) -> TeacherOutput:
        """Runs the teacher on a batch; J only if the labels are given and a method needs it."""
        if not self._frozen:
            return TeacherOutput()
        if y is not None and any(m.needs_teacher for m in self._gradient_methods):
            j, logits, features = logits_and_input_gradient(
                lambda x: self._read_teacher(x, check=True), x, y, False
            )
            return TeacherOutput(logits, features, j)
        with torch.no_grad():
            return TeacherOutput(*self._read_teacher(x))

    def _read_teacher(self, x: Tensor, check: bool = False) -> tuple[Tensor, list[Tensor]]:
        (teacher,) = self._frozen
        x = teacher.transform(x)
        layers = [t for _, t in self.pairs]
        logits, features = _read("the teacher", teacher.network, self._teacher_tap, x, layers)
        # If only features are needed, a teacher may return anything.
        return check_logits(logits, "the teacher") if check else logits, features

    def _read_student(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.student_transform(x)
        layers = [s for s, _ in self.pairs]
        logits, features = _read("the student", self.student, self._student_tap, x, layers)
        return check_logits(logits, "the student"), features

    def _student_step(
        self, x: Tensor, y: Tensor, progress: TrainingFraction, teacher: TeacherOutput
    ) -> tuple[Output, dict[str, list[Tensor]]]:
        step = StepInputs(
            y,
            teacher_logits=teacher.logits,
            teacher_features=teacher.features,
            teacher_gradient=teacher.gradient,
        )
        if self._gradient_methods:
            logits = self._read_with_gradients(x, step)
        else:
            logits, step.student_features = self._read_student(x)
        step.student_logits = logits
        # The losses are computed in float32 even under autocast: bfloat16 loses small differences.
        with torch.autocast(x.device.type, enabled=False):
            # Each method leaves a share of the cross-entropy, such as 1 − α.
            share: float | Tensor = 1.0
            for method in self.methods:
                share = share * method.cross_entropy_share(progress)
            loss = cross_entropy(logits, y, label_smoothing=self.label_smoothing)
            parts = {"ce": loss * share}
            for method in self.methods:
                parts[method.name] = method(step) * method.weight(progress)
        output = Output(torch.stack(list(parts.values())).sum(), logits, parts)
        return output, step.pair_terms

    def _read_with_gradients(self, x: Tensor, step: StepInputs) -> Tensor:
        """The student's logits; its features and input gradients go to `step`."""
        n, y = len(x), step.labels
        flips = any(m.needs_flipped for m in self._gradient_methods)
        if flips:
            # One pass for the images and the flipped images.
            x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        with defer_batch_norm_counters(self.student):
            j, logits, features = logits_and_input_gradient(
                self._read_student, x, y, torch.is_grad_enabled()
            )
        step.student_gradient = j[:n]
        if flips:
            step.flipped_gradient = j[n:].flip(-1)
        step.student_features = [f[:n] for f in features]
        return logits[:n]

    def batch_dependence_warning(self) -> str | None:
        """A warning if input gradients of the student, in its present mode, depend on the batch."""
        text = batch_dependence(self.student, "the student")
        if text is None or not self._gradient_methods:
            return None
        names = ", ".join(method.name for method in self._gradient_methods)
        advice = (
            "use a student without batch normalisation, such as nin-thin-no-bn, or freeze its "
            "statistics (--freeze-bn; in Python, put these layers in eval mode)"
        )
        return f"{text}, and so do the terms {names}: {advice}"

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the student and of the adapters, for the optimiser."""
        return (p for p in self.parameters() if p.requires_grad)

    def weights(self, progress: TrainingFraction) -> dict[str, float]:
        """The weights at `progress`: `beta` and `alpha`; `at.beta`, … if several methods have β."""
        counts = Counter(key for method in self.methods for key in method.weights(progress))
        weights = {}
        for method in self.methods:
            for key, value in method.weights(progress).items():
                weights[key if counts[key] == 1 else f"{method.name}.{key}"] = value
        return weights

    def features(
        self, x: Tensor, teacher: TeacherOutput | None = None
    ) -> tuple[list[Tensor], list[Tensor | StoredMap]]:
        """(The student's, the teacher's) features of the pairs, in eval mode, without gradients.

        The teacher's features come from `teacher`, if it is given; with a store and without
        `teacher` they are those of other images.
        """
        with evaluating(self.student):
            return self._read_student(x)[1], self._teacher_features(x, teacher)

    def _teacher_features(
        self, x: Tensor, teacher: TeacherOutput | None
    ) -> list[Tensor | StoredMap]:
        if teacher is None and self.store is not None:
            teacher = self.store.sample(len(x), x.device)
        elif teacher is None:
            # The method of the class, as the instance's may be compiled for another batch size.
            teacher = Transfer.run_teacher(self, x)
        return list(teacher.with_features(self._map_names).features)

    def close(self) -> None:
        """Removes the hooks from both networks; they are also removed with this object."""
        for tap in (self._student_tap, self._teacher_tap):
            if tap is not None:
                tap.close()

    def train(self, mode: bool = True) -> Transfer:
        super().train(mode)
        for teacher in self._frozen:
            teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Transfer:
        super()._apply(fn, recurse)
        for teacher in self._frozen:
            teacher._apply(fn)
        return self

    def _use_store(
        self, store: Store, pairs: str | Sequence[tuple[str, str]], example: Tensor | None
    ) -> None:
        """Finds the pairs, taps the student, and selects the maps of the store that are needed."""
        if self.map_options is not None:
            xs = None
            if example is not None:
                with torch.no_grad():
                    xs = self.student_transform(example)
            stages = store.stages(self.map_options)
            # The teacher's example is not read, because its stages are given.
            self.pairs = resolve_pairs(pairs, self.student, stages, xs, xs)
            with about("the student"):
                self._student_tap = self._tap_student(xs)
        self.store = store.select([t for _, t in self.pairs], self.map_options)

    def _tap_pairs(self, pairs: str | Sequence[tuple[str, str]], example: Tensor | None) -> None:
        """Finds the pairs and taps the two networks at their layers."""
        (teacher,) = self._frozen
        xs = xt = None
        if example is not None:
            with torch.no_grad():
                xs, xt = self.student_transform(example), teacher.transform(example)
        self.pairs = resolve_pairs(pairs, self.student, teacher.network, xs, xt)
        if self.pairs:
            with about("the student"):
                self._student_tap = self._tap_student(xs)
            with about("the teacher"):
                layers, attention = [t for _, t in self.pairs], self._attention[1]
                self._teacher_tap = Tap(teacher.network, layers, xt, attention=attention)

    def _tap_student(self, example: Tensor | None) -> Tap:
        layers = [s for s, _ in self.pairs]
        return Tap(self.student, layers, example, attention=self._attention[0])


def _read(
    name: str, model: nn.Module, tap: Tap | None, x: Tensor, layers: list[str]
) -> tuple[Any, list[Tensor]]:
    """The logits of a network and the features of its layers."""
    if tap is None:
        return call_uncompiled(model, x), []
    with about(name):
        logits, features = tap(x)
    return logits, [features[layer] for layer in layers]
