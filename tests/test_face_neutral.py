"""The neutral face's derivation: it finds the face that a crowd of turned, talking ones share."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from mse_export.face_neutral import derive, mirror_pairs
from mse_runtime.features.landmarks import neutral_mesh


def turned(angles: np.ndarray) -> np.ndarray:
    a, b, c = angles
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(rx @ ry @ rz)


def test_derive_recovers_the_shared_face() -> None:
    random = np.random.default_rng(0)
    clips = []
    for _ in range(4):
        frames = []
        own = neutral_mesh() + random.normal(0, 0.004, (468, 3))
        for _ in range(30):
            face = own.copy()
            face[[14, 17, 84, 314], 1] += max(0.0, random.normal(0, 0.1))  # talking
            spin = turned(random.normal(0, (0.1, 0.15, 0.1)))
            frames.append(face * random.uniform(60, 200) @ spin.T + random.uniform(100, 400, 3))
        clips.append(np.array(frames, np.float32))
    found = derive(clips)
    assert found.shape == (468, 3)
    assert np.linalg.norm(found[33] - found[263]) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(found - neutral_mesh(), axis=1).mean() < 0.01
    mirrored = found[mirror_pairs(found)] * (-1, 1, 1)
    assert np.abs(mirrored - found).max() < 1e-5


def test_mirror_pairs_are_the_known_ones() -> None:
    pairs = mirror_pairs(neutral_mesh())
    known = {33: 263, 133: 362, 61: 291, 159: 386, 145: 374, 70: 300, 234: 454, 78: 308, 4: 4}
    assert {k: int(pairs[k]) for k in known} == known
