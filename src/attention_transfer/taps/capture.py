"""`tap`: a model's output with the features of some of its layers, by hooks that go with what put them on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest
from .layout import Layout, Size, feature_map, find_layout, read_hints

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "_FabricModule", "FullyShardedDataParallel")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel, DDP or Fabric wrappers."""
    while (compiled := hasattr(model, "_orig_mod")) or type(model).__name__ in _WRAPPERS:
        model = model.get_submodule("_orig_mod" if compiled else "module")
    return model


def call_uncompiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)`, but past a call that `model.compile()` compiled before the hooks came: it would leave them out."""
    return (model if model._compiled_call_impl is None else model._call_impl)(*args, **kwargs)


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
        names = dict(model.named_modules(remove_duplicate=False))
        for layer in self.layers:
            if layer not in names:
                hint = f"{nearest(layer, names)} (stages() lists those to tap)"
                raise UserError(f"{type(model).__name__} has no layer {layer!r}{hint}")
        self._hints = {layer: read_hints(model, layer) for layer in self.layers}
        # What the example showed: the layout of outputs (…, without N) of images (H, W).
        self._layouts: dict[str, tuple[tuple[int, ...], Size, Layout | None]] = {}
        handles = [names[layer].register_forward_hook(self._hook(layer)) for layer in self.layers]
        self._finalizer = weakref.finalize(self, _remove, handles)
        try:
            self._see_changes(example)
        except BaseException:
            self.close()
            raise

    def _hook(self, layer: str) -> Any:
        return _capture(layer, self._reading, self._hints[layer])

    def _see_changes(self, example: Tensor | None) -> None:
        """Finds out which layers' outputs are changed in place later on, and so have to be copied; and the layouts."""
        reading, modules = self._reading, list(self.model.modules())
        if example is not None:
            with evaluating(self.model):
                self._run(example)
            reading.copied.update(
                self._changed(), (n for n in self.layers if n not in reading.versions)
            )
            reading.known = True
            for layer, found in reading.features.items():
                assert reading.image is not None
                self._layouts[layer] = (
                    tuple(found.shape[1:]),
                    reading.image,
                    self._layout(layer, found),
                )
            # Dropout does nothing in eval mode, so the example has not shown it.
            modules = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        if any(getattr(m, "inplace", False) for m in modules):
            reading.copied.update(self.layers)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        output = self._run(*args, **kwargs)
        found = self._reading.features
        for layer in self.layers:
            if layer not in found:
                raise UserError(
                    f"layer {layer!r} was not called in this forward pass, so it has no features"
                )
        if not torch.compiler.is_compiling() and (changed := self._changed()):
            raise UserError(
                f"the output of layer {changed[0]!r} was changed in place after it was read: give tap or Transfer an "
                "example input, so that this is seen and a copy taken"
            )
        features = {}
        for layer in self.layers:
            layout = self._layout(layer, found[layer])
            features[layer] = found[layer] if layout is None else layout.features(found[layer])
        found.clear()
        return output, features

    def _layout(self, layer: str, output: Tensor) -> Layout | None:
        shape, image = tuple(output.shape), self._reading.image
        if layer in self._layouts:
            seen, size, layout = self._layouts[layer]
            if shape[1:] == seen and image == size:
                return layout
        return find_layout(shape, image, self._hints[layer])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        reading = self._reading
        reading.features.clear()
        reading.versions.clear()
        reading.image, reading.batch = _image(args, kwargs)
        reading.active = True
        try:
            return call_uncompiled(self.model, *args, **kwargs)
        finally:
            reading.active = False

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
    """`tap(model, layers)(x)` -> (output, {layer: features}).

    Features are (N, C, H, W), whatever the order of axes in the network, or (N, L, D) for tokens on a square grid,
    without prefix tokens (class, distillation, register). Tokens on another grid come as (N, D, h, w), since L alone
    would not tell h and w.

    Args:
        model: any module; a compiled or wrapped one is unwrapped.
        layers: dotted names of its submodules, as in `model.named_modules()`. One that puts out a tuple or a dict with
            one feature map among the rest gives that.
        example: an input with which to find out, once, which layers' outputs are changed in place later on.

    Raises:
        UserError: for a name that is no layer of the model (the nearest is named), a layer that is called twice in one
            forward pass or never, and a layer whose output is no tensor and does not hold one feature map.
    """
    return Tap(model, layers, example)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Size | None, int | None]:
    """((H, W), N) of the first batch of images among the arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4:
            return (value.shape[2], value.shape[3]), value.shape[0]
    return None, None


class _Reading:
    """What the hooks of one tap share: nothing is captured but while that tap is running the model."""

    def __init__(self) -> None:
        self.active = False
        self.image: Size | None = None
        self.batch: int | None = None
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        # A layer followed by an in-place one (ReLU, +=) would be read after that one has changed it.
        self.copied: set[str] = set()
        self.known = False  # whether an example has shown which layers those are


def _capture(layer: str, reading: _Reading, hints: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not reading.active:
            return
        if layer in reading.features:
            raise UserError(
                f"layer {layer!r} is called more than once in a forward pass: tap one that is called once"
            )
        found = feature_map(output, layer, reading.image, reading.batch, hints)
        # Neither a traced tensor nor one of inference mode counts the writes to it.
        counts = not torch.compiler.is_compiling() and not found.is_inference()
        copied = layer in reading.copied or not (counts or reading.known)
        reading.features[layer] = found.clone() if copied else found
        if counts:
            reading.versions[layer] = reading.features[layer]._version

    return hook
