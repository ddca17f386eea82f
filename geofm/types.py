"""Types that several rooms share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A JSON object.
Json = dict[str, Any]
#: Row numbers.
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
