"""Checks of the networks before any loss: modes, frozen parameters, range, features, pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ..errors import UserError, first_few
from ..map_inputs import StoredMap
from ..maps import attention_map
from ..methods.activation import ActivationTransfer
from ..taps import (
    depth_share,
    normalises_positions,
    split_preprocessing,
    try_stages,
    unwrap,
)
from ..transfer import Transfer
from .findings import STAGES_HINT, Finding, NetworkIO, networks

UNIFORM = 1e-4  # a map is uniform if its values differ by less, relative to the largest
RANGE_SLACK = 1e-3
# Layers with an effect in training mode only, by name: the last three are timm's or torchvision's.
STOCHASTIC_LAYERS = ("RReLU", "DropPath", "StochasticDepth", "DropBlock2d")

# The features of each pair: the student's, the teacher's.
Features = tuple[list[Tensor], list[Tensor | StoredMap]]


def check_modes(transfer: Transfer) -> Iterator[Finding]:
    student, teacher = transfer.student, transfer.teacher
    modal = {name: m for name, m in student.named_modules() if _depends_on_mode(m)}
    in_eval = [name for name, m in modal.items() if not m.training]
    kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in modal.values()))
    # Methods on input gradients, and fine-tuning, use batch normalisation in eval mode.
    intended = student.training or any(m.needs_gradient for m in transfer.methods)
    if in_eval and len(in_eval) == len(modal) and not intended:
        text = f"the student is in eval mode, but its {kinds} differ in training"
        yield Finding("warning", f"{text}: call transfer.train()")
    elif in_eval:
        text = f"{len(in_eval)} of the student's {len(modal)} {kinds} stay in eval mode"
        yield Finding("note", f"{text} ({first_few(in_eval)})")
    if teacher is not None and any(m.training for m in teacher.modules()):
        text = "the teacher is in train mode, which changes its outputs"
        yield Finding("warning", f"{text}: call transfer.train()")


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a layer's output in training mode differs from that in eval mode."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return type(module).__name__ in STOCHASTIC_LAYERS


def check_frozen(transfer: Transfer) -> Iterator[Finding]:
    parameters = dict(transfer.student.named_parameters())
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if len(frozen) == len(parameters):
        text = "every parameter of the student is frozen"
        yield Finding("error", f"{text}: set requires_grad of those to be trained")
    elif frozen:
        text = f"{len(frozen)} of the student's {len(parameters)} parameters are frozen"
        yield Finding("note", f"{text} ({first_few(frozen)}): they are not trained")
    if transfer.teacher is None:
        return
    if trained := [n for n, p in transfer.teacher.named_parameters() if p.requires_grad]:
        yield Finding(
            "warning",
            f"{len(trained)} parameters of the teacher require a gradient ({first_few(trained)}),"
            " which costs time and is never used: call transfer.teacher.requires_grad_(False)",
        )


def check_range(x: Tensor, io: NetworkIO) -> Iterator[Finding]:
    """Finds images outside [0, 1] for networks that normalise them."""
    if not x.isfinite().all():
        yield Finding("error", "the batch holds values that are not finite")
        return
    sides = [side for side in ("student", "teacher") if side in io.inputs]
    normalising = [side for side in sides if _is_normalised(x, io.inputs[side])]
    if not normalising:
        return
    low, high = x.min().item(), x.max().item()
    expected = f"but the {' and '.join(normalising)}'s normalisation takes images in [0, 1]"
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        advice = "divide by 255" if low >= 0 else "do not normalise them before"
        text = f"the batch has values from {low:.4g} to {high:.4g}"
        yield Finding("warning", f"{text}, {expected}: {advice}")
    elif 0 < high < 2 / 255:
        # Bytes that were divided by 255 twice are at most 1 / 255.
        text = f"the largest value of the batch is {high:.2g}"
        yield Finding("warning", f"{text}, {expected}: were they divided by 255 twice?")


def _is_normalised(x: Tensor, inner: Tensor) -> bool:
    """Whether a network's own preprocessing made `inner` of x by more than resizing."""
    # Resizing keeps the mean and slightly lowers the deviation; normalisation changes them more.
    shift, scale = (inner.mean() - x.mean()).abs(), x.std()
    return bool(shift > 0.05 * scale) or bool((inner.std() - scale).abs() > 0.5 * scale)


def check_layers(transfer: Transfer, features: Features, x: Tensor) -> Iterator[Finding]:
    """Finds layers whose features carry no information; a layer in several pairs is named once."""
    attention = [m for m in transfer.methods if isinstance(m, ActivationTransfer)]
    spatial = any(method.options.axis == "space" for method in attention)
    # If all images are equal, equal features are no fault.
    images_differ = bool((x != x[:1]).any())
    nets = dict(networks(transfer))
    for j, side in enumerate(("student", "teacher")):
        layers = {pair[j]: f for pair, f in zip(transfer.pairs, features[j], strict=True)}
        for layer, feature in layers.items():
            if isinstance(feature, StoredMap):
                feature = feature.as_features()
            problem = _feature_problem(feature, images_differ, spatial)
            if problem is None and spatial and side in nets:
                problem = _norm_problem(nets[side], layer)
            if problem is not None:
                yield Finding(problem.level, f"the {side}'s layer {layer} {problem.text}")


def _norm_problem(network: nn.Module, layer: str) -> Finding | None:
    """The finding for a layer whose map is flat up to its weights."""
    module = split_preprocessing(network)[0].get_submodule(layer)
    if not normalises_positions(module):
        return None
    text = f"is a {type(module).__name__}, which gives each position nearly the same energy"
    return Finding("warning", f"{text}, so its map says little: choose the layer before it")


def _feature_problem(feature: Tensor, images_differ: bool, spatial: bool) -> Finding | None:
    n = len(feature)
    if not feature.isfinite().all():
        return Finding("error", "outputs values that are not finite")
    if not feature.any():
        text = f"is dead: it outputs zeros for all {n} images; choose another layer"
        return Finding("error", f"{text} ({STAGES_HINT})")
    if images_differ and bool((feature == feature[:1]).all()):
        text = f"outputs the same features for all {n} images, so it carries no information"
        return Finding("warning", text)
    if not spatial:
        return None
    try:
        q = attention_map(feature, normalize=False)
    except UserError:
        return Finding("error", "outputs values whose squares overflow")
    if q.shape[1] == 1:
        text = "has one position, so its map is always 1: choose one before the pooling"
        return Finding("warning", f"{text} ({STAGES_HINT})")
    high, low = q.amax(1), q.amin(1)
    if bool((high - low <= UNIFORM * high).all()):
        text = f"has the same attention at every position of all {n} images: its map is uniform"
        return Finding("warning", text)
    return None


@dataclass
class PairEnd:
    """One layer of a pair; `x` is the input of its network, `feature` the output of the layer."""

    side: str
    network: nn.Module
    layer: str
    x: Tensor
    feature: Tensor

    @property
    def octave(self) -> float | None:
        """log2 of the stride from the network's input; None for tokens."""
        if self.feature.ndim != 4:
            return None
        positions = math.prod(self.feature.shape[-2:])
        return math.log2(math.prod(self.x.shape[-2:]) / positions) / 2

    @cached_property
    def depth(self) -> float:
        """The share of the network's layers that have run when the layer ends."""
        return depth_share(unwrap(self.network), self.layer, self.x[:2])

    @cached_property
    def stage(self) -> tuple[int, int]:
        """The stage of the nearest stride, counted from 1, and the number of stages."""
        strides = [stage.stride for stage in try_stages(self.network, self.x[:2])]
        distances = [abs(math.log2(stride) - (self.octave or 0)) for stride in strides]
        number = distances.index(min(distances)) + 1 if strides else 0
        return number, len(strides)

    @property
    def relative_stage(self) -> float:
        """The stage's position among the network's stages, from 0 to 1."""
        number, count = self.stage
        return (number - 1) / (count - 1) if count > 1 else 0.5

    def describe(self, by_stride: bool) -> str:
        place = f"{self.depth:.0%} through its network"
        if by_stride:
            place = f"stride {2 ** (self.octave or 0):.3g}"
            if self.stage[1]:
                place = f"stage {self.stage[0]} of {self.stage[1]}, {place}"
        return f"the {self.side}'s {self.layer} ({place})"


def check_pairs(transfer: Transfer, features: Features, io: NetworkIO) -> Iterator[Finding]:
    """Finds pairs whose layers are at different depths. Pairs with a store are not checked."""
    for pair, student_features, teacher_features in zip(transfer.pairs, *features, strict=True):
        if isinstance(teacher_features, StoredMap):
            continue
        pair_features = student_features, teacher_features
        student, teacher = (
            PairEnd(side, network, layer, io.inputs[side], feature)
            for (side, network), layer, feature in zip(
                networks(transfer), pair, pair_features, strict=True
            )
        )
        strided = student.octave is not None and teacher.octave is not None
        if _far_apart(student, teacher):
            ends = f"{student.describe(strided)} with {teacher.describe(strided)}"
            yield Finding("warning", f"a pair joins {ends}: {STAGES_HINT}")


def _far_apart(a: PairEnd, b: PairEnd) -> bool:
    if a.octave is None or b.octave is None:
        return abs(a.depth - b.depth) > 0.5
    distance = abs(a.octave - b.octave)
    if round(a.octave) == round(b.octave) or distance < 0.5:
        return False  # "auto" pairs such layers as well
    # Odd sizes can turn a stride of 2 into 2.1, so only a factor above 2**1.5 counts.
    return distance > 1.5 or abs(a.relative_stage - b.relative_stage) >= 0.5
