"""A batch as strangers send it: every kind of bad clip at once, each fails its own row alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import av
from fault_tools import CLIP, command, decoder_traps, json_lines

SIDE = 16_384


def unpacks_to_268_mb() -> bytes:
    """A grey PNG of 16384 x 16384 pixels, all of them the same, in about a megabyte."""
    packer, row = zlib.compressobj(1), bytes(1 + SIDE)
    data = b"".join(packer.compress(row) for _ in range(SIDE)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def bombs(folder: Path) -> None:
    """`bomb.mov` says that its pictures are small; `16k.mov` says how large they are."""
    content = unpacks_to_268_mb()
    with av.open(str(folder / "bomb.mov"), "w") as out:
        stream = out.add_stream("png", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        for number in range(2):
            packet = av.Packet(content)
            packet.stream, packet.is_keyframe = stream, True
            packet.pts = packet.dts = number
            out.mux(packet)
    raw = (folder / "bomb.mov").read_bytes()
    small, large = (struct.pack(">HHI", side, side, 72 << 16) for side in (64, SIDE))
    assert raw.count(small) == 1
    (folder / "16k.mov").write_bytes(raw.replace(small, large))


def test_every_bad_clip_fails_its_row_and_the_batch_goes_on(
    tmp_path: Path,
) -> None:
    traps = decoder_traps(tmp_path)
    bombs(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("hangs", "crashes", "first", "between", "last"):
        shutil.copy(CLIP, tmp_path / f"{name}.mp4")
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:200])
    expected = {
        "first.mp4": "",
        "bomb.mov": "neither sound nor picture",
        "hangs.mp4": "no features after 15 s",
        "16k.mov": "over 35 million pixels",
        "between.mp4": "",
        "crashes.mp4": "died (SIGSEGV)",
        "pipe.mp4": "is a pipe or device",
        "cut.mp4": "cut.mp4",
        "last.mp4": "",
    }
    listing, out = tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    rows = [{"clip": name, "text": "I love it.", "end": 1} for name in expected]
    listing.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    arguments = ("--batch", listing, "-o", out, "--adapter", "onnx", "--clip-timeout", "15")
    done = command(*arguments, "--workers", "2", "--fps", "2", env=traps)
    assert done.returncode == 1, done.stderr
    assert "9 of 9 rows, 6 with errors" in done.stderr
    found = json_lines(out)
    assert [entry["index"] for entry in found] == list(range(len(expected)))
    for entry, (name, message) in zip(found, expected.items(), strict=True):
        assert ("error" in entry) == bool(message), entry
        if message:
            assert entry["error"]["type"] == "MediaError"
            assert message in entry["error"]["message"]
            assert str(tmp_path / name) in entry["error"]["message"]
        else:
            assert -3 <= entry["value"] <= 3
            assert entry["probabilities"] == found[0]["probabilities"]
