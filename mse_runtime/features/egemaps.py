"""eGeMAPSv02 low-level descriptors through openSMILE, where the user installed it (`egemaps25/1`).

openSMILE is under audEERING's research licence: non-commercial use, its output included. So it is
an extra the user chooses, never a dependency, and the licence is said once a process. Only its
ctypes layer is loaded, by path: the package's own `__init__` pulls in pandas and more.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError

__all__ = ["HOP", "egemaps_llds", "egemaps_names", "is_installed"]

HOP = 0.010
"""Seconds between rows; row i describes the 20 ms (60 ms for pitch) from i * HOP."""

_FLOOR = -201.0
"""openSMILE's level of digital silence. Kept, for published adapters have seen it; nothing passes
below. Bundles with statistics clamp it with everything else (`normalise.prepare`)."""
_MIN_SAMPLES = 960
"""openSMILE returns nothing for less than one pitch frame (60 ms)."""
_MODULE = "_mse_opensmile_ctypes"
_log = logging.getLogger(__name__)
_told = False


def is_installed() -> bool:
    """Whether openSMILE's files are there; nothing of it is loaded."""
    return importlib.util.find_spec("opensmile") is not None


def egemaps_names() -> list[str]:
    """The column names openSMILE itself reports."""
    smile = _open(16000)
    try:
        count = smile.external_sink_get_num_elements("extsink")
        return [str(smile.external_sink_get_element_name("extsink", i)) for i in range(count)]
    finally:
        smile.free()


def egemaps_llds(samples: NDArray[np.int16], rate: int = 16000) -> NDArray[np.float32]:
    """The 25 descriptors of mono speech.

    Args:
        samples: int16 [n], n >= 0; shorter than 60 ms is padded with silence.
        rate: samples a second.

    Returns:
        float32 [T, 25], one row each 10 ms, finite, nothing below the -201 dB of silence.

    Raises:
        UsageError: openSMILE is not installed.
    """
    samples = np.ascontiguousarray(samples, dtype=np.int16)
    if len(samples) < _MIN_SAMPLES:
        samples = np.pad(samples, (0, _MIN_SAMPLES - len(samples)))
    smile = _open(rate)
    rows: list[NDArray[np.float32]] = []

    def keep(data: NDArray[np.float32], *_: Any) -> None:
        # openSMILE reuses its buffer after the callback returns.
        rows.append(np.array(data, np.float32).reshape(-1))

    try:
        smile.external_sink_set_callback_ex("extsink", keep)
        smile.external_audio_source_write_data("extsource", samples.tobytes())
        smile.external_audio_source_set_eoi("extsource")
        smile.run()
    finally:
        smile.free()
    values = np.stack(rows) if rows else np.zeros((0, 25), np.float32)
    return np.maximum(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=_FLOOR), _FLOOR)


def _open(rate: int) -> Any:
    global _told
    root = _root()
    config = root / "core" / "config"
    shared = config / "shared"
    smile = _ctypes_layer(root).OpenSMILE()
    smile.initialize(
        config_file=str(config / "egemaps" / "v02" / "eGeMAPSv02.conf"),
        options={
            "source": str(shared / "standard_external_wave_input.conf.inc"),
            "sampleRate": rate,
            "nBits": 16,
            "sink": str(shared / "standard_external_data_output_single.conf.inc"),
            "sinkLevel": "lld",
            "bufferModeRbConf": str(shared / "BufferModeRb.conf.inc"),
            "frameModeFunctionalsConf": str(shared / "FrameModeFunctionals.conf.inc"),
        },
        loglevel=0,
        debug=False,
        console_output=False,
        log_file=None,
    )
    if not _told:
        _told = True
        _log.warning(
            "egemaps25 uses openSMILE (c) audEERING GmbH: research licence, non-commercial use "
            "only, features computed with it included"
        )
    return smile


def _root() -> Path:
    found = importlib.util.find_spec("opensmile")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "egemaps25/1 needs openSMILE, which is not installed (its research licence forbids "
            "shipping it). For non-commercial use: pip install --no-deps opensmile; "
            "otherwise use a bundle made for lld13/1."
        )
    return Path(next(iter(found.submodule_search_locations)))


def _ctypes_layer(root: Path) -> ModuleType:
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    spec = importlib.util.spec_from_file_location(_MODULE, root / "core" / "lib.py")
    if spec is None or spec.loader is None:
        raise UsageError(f"{root} holds no ctypes layer; reinstall opensmile (2.5 or newer).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise UsageError(
            f"openSMILE's library cannot be loaded ({error}). Reinstall opensmile for this "
            "platform, or use a bundle made for lld13/1."
        ) from error
    sys.modules[_MODULE] = module
    return module
