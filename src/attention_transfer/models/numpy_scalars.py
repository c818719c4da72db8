"""Reads numpy scalars in the files of `torch.save` without numpy's own unpickling code.

numpy's dtype takes its flags from the pickle, and crafted flags crash the process. The stand-ins
take only the name and the byte order of a dtype.
"""

from __future__ import annotations

import pickle
import re
from typing import Any, Literal


class DtypeStandIn:
    """Replaces `numpy.dtype` in a pickle: bool, int, uint, float, complex, str or bytes."""

    def __init__(self, name: str, *copy: bool):
        if not isinstance(name, str) or not re.fullmatch(r"[biufcUS]\d{1,9}", name):
            raise pickle.UnpicklingError(f"unsupported numpy dtype {name!r}")
        self.name = name
        self.byte_order: Literal["<", ">", "=", "|"] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Reads the byte order only: the other entries repeat the name, or are not trusted."""
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"unsupported byte order {state[1]!r}")
        self.byte_order = state[1]


def read_scalar(dtype: DtypeStandIn, data: bytes) -> Any:
    """Replaces numpy's `scalar` in a pickle."""
    import numpy as np

    if not isinstance(dtype, DtypeStandIn) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar without a dtype and bytes")
    numpy_dtype = np.dtype(dtype.name).newbyteorder(dtype.byte_order)
    return np.frombuffer(data, numpy_dtype, count=1)[0]


# The names in numpy's pickles; numpy 1 wrote the second.
NUMPY_STAND_INS: list[Any] = [
    (read_scalar, "numpy._core.multiarray.scalar"),
    (read_scalar, "numpy.core.multiarray.scalar"),
    (DtypeStandIn, "numpy.dtype"),
]
