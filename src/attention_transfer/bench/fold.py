"""Batch normalisation of a network in eval mode folded into the convolutions before it, where that is exact.

In eval mode BN(conv(x)) = γ(w∗x + b − μ)/√(σ² + ε) + β is one convolution of the weights wγ/√(σ² + ε). Nothing is known
of a network but one run on an example: each BN whose input is the output of a convolution, and the only use of it, is
folded. In a WRN that is `bn1` of every block, and not `bn0`, which follows an addition (but the first block's follows
the stem, and where that block has a convolution for a shortcut, nothing else does).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Rounding of another order of operations, as a share of the largest value; a wrong fold is off by far more.
TOLERANCE = 1e-3


def fold_batch_norms(
    model: nn.Module, example: Tensor, layers: Sequence[str] = ()
) -> tuple[nn.Module, list[str]]:
    """A copy of the network in eval mode with its batch normalisations folded, and the names of those that were.

    What does not fold exactly stays as it is; where a folded network gives other values on the example than the one
    handed in (by more than rounding) or does not run, nothing is folded. Shared modules, modules with hooks or
    parametrizations and subclasses of `nn.Conv2d` are left alone.

    Args:
        model: images (N, C, H, W) -> anything; it is not changed.
        example: a batch that it takes.
        layers: names of submodules whose outputs have to stay what they are, those that are tapped.
    """
    plain = copy.deepcopy(model).eval()
    folded = copy.deepcopy(plain)
    with torch.no_grad():
        pairs = foldable(plain, example, layers)
        for conv, bn in pairs:
            convolution: Any = folded.get_submodule(conv)
            norm: Any = folded.get_submodule(bn)
            folded.set_submodule(conv, fuse_conv_bn_eval(convolution, norm))
            rest = () if type(norm) is nn.BatchNorm2d else (norm.drop, norm.act)
            folded.set_submodule(bn, nn.Sequential(*rest))
        if pairs and not _same(plain, folded, example, layers):
            return plain, []
    return folded, [bn for _, bn in pairs]


def foldable(
    model: nn.Module, example: Tensor, layers: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """[(convolution, batch normalisation)] of a network in eval mode, in the order of its layers."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    alone = {m: found[0] for m, found in names.items() if len(found) == 1 and not _hooked(m)}
    seen = _Uses()
    handles = [model.register_forward_hook(seen.keep)]
    handles += [model.get_submodule(layer).register_forward_hook(seen.keep) for layer in layers]
    for module in alone:
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(seen.made))
        elif _folds(module):
            handles.append(module.register_forward_pre_hook(seen.enter))
            handles.append(module.register_forward_hook(seen.leave))
    try:
        with torch.no_grad(), seen:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [(alone[conv], alone[bn]) for conv, bn in seen.pairs()]


class _Uses(TorchDispatchMode):
    """Who uses the outputs of convolutions: every operation is looked at, whatever called it."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are held, so that an id stays its own.
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self.held: list[Tensor] = []
        self.consumers: dict[int, list[nn.Module]] = {}
        self.others: set[int] = set()
        self.calls: Counter[nn.Module] = Counter()
        self.inside: int | None = None

    def made(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls[module] += 1
        self.outputs[id(output)] = (module, output)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.calls[module] += 1
        if args and id(args[0]) in self.outputs:
            self.inside = id(args[0])
            self.consumers.setdefault(self.inside, []).append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside = None

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.held += leaves
        self.others.update(map(id, leaves))

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        found = []
        for key, (conv, _) in self.outputs.items():
            consumers = self.consumers.get(key, [])
            if (
                key in self.others
                or len(consumers) != 1
                or self.calls[conv] != 1
                or self.calls[consumers[0]] != 1
            ):
                continue
            found.append((conv, consumers[0]))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self.outputs and id(leaf) != self.inside:
                self.others.add(id(leaf))
        return func(*args, **(kwargs or {}))


def _folds(module: nn.Module) -> bool:
    # timm's is batch normalisation with dropout and an activation behind it, and its own class.
    known = type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d"
    return known and getattr(module, "running_var", None) is not None


def _hooked(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _same(plain: nn.Module, folded: nn.Module, example: Tensor, layers: Sequence[str]) -> bool:
    try:
        one, other = (_outputs(m, example, layers) for m in (plain, folded))
    except (
        Exception
    ):  # a network that reads its own parts runs into what is no longer there, in any way
        return False
    return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    return bool((a - b).abs().amax() <= TOLERANCE * a.abs().amax())


def _outputs(model: nn.Module, example: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Every tensor that the network and these layers put out; copies, since a later layer may work in place."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    handles = [model.get_submodule(layer).register_forward_hook(keep) for layer in layers]
    try:
        keep(model, (), model(example))
    finally:
        for handle in handles:
            handle.remove()
    return found
