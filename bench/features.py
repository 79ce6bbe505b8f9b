"""From process start to features: seconds, ratio to real time, peak memory.

    python bench/features.py [--clip CLIP] [--repeat 7] [--cores 2] [--peers PYTHON] [--out F.jsonl]

Every run is a fresh process, timed from its start until it says that its features are ready (the
ratio counts imports and model loading), on `--cores` cores. The cases take turns, so other load
on the machine hits all alike. Clips are made from CLIP (default: the drawn one in examples/):
8 s at 512x512 and at 1080p, H.264 and AAC, and a film of two hours.

MediaPipe's FaceMesh and openSMILE's Python API run beside, in the interpreter `--peers` (their
dependencies exclude ours), where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 8

OURS = """
import json, sys
from mse_runtime.features.extract import extract
f = extract(sys.argv[1], **json.loads(sys.argv[2]))
face = 0 if f.face is None else int(f.face.valid.sum())
voice = 0 if f.audio is None else len(f.audio)
print(json.dumps({"rows": [voice, face], "stages": f.info["seconds"]}), flush=True)
"""
FACEMESH = """
import sys
import mediapipe as mp, av
from av.video.reformatter import VideoReformatter
fps, found, due, to = float(sys.argv[2]), 0, 0.0, VideoReformatter()
with mp.solutions.face_mesh.FaceMesh(refine_landmarks=True) as mesh, av.open(sys.argv[1]) as clip:
    clip.streams.video[0].thread_type = "AUTO"
    for frame in clip.decode(video=0):
        if frame.time >= due - 1e-3:
            due += 1 / fps
            scale = min(1, 640 / max(frame.width, frame.height))
            size = round(frame.width * scale), round(frame.height * scale)
            picture = to.reformat(frame, *size, "rgb24").to_ndarray()
            found += bool(mesh.process(picture).multi_face_landmarks)
print('{"rows": [0, %d]}' % found, flush=True)
"""
OPENSMILE = """
import sys
import numpy as np, av, opensmile
down = av.AudioResampler("s16", "mono", 16000)
with av.open(sys.argv[1]) as clip:
    parts = [o.to_ndarray()[0] for f in clip.decode(audio=0) for o in down.resample(f)]
smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.LowLevelDescriptors)
rows = smile.process_signal(np.concatenate(parts).astype(np.float32) / 32768, 16000)
print('{"rows": [%d, 0]}' % len(rows), flush=True)
"""


@dataclass(frozen=True)
class Case:
    name: str
    code: str
    clip: Path
    argument: str
    python: str
    target: str = ""
    seconds: float = SECONDS


def encode(source: Path, target: Path, size: tuple[int, int]) -> Path:
    """`SECONDS` of the source, repeated where it is shorter: H.264 at 25 fps, AAC at 44.1 kHz."""
    import av

    with av.open(str(target), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"preset": "medium", "crf": "21"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        sound = out.add_stream("aac", rate=44_100, layout="stereo")
        for number, frame in enumerate(islice(cycle(frames(source, size)), SECONDS * 25)):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        resampler = av.AudioResampler("fltp", "stereo", 44_100, frame_size=1024)
        with av.open(str(source)) as clip:
            heard = list(clip.decode(audio=0))
        written = 0
        for frame in cycle(heard):
            frame.pts = None
            for part in resampler.resample(frame):
                part.pts, part.time_base = written, Fraction(1, 44_100)
                written += part.samples
                out.mux(sound.encode(part))
            if written >= SECONDS * 44_100:
                break
        out.mux(sound.encode(None))
    return target


def frames(source: Path, size: tuple[int, int]) -> list[Any]:
    """The source's frames as squares of the target's height, edges repeated to its width."""
    import av
    import numpy as np

    width, height = size
    found = []
    with av.open(str(source)) as clip:
        for frame in islice(clip.decode(video=0), SECONDS * 25):
            square = frame.reformat(height, height, "rgb24").to_ndarray()
            side = (width - height) // 2
            wide: Any = np.pad(square, ((0, 0), (side, width - height - side), (0, 0)), "edge")
            found.append(av.VideoFrame.from_ndarray(wide, "rgb24").reformat(format="yuv420p"))
    return found


def film(source: Path, target: Path, hours: float = 2.0) -> Path:
    """The source's packets again and again: two hours without encoding them."""
    import av

    with av.open(str(source)) as clip, av.open(str(target), "w") as out:
        streams = {s.index: out.add_stream_from_template(s) for s in clip.streams}
        packets = [(p, p.dts, p.pts) for p in clip.demux() if p.size]
        stamped = [(p, dts, pts) for p, dts, pts in packets if dts is not None and pts is not None]
        turn = max((dts + (p.duration or 0)) * p.time_base for p, dts, _ in stamped)
        turn += Fraction(1, 10) - min(dts * p.time_base for p, dts, _ in stamped)
        for number in range(int(hours * 3600 / turn)):
            for packet, dts, pts in stamped:
                copy: Any = av.Packet(bytes(packet))
                shift = int(number * turn / packet.time_base)
                copy.pts, copy.dts = pts + shift, dts + shift
                copy.duration, copy.time_base = packet.duration, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, streams[packet.stream_index]
                out.mux(copy)
    return target


def run(case: Case) -> dict[str, Any] | None:
    """One process: seconds until its features are ready, CPU seconds, peak memory; None: failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    with subprocess.Popen(
        [case.python, "-c", case.code, str(case.clip), case.argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - begin
        child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not line:
        return None
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        **json.loads(line),
    }


def make(folder: Path, clip: Path, long: bool) -> None:
    small = encode(clip, folder / "512.mp4", (512, 512))
    encode(clip, folder / "1080p.mp4", (1920, 1080))
    if long:
        film(small, folder / "film.mp4")


def cases(folder: Path, peers: str, long: bool) -> Iterator[Case]:
    small, large = folder / "512.mp4", folder / "1080p.mp4"

    def ours(name: str, path: Path, target: str, **options: Any) -> Case:
        return Case(name, OURS, path, json.dumps(options), sys.executable, target)

    yield ours("512x512, 5 fps", small, "<= 0.07", fps=5)
    yield ours("512x512, 10 fps", small, "<= 0.10", fps=10)
    yield ours("1080p, 5 fps", large, "<= 0.15", fps=5)
    yield ours("sound only (lld13)", small, "", face_spec=None)
    yield ours("face only, 5 fps", small, "", audio_spec=None)
    if long:
        yield ours("2 hours, 8 s from 1:30:00", folder / "film.mp4", "< 2 s", start=5400, end=5408)
    yield Case("MediaPipe FaceMesh, 5 fps", FACEMESH, small, "5", peers)
    yield Case("openSMILE eGeMAPSv02", OPENSMILE, small, "", peers)


def summary(name: str, runs: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    middle = {key: statistics.median(r[key] for r in runs) for key in ("seconds", "cpu", "peak_mb")}
    stages = {
        stage: round(statistics.median(r["stages"][stage] for r in runs), 4)
        for stage in runs[0].get("stages", {})
    }
    return {
        "case": name,
        "ratio": round(middle["seconds"] / case.seconds, 4),
        "ratio_min": round(min(r["seconds"] for r in runs) / case.seconds, 4),
        "target": case.target,
        "seconds": round(middle["seconds"], 4),
        "cpu_seconds": round(middle["cpu"], 4),
        "peak_mb": round(middle["peak_mb"], 1),
        "rows": runs[0]["rows"],
        "stages": stages,
        "runs": len(runs),
    }


def machine(cores: set[int]) -> dict[str, Any]:
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(cores),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip", type=Path, default=ROOT / "examples" / "happy.mp4")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--peers", default=sys.executable, help="interpreter with the peers")
    parser.add_argument("--short", action="store_true", help="leave out the film of two hours")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.clip, not args.short)
        return
    cores = set(sorted(os.sched_getaffinity(0))[: args.cores])
    os.sched_setaffinity(0, cores)  # the children inherit it
    lines: list[dict[str, Any]] = [{"machine": machine(cores), "clip": args.clip.name}]
    print(json.dumps(lines[0]))
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory starts from its parent's.
        options = ["--make", folder, "--clip", str(args.clip), *["--short"] * args.short]
        subprocess.run([sys.executable, __file__, *options], check=True)
        every = list(cases(Path(folder), args.peers, not args.short))
        there = [case for case in every if run(case)]  # and warms the page cache
        results: dict[str, list[dict[str, Any]]] = {case.name: [] for case in there}
        for _ in range(args.repeat):
            for case in there:
                if found := run(case):
                    results[case.name].append(found)
    heads = f"{'ratio':>7} {'min':>7} {'target':>8} {'s':>6} {'CPU s':>6} {'MB':>5}  stages"
    print(f"{'case':28} {heads}")
    for case in every:
        if case not in there:
            print(f"{case.name:28} not installed, or failed")
            continue
        line = summary(case.name, results[case.name], case)
        lines.append(line)
        stages = " ".join(f"{k} {v:.2f}" for k, v in line["stages"].items())
        print(
            f"{case.name:28} {line['ratio']:7.3f} {line['ratio_min']:7.3f} {line['target']:>8} "
            f"{line['seconds']:6.2f} {line['cpu_seconds']:6.2f} {line['peak_mb']:5.0f}  {stages}"
        )
    if args.out:
        with args.out.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
