"""Types that several rooms share: JSON objects and numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A JSON object.
Json = dict[str, Any]
#: Row numbers and other whole numbers.
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Bools = NDArray[np.bool_]
#: Left and right rows of pairs, each of shape (pairs,).
Pairs = tuple[Indices, Indices]
