"""What the backbone tests share beside their fixtures (`backbone_fixtures`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mse_runtime.backbone import Backbone

TOLERANCE = 1e-4

Open = Callable[..., Backbone]


def worst(a: Any, b: Any) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())
