"""Where the fuzzers begin: good files of every kind, made on the spot, and the finds of before.

Finds lie in tests/fixtures/fuzz/TARGET, small files that once broke something.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from bundle_factory import make_bundle
from media_files import write_clip

__all__ = ["FINDS", "seeds", "words"]

FINDS = Path(__file__).resolve().parent.parent / "fixtures" / "fuzz"


def seeds(target: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the good files of a target. `folder`: the one its calls will get."""
    yield from _MAKERS.get(target, lambda _: iter([("plain", b"0")]))(folder)


def words(target: str) -> list[bytes]:
    """Pieces of the format that a mutation alone would rarely hit on."""
    common = {
        "gguf": [b"GGUF", b"general.alignment", b"split.count", b"\xff" * 8, b"\0" * 7 + b"\x80"],
        "features": [b"PK\x03\x04", b"audio=", b"video=", b"\x93NUMPY\x01\0", b"\xff|\xff", b"|O"],
        "manifest": [b"1e999", b"null", b"..", b"[]", b"{}", b"-1", b"\\ud800"],
        "rows": [b"clip,text\n", b"features", b"\\ud800", b"1e999", b"9" * 400, b'"start":'],
        "journal": [b'"index":', b'"id":"r0"', b'"run":"abc"', b'"error":', b"\n", b"[" * 40],
        "pickle": [b"cnumpy\nndarray\n", b"cbuiltins\ngetattr\n", b"\x80\x04", b"R.", b"\x93"],
        "media": [b"moov", b"trak", b"stsd", b"RIFF", b"\x1aE\xdf\xa3", b"fLaC", b"OggS", b"ID3"],
    }
    return common.get(target, [b"any"])


def _gguf(folder: Path) -> Iterator[tuple[str, bytes]]:
    path = folder / "seed.gguf"
    for arch, kind in (("llama", gguf.GGMLQuantizationType.Q4_0), ("qwen2", None)):
        out = gguf.GGUFWriter(path, arch)
        out.add_context_length(64)
        out.add_embedding_length(32)
        out.add_block_count(1)
        out.add_feed_forward_length(32)
        out.add_head_count(2)
        out.add_head_count_kv(1)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_token_list([f"t{i}" for i in range(8)])
        out.add_token_scores([0.5] * 8)
        out.add_token_types([1] * 8)
        out.add_tensor("token_embd.weight", np.ones((8, 32), np.float16))
        weights = np.ones((4, 32), np.float32)
        data = weights if kind is None else gguf.quants.quantize(weights, kind)
        out.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        yield arch, path.read_bytes()
    path.unlink()


def _manifest(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The folder becomes a whole bundle, so that a good manifest loads."""
    document = make_bundle(folder)
    yield "toy", json.dumps(document).encode()
    document["tasks"].pop("emotion")
    document["encoders"] = [
        {"id": "hf-audio:0a", "file": "e.onnx", "size": 1, "sha256": "0" * 64, "config": {"a": [1]}}
    ]
    hub = {"repo": "org/repo", "revision": "main", "file": "m.gguf"}
    document["backbone"]["gguf"] = {"hub": hub, "size": 9, "sha256": "0" * 64}
    yield "hub", json.dumps(document).encode()


def _features(_folder: Path) -> Iterator[tuple[str, bytes]]:
    arrays: dict[str, Any] = {
        "audio": np.ones((3, 13), np.float32),
        "audio_valid": np.ones(3, np.bool_),
        "audio_times": np.arange(3.0),
        "audio_spec": np.array("lld13/1"),
        "video": np.ones((2, 167), np.float16),
        "duration": np.float64(1.5),
        "warnings": np.array('["one"]'),
        "info": np.array('{"fps": 5.0}'),
    }
    for name, write in (("stored", np.savez), ("packed", np.savez_compressed)):
        out = BytesIO()
        write(out, **arrays)
        yield name, out.getvalue()
    pieces = []
    for name, array in arrays.items():
        out = BytesIO()
        np.lib.format.write_array(out, np.asarray(array))
        pieces.append(name.encode() + b"=" + out.getvalue())
    yield "pieces", b"\xff|\xff".join(pieces)


def _rows(_folder: Path) -> Iterator[tuple[str, bytes]]:
    head = b"c\xef\xbb\xbfid,clip,text,task,start,end\n"
    yield "csv", head + b"a,a.mp4,I love it,emotion,0.5,2\n,b,,,,\n"
    yield "tsv", b'tfeatures\ttext\nf.npz\t"two\nlines"\n'
    entry = {"id": 7, "clip": "a.mp4", "text": "我很喜欢 🙂", "start": 1, "end": 2.5}
    yield "jsonl", b"j" + json.dumps(entry).encode() + b'\n\n{"features": "f.npz", "text": "x"}\n'


def _journal(_folder: Path) -> Iterator[tuple[str, bytes]]:
    lines = [{"index": i, "id": f"r{i}", "text": f"text {i}", "run": "abc"} for i in range(3)]
    failed = {**lines[1], "error": {"type": "MediaError", "message": "no"}}
    yield "done", b"".join(json.dumps(line).encode() + b"\n" for line in (lines[0], failed))
    yield "cut", json.dumps(lines[0]).encode() + b"\n" + json.dumps(lines[1]).encode()[:20]


def _media(_folder: Path) -> Iterator[tuple[str, bytes]]:
    small: dict[str, Any] = {"seconds": 0.3, "fps": 10, "size": (32, 32), "rate": 16_000}
    with TemporaryDirectory() as made:
        for name, options in (
            ("a.mp4", {}),
            ("b.mkv", {"video": "mpeg4", "audio": "libopus", "rate": 48_000}),
            ("c.ts", {"audio": "mp2"}),
            ("d.avi", {"video": "mjpeg", "pix_fmt": "yuvj420p", "audio": "pcm_s16le"}),
            ("e.wav", {"video": None, "audio": "pcm_s16le"}),
            ("f.flac", {"video": None, "audio": "flac"}),
            ("g.ogg", {"video": None, "audio": "libopus", "rate": 48_000}),
            ("h.mp3", {"video": None, "audio": "libmp3lame"}),
            ("i.webm", {"video": "libvpx", "audio": None}),
            ("j.flv", {"video": "flv1", "audio": None}),
        ):
            path = write_clip(Path(made) / name, **{**small, "layout": "mono", **options})
            yield name, path.read_bytes()


def _pickle(_folder: Path) -> Iterator[tuple[str, bytes]]:
    table = {"text": ["a", b"b"], "audio": np.ones((2, 3), np.float32), "n": np.float64(1)}
    for protocol in range(6):
        yield f"protocol{protocol}", pickle.dumps({"train": table}, protocol)


_MAKERS: dict[str, Callable[[Path], Iterator[tuple[str, bytes]]]] = {
    "gguf": _gguf,
    "manifest": _manifest,
    "features": _features,
    "rows": _rows,
    "journal": _journal,
    "media": _media,
    "pickle": _pickle,
}
