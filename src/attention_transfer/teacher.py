"""The teacher's side of a `Transfer`: its outputs, a frozen copy, or a store in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .arguments import check_module, check_transform
from .errors import UserError
from .map_inputs import StoredMap
from .map_options import MapOptions
from .taps import Stage, split_preprocessing

Transform = Callable[[Tensor], Tensor]


class TeacherOutput(NamedTuple):
    """The teacher's logits, features of the paired layers and J; only those that methods need.

    A store returns normalised maps by name instead of features: (N, H, W), or (N, C).
    """

    logits: Tensor | None = None
    features: Sequence[Tensor | StoredMap] = ()
    gradient: Tensor | None = None
    maps: Mapping[str, Tensor] | None = None

    def head(self, count: int) -> TeacherOutput:
        """The stored outputs for the first images."""
        logits, maps = self.logits, self.maps or {}
        if logits is not None:
            logits = logits[:count]
        return self._replace(logits=logits, maps={name: m[:count] for name, m in maps.items()})

    def with_features(self, names: Sequence[str]) -> TeacherOutput:
        """The output with the maps of these names as its features, if it has maps.

        Raises:
            UserError: if a map is missing.
        """
        if self.maps is None:
            return self
        for name in names:
            if name not in self.maps:
                raise UserError(f"the teacher's maps are {', '.join(self.maps)}: expected {name}")
        features = [StoredMap(self.maps[name]) for name in names]
        return self._replace(features=features, maps=None)


class Store(Protocol):
    """The methods of a store that `Transfer` calls; `TeacherStore` has them."""

    def stages(self, options: MapOptions) -> Sequence[Stage]:
        """The teacher's stages whose maps are in the store."""

    def select(self, layers: Sequence[str], options: MapOptions | None) -> Store:
        """The same store with the maps of these layers only; raises `UserError` without a map."""

    def read(
        self, rows: Tensor, view: int = 0, device: torch.device | str = "cpu"
    ) -> TeacherOutput:
        """The teacher's outputs for one view of some images."""

    def sample(self, count: int, device: torch.device | str = "cpu") -> TeacherOutput:
        """Outputs for some stored images; placeholders of the right shape if there are none."""


class FrozenTeacher(nn.Module):
    """A copy of the teacher and its transform, in eval mode and without gradients."""

    def __init__(self, network: nn.Module, transform: Transform | None):
        super().__init__()
        self.network = copy.deepcopy(network)
        self.transform = nn.Identity() if transform is None else copy.deepcopy(transform)
        self.eval().requires_grad_(False)


def split_transform(
    model: nn.Module, transform: Transform | None, role: str
) -> tuple[nn.Module, Transform | None]:
    """A network and its transform; a loaded model contains its transform.

    Raises:
        UserError: for arguments of the wrong type, and for two transforms.
    """
    check_module(model, role)
    check_transform(transform, f"{role}_transform")
    network, preprocess = split_preprocessing(model)
    if preprocess is None:
        return network, transform
    if transform is not None:
        raise UserError(
            f"the {role} has its preprocessing inside and there is {role}_transform: expected one "
            f"of them; leave {role}_transform out"
        )
    return network, preprocess
