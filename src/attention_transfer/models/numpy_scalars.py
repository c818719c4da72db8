"""Numpy scalars in the files of `torch.save`, which numpy's own unpickling code never sees.

numpy's dtype takes its flags from the pickle, and crafted flags crash the process. These stand-ins
take a dtype's name and byte order alone.
"""

from __future__ import annotations

import pickle
import re
from typing import Any, Literal


class DtypeStandIn:
    """In a pickle, the place of `numpy.dtype`: bool, int, uint, float, complex, str or bytes."""

    def __init__(self, name: str, *copy: bool):
        if not isinstance(name, str) or not re.fullmatch(r"[biufcUS]\d{1,9}", name):
            raise pickle.UnpicklingError(f"unsupported numpy dtype {name!r}")
        self.name = name
        self.byte_order: Literal["<", ">", "=", "|"] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """The rest of the state repeats the name; it is the size and flags that are not trusted."""
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"unsupported byte order {state[1]!r}")
        self.byte_order = state[1]


def read_scalar(dtype: DtypeStandIn, data: bytes) -> Any:
    """In a pickle, the place of numpy's `scalar`."""
    import numpy as np

    if not isinstance(dtype, DtypeStandIn) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar without a dtype and bytes")
    numpy_dtype = np.dtype(dtype.name).newbyteorder(dtype.byte_order)
    return np.frombuffer(data, numpy_dtype, count=1)[0]


# The names that numpy's pickles have; numpy 1 wrote the second.
NUMPY_STAND_INS: list[Any] = [
    (read_scalar, "numpy._core.multiarray.scalar"),
    (read_scalar, "numpy.core.multiarray.scalar"),
    (DtypeStandIn, "numpy.dtype"),
]
