"""MSE-Adapter at the edge: sentiment and emotion from a clip and its transcript.

    from mse_runtime import Analyzer

    with Analyzer.open("tiny") as analyzer:
        print(analyzer.analyze("clip.mp4", "I really love it").value)

Names are imported when they are first used, so importing this package costs next to nothing.
"""

from __future__ import annotations

import os
from importlib import import_module

TYPE_CHECKING = False  # `typing` takes longer to import than the rest of a command's start
if TYPE_CHECKING:
    from typing import Any

    from mse_runtime.analyzer import Analyzer as Analyzer
    from mse_runtime.backbone import Backbone as Backbone
    from mse_runtime.bundle import Bundle as Bundle
    from mse_runtime.bundle import load_bundle as load_bundle
    from mse_runtime.errors import MSEError as MSEError
    from mse_runtime.features.extract import extract as extract
    from mse_runtime.result import Prediction as Prediction

__version__ = "0.1.0"

# ONNX Runtime's wheels report to their maker over the network; nothing here leaves this machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Analyzer": "analyzer",
    "Backbone": "backbone",
    "Bundle": "bundle",
    "MSEError": "errors",
    "Prediction": "result",
    "extract": "features.extract",
    "load_bundle": "bundle",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
