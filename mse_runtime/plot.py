"""One picture of one clip: frames with the face mesh, pitch, loudness, what was valid, the answer.

Needs matplotlib (`pip install 'mse-runtime[plot]'`), which is imported when a picture is drawn.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError
from mse_runtime.features.spec import Features, FeatureTrack, is_encoder_id

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "plot_prediction"]

FORMATS = (".png", ".svg", ".pdf")
MAX_FRAMES = 8
INK, SOFT, GRID = "#1b1f24", "#6b7280", "#d8dce2"
VOICE, FACE, ACCENT = "#2563a8", "#12805c", "#c2410c"
CHOSEN, OTHER = "#334155", "#b3bcc8"
SIGNS = {"negative": ACCENT, "neutral": SOFT, "positive": FACE}
# fonts that have Chinese, Japanese and Korean characters, where one is installed
WIDE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei")
# lines drawn over the faint mesh: indices into the 468 points
OUTLINES = (
    (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    (152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109, 10),
    (33, 160, 158, 133, 153, 144, 33),
    (362, 385, 387, 263, 373, 380, 362),
    (70, 63, 105, 66, 107),
    (336, 296, 334, 293, 300),
    (168, 197, 5, 4),
    (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 61),
    (78, 82, 13, 312, 308, 317, 14, 87, 78),
)


def check_plot(out: str | Path) -> None:
    """Raise UsageError where `out` could not be drawn: before the work, not after it."""
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a plot is one of {', '.join(FORMATS)}; give such a name.")
    if find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib: `pip install 'mse-runtime[plot]'`.")


def plot_prediction(
    features: Features | None, prediction: Mapping[str, Any] | None, out: str | Path
) -> None:
    """Draw `features` (and the answer, where there is one) into the file `out`.

    features: of `extract(..., keep_frames=n)`; without kept frames the film strip is left out.
    prediction: the JSON document of `mse-run --json`, or None for features alone.
    out: .png, .svg or .pdf.

    Raises UsageError: matplotlib is missing, no features, or a file that cannot be written.
    """
    path = Path(out)
    check_plot(path)
    if features is None:
        raise UsageError("nothing to draw: run on a clip first, then plot its features.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": _fonts(),
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 7.6), dpi=110, facecolor="white")
        _draw(figure, features, prediction)
        try:
            with warnings.catch_warnings():  # without a wide font, Chinese text becomes boxes
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                figure.savefig(path)
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error}): choose another place.") from error


def _fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]


def _draw(figure: Figure, features: Features, prediction: Mapping[str, Any] | None) -> None:
    start, stop = features.info.get("window", (0.0, features.duration))
    span = (float(start), max(float(stop), float(start) + 0.1))
    frames: Sequence[Mapping[str, Any]] = features.info.get("frames") or ()
    frames = frames[:MAX_FRAMES]
    right = 0.735 if prediction else 0.975
    grid = figure.add_gridspec(
        4, 1, left=0.07, right=right, top=0.88, bottom=0.08,
        height_ratios=(2.3 if prediction else 3.1, 1.6, 1.6, 0.8), hspace=0.22,
    )  # fmt: skip
    strip = figure.add_subplot(grid[0])
    pitch = figure.add_subplot(grid[1])
    loudness = figure.add_subplot(grid[2], sharex=pitch)
    mask = figure.add_subplot(grid[3], sharex=pitch)
    _film(strip, frames, span, features.face)
    _voice(pitch, loudness, features.audio)
    _validity(mask, features)
    for axes in (pitch, loudness):
        axes.tick_params(labelbottom=False)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    for axes in (pitch, loudness, mask):
        axes.set_xlim(*span)
        for frame in frames:
            axes.axvline(frame["time"], color=GRID, linewidth=0.8, zorder=0)
    mask.set_xlabel("time on the clip's clock, s")
    _header(figure, features, prediction)
    if prediction:
        _answer(figure, prediction)


def _header(figure: Figure, features: Features, prediction: Mapping[str, Any] | None) -> None:
    clip = Path(str((prediction or {}).get("clip") or "")).name
    title = clip or "features"
    figure.text(0.02, 0.965, title, fontsize=12, weight="bold", va="center")
    text = str((prediction or {}).get("text") or "")
    if text:
        figure.text(0.02, 0.925, f"“{textwrap.shorten(text, 130, placeholder=' …')}”", va="center")
    said = list((prediction or {}).get("warnings") or features.warnings)
    if said:
        note = textwrap.shorten(
            " ".join(f"{each.rstrip('.')}." for each in said), 200, placeholder=" …"
        )
        figure.text(0.02, 0.015, f"note: {note}", fontsize=7.5, color=ACCENT, va="center")


def _film(
    axes: Axes,
    frames: Sequence[Mapping[str, Any]],
    span: tuple[float, float],
    face: FeatureTrack | None,
) -> None:
    """The frames side by side, each joined to its moment on the time line below."""
    axes.set_axis_off()
    if not frames:
        why = "no frames were kept" if face is not None else "no picture"
        axes.text(0.5, 0.5, why, ha="center", va="center", color=SOFT, transform=axes.transAxes)
        return
    count = len(frames)
    shown = [_around_face(frame) for frame in frames]
    for slot, (frame, (x0, y0, x1, y1)) in enumerate(zip(frames, shown, strict=True)):
        panel = axes.inset_axes((slot / count + 0.004, 0.16, 1 / count - 0.008, 0.84))
        panel.imshow(frame["image"], interpolation="antialiased")
        if frame.get("mesh") is not None:
            _mesh(panel, *frame["mesh"])
        panel.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], anchor="S")
        seen = frame.get("mesh") is not None
        for side in panel.spines.values():
            side.set(visible=True, color=FACE if seen else ACCENT, linewidth=1.2)
        label = f"{frame['time']:.1f} s" + ("" if seen else ", no face")
        panel.set_title(label, fontsize=8, color=INK if seen else ACCENT, pad=3)
        moment = (frame["time"] - span[0]) / (span[1] - span[0])
        axes.plot(
            [(slot + 0.5) / count, moment], [0.15, -0.13],
            color=GRID, linewidth=0.8, transform=axes.transAxes, clip_on=False,
        )  # fmt: skip


def _around_face(frame: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """The part of a frame to show: a portrait cut around the face, or the frame's middle."""
    height, width = frame["image"].shape[:2]
    tall = float(min(height, width * 1.25))
    cx, cy = width / 2, height / 2
    if frame.get("mesh") is not None:
        points = frame["mesh"][0]
        low, high = points[:, :2].min(0), points[:, :2].max(0)
        cx, cy = (float(v) for v in (low + high) / 2)
        tall = float(np.clip(2.2 * (high - low).max(), 40, tall))
    wide = min(tall / 1.25, float(width))
    x0 = float(np.clip(cx - wide / 2, 0, width - wide))
    y0 = float(np.clip(cy - tall / 2, 0, height - tall))
    return x0 - 0.5, y0 - 0.5, x0 + wide - 0.5, y0 + tall - 0.5


def _mesh(axes: Axes, points: NDArray[np.float32], iris: NDArray[np.float32] | None) -> None:
    """Triangles of the mesh, faint; outlines and irises over them (continuous pixel -> index)."""
    from matplotlib.tri import Triangulation

    from mse_runtime.features.landmarks import neutral_mesh

    flat = neutral_mesh()
    triangles = Triangulation(flat[:, 0], flat[:, 1]).triangles
    x, y = points[:, 0] - 0.5, points[:, 1] - 0.5
    axes.triplot(x, y, triangles, color="white", linewidth=0.25, alpha=0.45)
    for line in OUTLINES:
        axes.plot(x[list(line)], y[list(line)], color="#7dffcf", linewidth=0.9, alpha=0.95)
    if iris is not None:
        axes.plot(iris[[0, 5], 0] - 0.5, iris[[0, 5], 1] - 0.5, "o", color="#ffd166", markersize=2)


def _voice(pitch: Axes, loudness: Axes, track: FeatureTrack | None) -> None:
    pitch.set_ylabel("F0, Hz")
    loudness.set_ylabel("loudness")
    names = _columns(track)
    f0 = next((name for name in names if name.startswith("F0semitone")), None)
    if track is None or not len(track) or f0 is None or "Loudness" not in names:
        why = "no sound" if track is None or not len(track) else f"not a column of {track.spec}"
        for axes in (pitch, loudness):
            axes.set_yticks([])
            axes.text(0.5, 0.5, why, ha="center", va="center", color=SOFT, transform=axes.transAxes)
        return
    semitones = track.values[:, names.index(f0)]
    hertz = np.where(semitones > 0, 27.5 * np.exp2(semitones / 12), np.nan)
    pitch.plot(track.times, hertz, color=VOICE, linewidth=1.4, marker=".", markersize=3)
    if np.isfinite(hertz).any():
        pitch.set_ylim(0.85 * float(np.nanmin(hertz)), 1.1 * float(np.nanmax(hertz)))
    else:
        pitch.set_yticks([])
        pitch.text(0.5, 0.5, "nothing voiced", ha="center", color=SOFT, transform=pitch.transAxes)
    loud = track.values[:, names.index("Loudness")]
    loudness.fill_between(track.times, loud, color=VOICE, alpha=0.25, linewidth=0)
    loudness.plot(track.times, loud, color=VOICE, linewidth=1.1)
    loudness.set_ylim(0, max(float(loud.max()) * 1.08, 0.1))


def _columns(track: FeatureTrack | None) -> tuple[str, ...]:
    from mse_runtime.errors import BundleError
    from mse_runtime.features.spec import get_spec

    if track is None or not track.spec or is_encoder_id(track.spec):
        return ()
    try:
        names = get_spec(track.spec).names
    except BundleError:
        return ()
    return names if len(names) == track.dim else ()


def _validity(axes: Axes, features: Features) -> None:
    """Bars where the voice was voiced and the face seen."""
    rows = (("face", features.face, FACE), ("voice", features.audio, VOICE))
    axes.set(ylim=(-0.6, 1.6), yticks=(0, 1))
    axes.set_yticklabels(["face seen", "voiced"])
    axes.tick_params(axis="y", length=0, colors=INK)
    for level, (_, track, colour) in enumerate(rows):
        if track is None or not len(track):
            start = axes.get_xlim()[0]
            axes.text(start, level, "  missing", va="center", color=ACCENT, fontsize=8)
            continue
        on = track.valid
        names = _columns(track)
        if track is features.audio:
            spot = next((n for n in names if n == "voiced" or n.startswith("F0semi")), None)
            on = on & (track.values[:, names.index(spot)] > 0) if spot else on
        step = float(np.median(np.diff(track.times))) if len(track) > 1 else 0.1
        # sound rows are named by their middle, frames by the moment they appear
        begin = track.times - (step / 2 if track is features.audio else 0)
        axes.broken_barh([(float(b), step) for b in begin], (level - 0.3, 0.6), color="#eceff3")
        bars = [(float(b), step) for b, good in zip(begin, on, strict=True) if good]
        axes.broken_barh(bars, (level - 0.3, 0.6), color=colour, linewidth=0)


def _answer(figure: Figure, prediction: Mapping[str, Any]) -> None:
    """The answer: a distribution over numbers, or a bar for each class."""
    distribution = prediction.get("distribution")
    probabilities: Mapping[str, float] = prediction.get("probabilities") or {}
    value = prediction.get("value")
    label = str(prediction.get("label", ""))
    headline, second = (label, "") if value is None else (f"{value:+.2f}", label)
    figure.text(0.775, 0.86, str(prediction.get("task", "")), fontsize=9, color=SOFT)
    figure.text(0.775, 0.815, textwrap.shorten(headline, 20), fontsize=17, weight="bold")
    figure.text(0.775, 0.782, textwrap.shorten(second, 34), fontsize=11)
    if distribution:
        axes = figure.add_axes((0.79, 0.5, 0.185, 0.25))
        numbers, shares = (np.array(side, float) for side in zip(*distribution, strict=True))
        width = float(np.min(np.diff(numbers))) if len(numbers) > 1 else 0.1
        colours = np.where(numbers < 0, ACCENT, np.where(numbers > 0, FACE, SOFT))
        axes.bar(numbers, shares, width=width, color=list(colours), alpha=0.85)
        if value is not None:
            axes.axvline(value, color=INK, linewidth=1.3)
        axes.set(yticks=[], xlabel="intensity (line: the expected value)")
        axes.spines["left"].set_visible(False)
    if probabilities:
        top = 0.40 if distribution else 0.77
        tall = min(0.045 * len(probabilities), top - 0.08)
        axes = figure.add_axes((0.84, top - tall, 0.12, tall))
        names = list(probabilities)[::-1]
        parts = [probabilities[name] for name in names]
        bars = [SIGNS.get(name, OTHER) if distribution else OTHER for name in names]
        if label in names and not distribution:
            bars[names.index(label)] = CHOSEN
        axes.barh(range(len(names)), parts, color=bars, height=0.7)
        axes.set_yticks(range(len(names)), labels=names)
        axes.set(xlim=(0, 1), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0, colors=INK)
        for row, share in enumerate(parts):
            axes.text(share + 0.02, row, f"{share:.0%}", va="center", fontsize=8)
    bundle = prediction.get("bundle") or {}
    lines = [str(bundle.get("name", ""))]
    if bundle.get("trained") is False:
        lines.append("untrained adapter: the answer means nothing")
    figure.text(0.775, 0.05, "\n".join(line for line in lines if line), fontsize=8, color=SOFT)
