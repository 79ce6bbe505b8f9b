"""Reading clips with PyAV: probing, sound at 16 kHz, frames sampled by their timestamps.

Everything streams; no file is ever loaded whole. Import this package late: it loads FFmpeg.
"""

from __future__ import annotations

from mse_runtime.media.probe import AudioInfo, ClipInfo, VideoInfo, Window, plan_window, probe
from mse_runtime.media.sound import RATE, SoundReader, Waveform
from mse_runtime.media.video import FrameReader, Sample

__all__ = [
    "RATE",
    "AudioInfo",
    "ClipInfo",
    "FrameReader",
    "Sample",
    "SoundReader",
    "VideoInfo",
    "Waveform",
    "Window",
    "plan_window",
    "probe",
]
