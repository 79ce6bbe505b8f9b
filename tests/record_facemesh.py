"""Record MediaPipe's own FaceMesh landmarks for a clip: the golden file of tests/test_face.py.

    python -m venv mp && mp/bin/pip install mediapipe==0.10.21 av
    mp/bin/python tests/record_facemesh.py CLIP -o tests/fixtures/face/NAME.npz

Runs in an environment of its own: mediapipe 0.10.21 wants NumPy 1. It reads every fifth frame as
RGB and stores x and y in 1/32 px (int16), so that a clip of five seconds takes about 40 kB.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np

EVERY = 5
UNITS_PER_PIXEL = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    import av
    import mediapipe as mp

    network = mp.solutions.face_mesh.FaceMesh(
        static_image_mode=False, max_num_faces=1, refine_landmarks=False
    )
    rows, frames = [], []
    with av.open(str(arguments.clip)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % EVERY:
                continue
            found = network.process(frame.to_ndarray(format="rgb24")).multi_face_landmarks
            if found:
                size = np.array([frame.width, frame.height])
                points = np.array([[p.x, p.y] for p in found[0].landmark]) * size
                rows.append(np.rint(points * UNITS_PER_PIXEL).astype(np.int16))
                frames.append(index)
    np.savez_compressed(
        arguments.output,
        points=np.array(rows),
        frames=np.array(frames, np.int32),
        units_per_pixel=np.int32(UNITS_PER_PIXEL),
        made_by=f"mediapipe {version('mediapipe')} FaceMesh, unrefined (Apache-2.0)",
    )
    print(f"{arguments.output}: {len(rows)} frames with a face")


if __name__ == "__main__":
    main()
