"""`tap`: the output of a model with the features of some of its layers, by forward hooks."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_images, check_module, check_switch
from ..errors import UserError, nearest, shown
from .attention import AttentionWatch, has_class_token, patch_attention
from .layout import Hints, Size, feature_map, find_layout, read_hints

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "_FabricModule", "FullyShardedDataParallel")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel, DDP or Fabric wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's
            model = model.get_submodule("_orig_mod")
        elif type(model).__name__ in _WRAPPERS:
            model = model.get_submodule("module")
        else:
            return model


def split_preprocessing(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The unwrapped network, and the preprocessing if the model contains it.

    A loaded model (`TrainedNetwork`) contains its preprocessing; its layers are the network's.
    """
    model = unwrap(model)
    if getattr(model, "preprocessing_inside", False):
        return unwrap(model.get_submodule("network")), model.get_submodule("preprocess")
    return model, None


def call_uncompiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)` without `model.compile()`, whose code ignores hooks that were added after it."""
    if model._compiled_call_impl is None:
        return model(*args, **kwargs)
    return model._call_impl(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode, without gradients, for the block; then restores its modes."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class _Copies:
    """The layers whose output an in-place operation (ReLU, +=) changes after it was captured.

    `complete`: a run on an example has found all of them.
    """

    layers: set[str] = field(default_factory=set)
    complete: bool = False


class _CaptureState(threading.local):
    """The state that a tap shares with its hooks. (Hooks with a reference to the tap would keep it
    alive.)

    Each thread has its own attributes, so threads that share a model do not mix their batches.
    """

    def __init__(self, copies: _Copies, class_token: bool):
        self.copies = copies  # of all threads
        self.class_token = class_token
        self.attention = AttentionWatch()
        self.active = False  # True only while the tap runs the model, not in other calls of it
        self.image: Size | None = None
        self.batch: int | None = None
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def changed(self) -> list[str]:
        """The layers whose output was written to after its capture."""
        return [n for n, version in self.versions.items() if self.features[n]._version != version]

    def capture(self, layer: str, hints: Hints, output: Any) -> None:
        """Captures the output of a layer."""
        if not self.active:
            return
        self._check_new(layer)
        features = feature_map(output, layer, self.image, self.batch, hints)
        if self._needs_copy(layer, features):
            features = features.clone()
        self.features[layer] = features
        if _has_version(features):
            self.versions[layer] = features._version

    def capture_attention(self, layer: str, hints: Hints) -> None:
        """Captures the attention of a layer. It is a new tensor, so nothing writes to it."""
        if not self.active:
            return
        self._check_new(layer)
        call = self.attention.running.pop(layer)
        self.features[layer] = patch_attention(
            call and call(), layer, self.image, self.batch, hints, self.class_token
        )

    def _check_new(self, layer: str) -> None:
        if layer in self.features:
            raise UserError(
                f"layer {layer!r} is called more than once in a forward pass: "
                "tap one that is called once"
            )

    def _needs_copy(self, layer: str, features: Tensor) -> bool:
        # Inductor removes unnecessary copies (its pass `remove_noop_ops`).
        if layer in self.copies.layers or torch.compiler.is_compiling():
            return True
        # Without a version counter, only the run on an example shows that no copy is needed.
        return not (_has_version(features) or self.copies.complete)


def _has_version(features: Tensor) -> bool:
    """Whether the tensor has a version counter: not in a traced graph or in inference mode."""
    return not torch.compiler.is_compiling() and not features.is_inference()


class _Hook:
    """The forward hook of a layer.

    A copied model has no tap, so a copy of the hook does nothing; a copied tap adds its own hooks.
    The copy is a function of the standard library, so that a saved model loads without this
    package.
    """

    def __init__(self, state: _CaptureState, layer: str, hints: Hints):
        self.state, self.layer, self.hints = state, layer, hints

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.state.capture(self.layer, self.hints, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _AttentionHook(_Hook):
    """The forward hook of a layer whose attention is read."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.state.capture_attention(self.layer, self.hints)


class _AttentionPreHook(_Hook):
    """The forward pre-hook of such a layer: attention computed after it belongs to the layer."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if self.state.active:
            self.state.attention.running[self.layer] = None


def _remove_copied_hooks(module: nn.Module) -> None:
    """Removes the copies of `_Hook`s that a copied module has."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__func__", 0) is nullcontext.__exit__:
                del hooks[key]


class Tap:
    """`Tap(model, layers)(x)` -> (output, {layer: features}).

    Features are (N, C, H, W) for any order of axes in the network, or (N, L, D) for tokens on a
    square grid, without prefix tokens (class, distillation, register). Tokens on any other grid
    become (N, D, h, w), since h and w do not follow from L. The hooks stay between calls, so that
    `torch.compile` can trace them; `close`, or the end of a `with` block or of the object, removes
    them. A tap is copied and pickled with its model; if only the model is copied, the hooks of the
    copy do nothing.

    With `attention` the features of a layer, a block of a vision transformer, are the attention of
    its heads over the patches, (N, heads, h, w): the class token's row of softmax(q·kᵀ/√d), or the
    mean of all rows if there is no class token. `attention_map(features, kind="attention")` is
    their mean over the heads. A layer of several blocks returns the attention of the last one.

    Args:
        model: any module; a compiled or wrapped one is unwrapped. A loaded model that contains its
            preprocessing takes images in [0, 1], and its layers are those of `.network`.
        layers: dotted names of its submodules, as in `model.named_modules()`. A layer may return a
            tuple or dict with one feature map in it.
        example: an input, used to find the layers whose outputs are changed in place later. The
            model runs on it in eval mode, and a copy of the model in training mode.
        attention: whether to read attention instead of features.

    Raises:
        UserError: for a name that is not a layer of the model (the message has the nearest), a
            layer that a forward pass calls twice or never, and a layer without exactly one feature
            map (or without attention over the patches).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        example: Tensor | None = None,
        *,
        attention: bool = False,
    ):
        check_module(model, "model")
        if isinstance(layers, (str, Tensor)) or not isinstance(layers, Iterable):
            raise UserError(f"layers is {shown(layers)}: expected a list of names")
        if example is not None:
            check_images(example, "example", model)
        model, self._preprocess = split_preprocessing(model)
        self.model = model
        for layer in (layers := list(layers)):
            if not isinstance(layer, str):
                raise UserError(f"layers has {shown(layer)}: expected names")
        self.layers = tuple(dict.fromkeys(layers))
        self.attention = check_switch(attention, "attention")
        self._state = _CaptureState(_Copies(), has_class_token(model))
        # A module that is registered under two names can be tapped by either.
        modules = dict(model.named_modules(remove_duplicate=False))
        for layer in self.layers:
            if layer not in modules:
                hint = f"{nearest(layer, modules)} (stages() lists those to tap)"
                raise UserError(f"{type(model).__name__} has no layer {layer!r}{hint}")
        self._register_hooks()
        try:
            self._detect_inplace(example)
        except BaseException:
            self.close()
            raise

    def _register_hooks(self) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._hints = {layer: read_hints(self.model, layer) for layer in self.layers}
        hooks = ExitStack()
        for layer, hints in self._hints.items():
            module, hook_class = modules[layer], _Hook
            _remove_copied_hooks(module)
            if self.attention:
                hook_class = _AttentionHook
                pre_hook = _AttentionPreHook(self._state, layer, hints)
                hooks.enter_context(module.register_forward_pre_hook(pre_hook))
            hook = hook_class(self._state, layer, hints)
            hooks.enter_context(module.register_forward_hook(hook))
        self._finalizer = weakref.finalize(self, hooks.close)

    def __getstate__(self) -> dict[str, Any]:
        copies = self._state.copies
        is_open = self._finalizer.alive
        return {
            "model": self.model,
            "layers": self.layers,
            "attention": self.attention,
            "_preprocess": self._preprocess,
            "_copies": _Copies(set(copies.layers), copies.complete),
            "open": is_open,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_open, copies = state.pop("open"), state.pop("_copies")
        self.__dict__.update(state)
        self._state = _CaptureState(copies, has_class_token(self.model))
        self._register_hooks()
        if not is_open:
            self.close()

    def _detect_inplace(self, example: Tensor | None) -> None:
        """Finds the layers whose outputs are changed in place later, so that they need a copy."""
        state, copies = self._state, self._state.copies
        modules = list(self.model.modules())
        if example is not None:
            with evaluating(self.model):
                self._run(example)
            copies.layers.update(state.changed())
            # Without a version counter (inference mode), writes to an output are not detected.
            copies.layers.update(layer for layer in self.layers if layer not in state.versions)
            copies.complete = True
            # A frozen model is not trained.
            if any(parameter.requires_grad for parameter in self.model.parameters()):
                self._detect_inplace_in_training(example)
            # If the run in training mode fails, in-place dropout is still known to write.
            modules = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd)]
        if any(getattr(module, "inplace", False) for module in modules):
            copies.layers.update(self.layers)

    def _detect_inplace_in_training(self, example: Tensor) -> None:
        """Runs a copy in training mode, in which dropout and other layers may write in place."""
        devices = [example.device] if example.device.type == "cuda" else []
        try:
            # The model's statistics and the random state of a run must not change.
            with torch.random.fork_rng(devices), torch.no_grad(), copy.deepcopy(self) as trained:
                trained.model.train()
                trained._run(example)
                self._state.copies.layers.update(trained._state.changed())
        except Exception:
            # For example, batch normalisation over one value raises. A real fault is reported by
            # the first step, and eager mode detects in-place writes in every step.
            self._state.copies.complete = False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """(The model's output, {layer: features}) for the model's own arguments.

        Raises:
            UserError: if a layer was called twice or never, has no feature map, or an operation
                changed its output in place after it was read.
        """
        output = self._run(*args, **kwargs)
        state = self._state
        for layer in self.layers:
            if layer not in state.features:
                raise UserError(
                    f"layer {layer!r} was not called in this forward pass, so it has no features"
                )
        # A traced graph has no versions.
        if not torch.compiler.is_compiling() and (changed := state.changed()):
            advice = (
                "give tap or Transfer an example input, so that this is found and a copy is taken"
            )
            if state.copies.complete:
                advice = (
                    "replace the operation that writes (inplace=True, +=): it did not run on the "
                    "example"
                )
            raise UserError(
                f"the output of layer {changed[0]!r} was changed in place after it was read: "
                f"{advice}"
            )
        features = {}
        for layer in self.layers:
            features[layer] = state.features[layer]
            if self.attention:
                continue
            layout = find_layout(features[layer].shape, state.image, self._hints[layer])
            if layout is not None:
                features[layer] = layout.features(features[layer])
        # The state would keep the features and their graph in memory until the next call.
        state.features.clear()
        return output, features

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        state.features.clear()
        state.versions.clear()
        state.attention.running.clear()
        state.image = state.batch = None
        if self._preprocess is not None:
            args, kwargs = (self._preprocess(*args, **kwargs),), {}
        for value in (*args, *kwargs.values()):
            # The first tensor of four axes is taken for the images.
            if isinstance(value, Tensor) and value.ndim == 4:
                state.image, state.batch = (value.shape[2], value.shape[3]), value.shape[0]
                break
        state.active = True
        try:
            if not self.attention:
                return call_uncompiled(self.model, *args, **kwargs)
            with state.attention:
                return call_uncompiled(self.model, *args, **kwargs)
        finally:
            state.active = False

    def close(self) -> None:
        """Removes the hooks: the tap can no longer be called."""
        self._finalizer()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


tap = Tap
