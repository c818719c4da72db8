"""What preflight can tell from the networks, a batch and its features, before any loss is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ..maps import attention_map
from ..taps import Stage, try_stages
from ..transfer import Transfer

UNIFORM = 1e-4  # a map whose values differ by less, relative to the largest, is uniform
RANGE_SLACK = 1e-3
STAGES = "see `attention-transfer stages STUDENT TEACHER`"

_RANDOM = (
    "RReLU",
    "DropPath",
    "StochasticDepth",
    "DropBlock2d",
)  # the last three are timm's and torchvision's


@dataclass(frozen=True)
class Finding:
    """One thing that preflight found. An error makes the run worthless, a warning probably; a note is to be known."""

    level: Literal["note", "warning", "error"]
    text: str


@dataclass
class NetworkIO:
    """The last input, past the network's own preprocessing, and output of each network."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def classes(self, side: str) -> int | None:
        """K of the logits (N, K); None where the network was not run, or puts out something else."""
        logits = self.outputs.get(side)
        return logits.shape[1] if logits is not None and logits.ndim == 2 else None


def networks(transfer: Transfer) -> list[tuple[str, nn.Module]]:
    """Each network with its side, the teacher where there is one."""
    both = (("student", transfer.student), ("teacher", transfer.teacher))
    return [(side, network) for side, network in both if network is not None]


# What can be read without running anything.


def check_modes(transfer: Transfer) -> Iterator[Finding]:
    modal = {n: m for n, m in transfer.student.named_modules() if _is_modal(m)}
    asleep = [n for n, m in modal.items() if not m.training]
    kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in modal.values()))
    # Methods on input gradients, and fine-tuning, want batch normalisation in eval mode: it alone is no mistake.
    wanted = transfer.student.training or any(m.needs_gradient for m in transfer.methods)
    if asleep and len(asleep) == len(modal) and not wanted:
        yield Finding(
            "warning",
            f"the student is in eval mode, but its {kinds} train otherwise: call transfer.train()",
        )
    elif asleep:
        yield Finding(
            "note",
            f"{len(asleep)} of the student's {len(modal)} {kinds} stay in eval mode ({_few(asleep)})",
        )
    if transfer.teacher is not None and any(m.training for m in transfer.teacher.modules()):
        yield Finding(
            "warning",
            "the teacher is in train mode, where it is not what was trained: call transfer.train()",
        )


def _is_modal(module: nn.Module) -> bool:
    """Whether it does in training what it does not in evaluation."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return type(module).__name__ in _RANDOM


def check_frozen(transfer: Transfer) -> Iterator[Finding]:
    names = [n for n, _ in transfer.student.named_parameters()]
    frozen = [n for n, p in transfer.student.named_parameters() if not p.requires_grad]
    if len(frozen) == len(names):
        yield Finding(
            "error",
            "every parameter of the student is frozen: set requires_grad of those to be trained",
        )
    elif frozen:
        text = f"{len(frozen)} of the student's {len(names)} parameters are frozen ({_few(frozen)})"
        yield Finding("note", f"{text}: they stay as they are")
    if transfer.teacher is not None:
        loose = [n for n, p in transfer.teacher.named_parameters() if p.requires_grad]
        if loose:
            text = f"{len(loose)} parameters of the teacher require a gradient ({_few(loose)}), which costs time"
            yield Finding(
                "warning", f"{text} and is never used: call transfer.teacher.requires_grad_(False)"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# The batch, the features, the pairs.


def check_range(x: Tensor, seen: NetworkIO) -> Iterator[Finding]:
    if not x.isfinite().all():
        yield Finding("error", "the batch holds values that are not finite")
        return
    low, high = x.min().item(), x.max().item()
    normalising = [
        s for s in ("student", "teacher") if s in seen.inputs and _normalised(x, seen.inputs[s])
    ]
    if not normalising:
        return
    who = " and ".join(normalising)
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        text = f"the batch goes from {low:.4g} to {high:.4g}, but the {who}'s normalisation takes images in [0, 1]"
        yield Finding(
            "warning", f"{text}: {'divide by 255' if low >= 0 else 'do not normalise them before'}"
        )
    elif 0 < high < 2 / 255:
        text = f"the batch goes up to {high:.2g} only, but the {who}'s normalisation takes images in [0, 1]"
        yield Finding("warning", f"{text}: were they divided by 255 twice?")


def _normalised(x: Tensor, inner: Tensor) -> bool:
    """Whether a network's own preprocessing does more to the batch than to resize it."""
    shift, scale = (inner.mean() - x.mean()).abs(), x.std()
    return bool(shift > 0.05 * scale) or bool((inner.std() - scale).abs() > 0.5 * scale)


def check_layers(
    transfer: Transfer, features: tuple[list[Tensor], list[Tensor]], x: Tensor
) -> Iterator[Finding]:
    """Layers that tell nothing, each named once however many pairs it is in."""
    spatial = any(getattr(m, "options", {}).get("axis") == "space" for m in transfer.methods)
    varied = bool((x != x[:1]).any())
    for j, (side, _) in enumerate(networks(transfer)):
        layers = {pair[j]: f for pair, f in zip(transfer.pairs, features[j], strict=True)}
        for layer, feature in layers.items():
            if (fault := _fault(feature, varied, spatial)) is not None:
                yield Finding(fault.level, f"the {side}'s layer {layer} {fault.text}")


def _fault(feature: Tensor, varied: bool, spatial: bool) -> Finding | None:
    n = len(feature)
    if not feature.isfinite().all():
        return Finding("error", "puts out values that are not finite")
    if not feature.any():
        return Finding(
            "error",
            f"is dead: it puts out zeros for all {n} images; choose another layer ({STAGES})",
        )
    if varied and bool((feature == feature[:1]).all()):
        return Finding(
            "warning",
            f"puts out the same features for all {n} images, so it tells nothing about them",
        )
    if not spatial:
        return None
    q = attention_map(feature, normalize=False)
    if q.shape[1] == 1:
        return Finding(
            "warning",
            f"has one position, so its map is always 1: choose one before the pooling ({STAGES})",
        )
    high, low = q.amax(1), q.amin(1)
    if bool((high - low <= UNIFORM * high).all()):
        return Finding(
            "warning",
            f"has the same attention at every position of all {n} images: its map says nothing",
        )
    return None


@dataclass
class _End:
    """One end of a pair: a layer of one side, and where it stands in its network."""

    side: str
    network: nn.Module
    layer: str
    octave: float | None  # log2 of its stride from its network's input; None for tokens

    def depth(self) -> float:
        """The share of the network's modules that are defined before the layer."""
        names = [n for n, _ in self.network.named_modules()]
        return names.index(self.layer) / max(len(names) - 1, 1)

    def stage(self, found: Sequence[Stage]) -> int:
        """Which of the network's stages has the stride nearest to the layer's."""
        octave = self.octave or 0.0
        return min(range(len(found)), key=lambda k: abs(math.log2(found[k].stride) - octave))

    def words(self, found: Sequence[Stage]) -> str:
        stage = f"stage {self.stage(found) + 1} of {len(found)}, " if found else ""
        return f"the {self.side}'s {self.layer} ({stage}stride {2 ** (self.octave or 0.0):.3g})"


def check_depths(
    transfer: Transfer, features: tuple[list[Tensor], list[Tensor]], seen: NetworkIO
) -> Iterator[Finding]:
    """Pairs whose layers stand in different parts of their networks."""
    both = networks(transfer)
    found: list[list[Stage]] = []
    for layers, *pair in zip(transfer.pairs, *features, strict=True):
        octaves = [_octave(seen.inputs[s], f) for (s, _), f in zip(both, pair, strict=True)]
        s, t = (_End(*side, layer, o) for side, layer, o in zip(both, layers, octaves, strict=True))
        if s.octave is None or t.octave is None:
            if abs(s.depth() - t.depth()) > 0.5:
                ends = [
                    f"the {e.side}'s {e.layer} ({e.depth():.0%} through its network)"
                    for e in (s, t)
                ]
                yield Finding("warning", f"a pair joins {ends[0]} with {ends[1]}: {STAGES}")
            continue
        apart = abs(s.octave - t.octave)
        if round(s.octave) == round(t.octave) or apart < 0.5:
            continue  # as "auto" joins them
        found = found or [try_stages(network, seen.inputs[side][:2]) for side, network in both]
        # Odd sizes make 2.1 of a stride of 2: more than a factor of 2 is what is nearer to 4.
        if apart > 1.5 or abs(_relative(s, found[0]) - _relative(t, found[1])) >= 0.5:
            yield Finding(
                "warning", f"a pair joins {s.words(found[0])} with {t.words(found[1])}: {STAGES}"
            )


def _octave(x: Tensor, feature: Tensor) -> float | None:
    if feature.ndim != 4:
        return None
    return math.log2(math.prod(x.shape[-2:]) / math.prod(feature.shape[-2:])) / 2


def _relative(end: _End, found: Sequence[Stage]) -> float:
    """The stage's place among its network's, from 0 to 1."""
    return end.stage(found) / (len(found) - 1) if len(found) > 1 else 0.5
