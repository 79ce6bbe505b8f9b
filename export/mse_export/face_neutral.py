"""Derive the neutral face that head pose and action unit proxies are measured against.

    python -m mse_export.face_neutral CLIP [CLIP ...] -o mse_runtime/data/face/neutral_mesh.npy

For each clip: the mesh network's points in the fifth of its frames with the most closed mouth,
less those with a turned head or closing eyes, aligned by Procrustes; the clips' means are averaged
(one vote a clip), made symmetric, and scaled to an inter-ocular distance of 1. The result is an
average shape in the mesh network's own convention for depth, which a measured canonical head
would not share. The file that ships came from six clips of five people talking to a camera; it
holds 468 averaged points and nothing of any one of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mse_runtime.features import landmarks
from mse_runtime.features.geometry import Floats, Picture
from mse_runtime.features.mesh import FaceNetworks
from mse_runtime.features.tracks import FaceTracker

FPS = 10.0
ROUNDS = 4


def clip_points(path: Path, networks: FaceNetworks) -> Floats:
    """Mesh points [T, 468, 3] (px) of the chosen face of a clip."""
    import av

    tracker = FaceTracker(networks)
    due = 0.0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time is None or frame.time < due:
                continue
            due = frame.time + 1 / FPS
            rgb = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            tracker.add(Picture(rgb), frame.time)
    track, _ = tracker.choose()
    if track is None:
        raise SystemExit(f"{path}: no face; take it off the list.")
    return np.stack([seen.mesh.points for seen in track.seen])


def neutral_of_clip(points: Floats, reference: Floats) -> Floats:
    """Mean of a clip's calm, frontal frames in the face's own frame, [468, 3]."""
    frame = landmarks.face_frame(points, reference)
    own = frame.points
    mouth = own[:, 14, 1] - own[:, 13, 1]
    eyes = (own[:, 145, 1] - own[:, 159, 1] + own[:, 374, 1] - own[:, 386, 1]) / 2
    turned = np.abs(frame.angles[:, :2]).sum(1)
    calm = (mouth <= np.quantile(mouth, 0.2)) & (turned <= np.quantile(turned, 0.8))
    calm &= eyes >= np.quantile(eyes, 0.25)
    if not calm.any():
        calm = mouth <= np.quantile(mouth, 0.2)
    mean: Floats = own[calm].mean(0)
    return mean


def mirror_pairs(mesh: Floats) -> NDArray[np.intp]:
    """For every point the index of its mirror image across x = 0 (best one-to-one assignment)."""
    from scipy.optimize import linear_sum_assignment

    flipped = mesh * np.array([-1, 1, 1], np.float32)
    distance = np.linalg.norm(mesh[:, None] - flipped[None], axis=2)
    pairs = linear_sum_assignment(distance + distance.T)[1]
    if (pairs[pairs] != np.arange(len(mesh))).any():
        raise SystemExit("the average face is too lopsided to pair its points: use more clips.")
    return np.asarray(pairs)


def derive(clips: list[Floats]) -> Floats:
    """The neutral face [468, 3] from several clips' points."""
    first = clips[0][0]
    reference: Floats = (first - first[landmarks.RIGID].mean(0)) * np.float32(0.01)
    for _ in range(ROUNDS):
        mean = np.mean([neutral_of_clip(points, reference) for points in clips], axis=0)
        upright = _upright(mean - mean[landmarks.RIGID].mean(0))
        pairs = mirror_pairs(upright)
        even = (upright + upright[pairs] * np.array([-1, 1, 1], np.float32)) / 2
        even -= even[landmarks.RIGID].mean(0)
        width = np.linalg.norm(np.subtract(*even[list(landmarks.OUTER_EYES)]))
        reference = (even / width).astype(np.float32)
    return reference


def _upright(mesh: Floats) -> Floats:
    """Turned so that the eyes lie level and the forehead-to-chin line is vertical (face plane)."""
    x = mesh[263] + mesh[362] - mesh[33] - mesh[133]
    x = x / np.linalg.norm(x)
    y = mesh[152] - mesh[10]
    y = y - x * (x @ y)
    y = y / np.linalg.norm(y)
    turned: Floats = (mesh @ np.stack([x, y, np.cross(x, y)], 1)).astype(np.float32)
    middle = turned[[10, 9, 8, 168, 6, 1, 2, 0, 17, 152], 0].mean()
    turned[:, 0] -= middle
    return turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    networks = FaceNetworks()
    mesh = derive([clip_points(path, networks) for path in arguments.clips])
    np.save(arguments.output, mesh)
    print(
        f"{arguments.output}: {len(mesh)} points from {len(arguments.clips)} clips", file=sys.stderr
    )


if __name__ == "__main__":
    main()
