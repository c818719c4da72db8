"""Read the layers of any module, list the stages of a network, pair the stages of two.

A stage is the outermost module that produces the last feature map before the resolution drops; a pre-activation's
BN-ReLU belongs to the next stage; outputs of 1×1 do not count.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError, nearest

_ELEMENTWISE = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "_FabricModule", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Stage:
    """A layer to tap: its dotted name in the network, and the shape of its features for the example, (N, C, H, W)."""

    name: str
    shape: tuple[int, ...]
    stride: float = field(default=1.0, compare=False)

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[2], self.shape[3]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel, DDP or Fabric wrappers."""
    while (compiled := hasattr(model, "_orig_mod")) or type(model).__name__ in _WRAPPERS:
        model = model.get_submodule("_orig_mod" if compiled else "module")
    return model


def hooked_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)`, but past a call that `model.compile()` compiled before the hooks came: it would leave them out."""
    return (model if model._compiled_call_impl is None else model._call_impl)(*args, **kwargs)


class Tap:
    """Calls a model and returns its output with the features of some of its layers.

    The hooks are put on once, so that `torch.compile` traces them into the graph, and come off with `close`, with the
    end of a `with` block, or with the object.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], example: Tensor | None = None):
        model = unwrap(model)
        self.model = model
        self.layers = tuple(dict.fromkeys(layers))
        self._reading = _Reading()
        names = dict(model.named_modules())
        handles = []
        for layer in self.layers:
            if layer not in names:
                hint = f"{nearest(layer, names)} (stages() lists those to tap)"
                raise UserError(f"{type(model).__name__} has no layer {layer!r}{hint}")
        for layer in self.layers:
            handles.append(names[layer].register_forward_hook(_capture(layer, self._reading)))
        self._finalizer = weakref.finalize(self, _remove, handles)
        try:
            self._see_changes(example)
        except BaseException:
            self.close()
            raise

    def _see_changes(self, example: Tensor | None) -> None:
        """Finds out which layers' outputs are changed in place later on, and so have to be copied."""
        reading, modules = self._reading, list(self.model.modules())
        if example is not None:
            with evaluating(self.model):
                self._run(example)
            reading.copied.update(self._changed(), (n for n in self.layers if n not in reading.versions))
            reading.known = True
            # Dropout does nothing in eval mode, so the example has not shown it.
            modules = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        if any(getattr(m, "inplace", False) for m in modules):
            reading.copied.update(self.layers)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        output = self._run(*args, **kwargs)
        found = self._reading.features
        for layer in self.layers:
            if layer not in found:
                raise UserError(f"layer {layer!r} was not called in this forward pass, so it has no features")
        if not torch.compiler.is_compiling() and (changed := self._changed()):
            raise UserError(
                f"the output of layer {changed[0]!r} was changed in place after it was read: give tap or Transfer an "
                "example input, so that this is seen and a copy taken"
            )
        features = {layer: found[layer] for layer in self.layers}
        found.clear()
        return output, features

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._reading.features.clear()
        self._reading.versions.clear()
        self._reading.active = True
        try:
            return hooked_call(self.model, *args, **kwargs)
        finally:
            self._reading.active = False

    def _changed(self) -> list[str]:
        """The layers whose captured output has been written to since."""
        reading = self._reading
        return [n for n, seen in reading.versions.items() if reading.features[n]._version != seen]

    def close(self) -> None:
        """Takes the hooks off; the tap can no longer be called."""
        self._finalizer()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tap(model: nn.Module, layers: Sequence[str], example: Tensor | None = None) -> Tap:
    """`tap(model, layers)(x)` -> (output, {layer: features}); features (N, C, H, W).

    Args:
        model: any module; a compiled or wrapped one is unwrapped.
        layers: dotted names of its submodules, as in `model.named_modules()`.
        example: an input with which to find out, once, which layers' outputs are changed in place later on.

    Raises:
        UserError: for a name that is no layer of the model (the nearest is named), a layer that is called twice in one
            forward pass or never, and a layer whose output is no tensor.
    """
    return Tap(model, layers, example)


def stages(model: nn.Module, example: Tensor) -> list[Stage]:
    """The stages of a network, input to output, found by running it once on `example` (N, C, H, W).

    timm models say theirs in `feature_info`; others are run with hooks on.

    Raises:
        UserError: where no module of the network puts out feature maps (N, C, H, W) larger than 1×1.
    """
    model = unwrap(model)
    found = _feature_info(model, example) or _traced(model, example)
    if not found:
        raise UserError(f"no stage in {type(model).__name__}: none of its modules puts out a feature map (N, C, H, W)")
    return found


def pair_stages(student: nn.Module, teacher: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Pairs (student layer, teacher layer) of equal stride from the input, by round(log2 stride).

    Raises:
        UserError: where the two have no stride in common; both lists of stages are in the message.
    """
    return match_stages(stages(student, example), stages(teacher, example))


def match_stages(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[tuple[str, str]]:
    """As `pair_stages`, for stages that are already known."""
    teachers = {_octave(s): s.name for s in teacher}
    pairs = [(s.name, teachers[_octave(s)]) for s in student if _octave(s) in teachers]
    if not pairs:
        raise UserError(
            f"no stage of the student has the stride of one of the teacher's; student: {describe(student)}; teacher: "
            f"{describe(teacher)}; name the pairs yourself (pairs=[(student layer, teacher layer), ...])"
        )
    return pairs


def describe(found: Sequence[Stage]) -> str:
    """One line of text for a list of stages."""
    return ", ".join(f"{s.name} {'×'.join(map(str, s.shape[1:]))} (stride {s.stride:g})" for s in found)


def _octave(stage: Stage) -> int:
    return round(math.log2(stage.stride))


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


class _Reading:
    """What the hooks of one tap share: nothing is captured but while that tap is running the model."""

    def __init__(self) -> None:
        self.active = False
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        # A layer followed by an in-place one (ReLU, +=) would be read after that one has changed it.
        self.copied: set[str] = set()
        self.known = False  # whether an example has shown which layers those are


def _capture(layer: str, reading: _Reading) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not reading.active:
            return
        if layer in reading.features:
            raise UserError(f"layer {layer!r} is called more than once in a forward pass: tap one that is called once")
        if not isinstance(output, Tensor):
            raise UserError(f"layer {layer!r} puts out a {type(output).__name__}, expected a tensor")
        # Neither a traced tensor nor one of inference mode counts the writes to it.
        counts = not torch.compiler.is_compiling() and not output.is_inference()
        copied = layer in reading.copied or not (counts or reading.known)
        reading.features[layer] = output.clone() if copied else output
        if counts:
            reading.versions[layer] = reading.features[layer]._version

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients inside the block; each module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class _Call:
    """One call of a module in a trace: where it stands, the sizes that came out inside it, and the calls inside it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] | None = None
    inside: list[_Call] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.shape is None else (self.shape[2], self.shape[3])

    def descendants(self) -> Iterator[_Call]:
        for call in self.inside:
            yield call
            yield from call.descendants()

    def leaves(self) -> Iterator[_Call]:
        if not self.inside:
            yield self
        for call in self.inside:
            yield from call.leaves()

    def sizes(self) -> list[tuple[int, int]]:
        """The distinct sizes put out inside, in order of appearance."""
        return list(dict.fromkeys(c.size for c in [*self.leaves(), self] if c.size is not None))


def _feature_info(model: nn.Module, example: Tensor) -> list[Stage]:
    info: Any = getattr(model, "feature_info", None)
    names = dict(model.named_modules())
    try:
        layers = [entry["module"] for entry in info]
    except (TypeError, KeyError, AttributeError):
        return []
    if not layers or any(not layer or layer not in names for layer in layers):
        return []
    try:
        with tap(model, layers) as tapped, evaluating(model):
            _, features = tapped(example)
    except UserError:
        return []
    found = [
        _stage(layer, tuple(f.shape), example) for layer, f in features.items() if f.ndim == 4 and f.shape[2:] != (1, 1)
    ]
    by_size = {s.size: s for s in found}  # the last of each resolution
    return list(by_size.values())


def _stage(name: str, shape: tuple[int, ...], example: Tensor) -> Stage:
    return Stage(name, shape, math.sqrt(math.prod(example.shape[-2:]) / math.prod(shape[-2:])))


def _traced(model: nn.Module, example: Tensor) -> list[Stage]:
    root = _trace(model, example)
    size = (example.shape[-2], example.shape[-1])
    last: dict[tuple[int, int], _Call] = {}
    calls = Counter(c.name for c in root.descendants())
    for call in _flatten(root, size, seen=set()):
        if calls[call.name] > 1:
            continue  # one ReLU or pool for the whole network: which call to read could not be said
        here = call.size
        assert here is not None
        before = last.get(here)
        if before is not None and before.inside and isinstance(call.module, _ELEMENTWISE):
            continue  # BN-ReLU after a block: a pre-activation, part of what comes next
        last[here] = call
    found = [_stage(c.name, c.shape, example) for c in last.values() if c.shape is not None]
    return sorted(found, key=lambda s: s.stride)


def _trace(model: nn.Module, example: Tensor) -> _Call:
    root = _Call("", model)
    stack = [root]
    handles = []
    for name, module in model.named_modules():
        if name == "":
            continue

        def enter(m: nn.Module, args: Any, name: str = name) -> None:
            call = _Call(name, m)
            stack[-1].inside.append(call)
            stack.append(call)

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            call = stack.pop()
            if isinstance(output, Tensor) and output.ndim == 4 and tuple(output.shape[2:]) != (1, 1):
                call.shape = tuple(output.shape)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluating(model):
            hooked_call(model, example)
    finally:
        _remove(handles)
    return root


def _flatten(call: _Call, size: tuple[int, int], seen: set[tuple[int, int]]) -> Iterator[_Call]:
    """The calls inside `call` as units at one resolution each; a container that spans several is opened.

    A block that lowers the resolution once and goes on working at the lower one (a residual stage) is one unit of the
    lower resolution, whatever it did before; one that only pools at its end is opened, since its last feature map
    before the drop is inside it.
    """
    for child in call.inside:
        sizes = [s for s in child.sizes() if s != size]
        if child.shape is None and not sizes:
            if child.inside:
                yield from _flatten(child, size, seen)
            continue
        one_drop = len(sizes) == 1 and child.size == sizes[0]
        starts_lower = size in seen or size not in child.sizes()
        unit = one_drop and starts_lower and _works_at(child, sizes[0])
        if not child.inside or (child.shape is not None and not sizes) or unit:
            if child.shape is not None:
                yield child
        else:
            yield from _flatten(child, size, seen)
        if child.size is not None:
            size = child.size
            seen.add(size)


def _works_at(call: _Call, size: tuple[int, int]) -> bool:
    """Whether a layer with weights other than a norm puts out this size inside `call`."""
    return any(
        leaf.size == size
        and not isinstance(leaf.module, _ELEMENTWISE)
        and next(leaf.module.parameters(recurse=False), None) is not None
        for leaf in call.leaves()
    )
