"""The GGUF header scan: right about good files, unharmed by bad ones."""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from make_fixtures import ARCHES, toy_gguf
from toy_vocab import chatglm

from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf
from mse_runtime.gguf_scan import _after_strings_plain
from mse_runtime.probe_model import write_probe_model
from mse_runtime.quants import BLOCKS, TYPE_NAMES, dequantize


@given(
    st.lists(st.binary(max_size=300), max_size=30),
    st.integers(0, 400),
    st.integers(0, 40),
    st.integers(-1, 1),
)
@example([], 0, 1 << 40, 0)
@example([b"ab"], 0, 1, -1)
def test_strings_are_skipped_as_in_plain_python(
    texts: list[bytes], cut: int, count: int, high: int
) -> None:
    """The kernels' loop and the plain one: the same end, within the data or not."""
    kernels = pytest.importorskip("mse_kernels.strings")
    data = b"head" + b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    if high and texts:  # a length of which the sum wraps around
        data = data[:4] + struct.pack("<Q", (1 << 64) - 1 if high < 0 else 1 << 63) + data[12:]
    data = data[: max(4, len(data) - cut)]
    few = min(count, 10_000)  # the plain loop's patience
    plain: Any = _after_strings_plain
    expected = plain(data, 4, few)
    assert kernels.skip_strings(data, 4, few) == expected
    if not high and not cut and count <= len(texts):
        assert expected == 4 + sum(8 + len(text) for text in texts[:count])
    if count > len(texts):
        assert kernels.skip_strings(data, 4, count) is None


@given(
    st.lists(st.text("abé ", max_size=5) | st.text("a", max_size=90), max_size=40),
    st.text("abé", max_size=30) | st.text("a", max_size=200),
    st.integers(0, 30), st.integers(0, 99),
)  # fmt: skip
def test_strings_are_found_as_in_plain_python(
    texts: list[str], within: str, cut: int, seed: int
) -> None:
    kernels = pytest.importorskip("mse_kernels.strings")
    raw, text = [text.encode() for text in texts], within.encode()
    always = np.random.default_rng(seed).random(len(raw)) < 0.2
    data = b"head" + b"".join(struct.pack("<Q", len(one)) + one for one in raw)
    find = kernels.find_strings
    if cut and raw:
        data = data[: max(4, len(data) - cut)]
        assert find(data, 4, len(raw), text) is None
        assert find(data, 4, len(raw), text, pairs=True) is None
        return
    expected = [(i, one) for i, one in enumerate(raw) if always[i] or (one and one in text)]
    assert find(data, 4, len(raw), text, always=always) == expected
    pairs = [(i, one, one.find(b" ", 1)) for i, one in enumerate(raw)]
    joined = [(i, one) for i, one, at in pairs if at > 0 and one[:at] + one[at + 1 :] in text]
    assert find(data, 4, len(raw), text, pairs=True) == joined
    with pytest.raises(ValueError, match="flags"):
        find(data, 4, len(raw), text, always=np.zeros(len(raw) + 1, np.bool_))


def test_more_strings_are_found_than_there_is_room_for_at_first() -> None:
    kernels = pytest.importorskip("mse_kernels.strings")
    data = 10_000 * (struct.pack("<Q", 1) + b"a")
    assert len(kernels.find_strings(data, 0, 10_000, b"ba")) == 10_000
    assert kernels.find_strings(data, 0, 10_001, b"ba") is None


@pytest.mark.parametrize("arch", ARCHES)
def test_the_scan_agrees_with_the_reference_reader(tmp_path: Path, arch: str) -> None:
    path = toy_gguf(tmp_path / "m.gguf", arch, dtype="q4_0")
    expected = reference.GGUFReader(path)
    with Gguf.open(path) as found:
        assert found.arch == arch
        assert (found.n_embd, found.n_layer, found.n_head) == (64, 2, 4)
        assert found.n_head_kv == (2 if arch in ("qwen2", "chatglm") else 4)
        assert found.head_dim == (16, 16)
        assert found.weight_type == "Q4_0"
        assert list(found.tensors) == [tensor.name for tensor in expected.tensors]
        for tensor in expected.tensors:
            info = found.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
            assert info.type == tensor.tensor_type.name
            assert (info.offset, info.size) == (tensor.data_offset, tensor.n_bytes)
        scalars = {
            name: field.contents()
            for name, field in expected.fields.items()
            if not name.startswith("GGUF.") and field.types[0] != reference.GGUFValueType.ARRAY
        }
        assert dict(found.metadata) == scalars


def test_arrays_are_read_on_demand(tmp_path: Path) -> None:
    vocab = chatglm()
    with Gguf.open(toy_gguf(tmp_path / "m.gguf", "chatglm")) as found:
        assert found.array("tokenizer.ggml.tokens") == vocab.tokens
        assert found.array("tokenizer.ggml.token_type") == vocab.types
        assert found.array("tokenizer.ggml.scores") == pytest.approx(vocab.scores)
        assert found.array_length("tokenizer.ggml.tokens") == found.n_vocab == len(vocab.tokens)
        assert found.array_length("nothing") == 0
        with pytest.raises(BackboneError, match="no metadata array"):
            found.array("nothing")


@pytest.mark.parametrize("arch", ARCHES)
def test_a_shortened_header_is_a_header(tmp_path: Path, arch: str) -> None:
    path = toy_gguf(tmp_path / "m.gguf", arch)
    with Gguf.open(path) as gguf:
        head, tail, size, data = gguf.header_without("tokenizer.ggml.t")
        made = head + bytes(size - len(head) - len(tail)) + tail
        short = tmp_path / "short.gguf"
        short.write_bytes(made + path.read_bytes()[size:])
        assert path.read_bytes()[size:data].strip(b"\0") == b""
        with Gguf.open(short) as other:
            assert other.tensors == gguf.tensors
            texts = dict(other.metadata)
            assert not texts.pop("mse.left_out").strip("\0")  # type: ignore[union-attr]
            assert texts == gguf.metadata
            gone = {key for key in gguf._arrays if key.startswith("tokenizer.ggml.t")}
            assert len(gone) == 2
            assert other._arrays.keys() == gguf._arrays.keys() - gone
            for key in other._arrays:
                assert other.array(key) == gguf.array(key)
        for prefix in ("no such", "general."):
            with pytest.raises(BackboneError, match="left out"):
                gguf.header_without(prefix)


KEYS = st.binary(min_size=1, max_size=20) | st.sampled_from(
    ["\u00e9".encode() * 16, b"\xff\xfe", b"tokens", b"a\xe2\x82", "\U0001f642".encode()]
)


@given(
    entries=st.lists(
        st.tuples(st.booleans(), KEYS, st.sampled_from(["number", "numbers", "texts"])),
        max_size=8, unique_by=lambda entry: entry[:2],
    )
)  # fmt: skip
@example(
    entries=[(False, b"mse.left_out", "number"), (True, b"a", "numbers"), (True, b"b", "texts")]
)
def test_a_shortened_header_says_no_more_than_the_whole(entries: list[Any]) -> None:
    """Whatever its keys are: what was checked of the file is what llama.cpp reads."""
    packed = []
    for inside, key, kind in entries:
        key = b"t.g." + key if inside else key
        packed.append(struct.pack("<Q", len(key)) + key)
        if kind == "number":
            packed[-1] += struct.pack("<II", 4, 7)
        elif kind == "numbers":
            packed[-1] += struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
        else:
            packed[-1] += struct.pack("<IIQ", 9, 8, 2) + 2 * (struct.pack("<Q", 20) + bytes(20))
    name = b"token_embd.weight"
    table = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(packed)) + b"".join(packed) + table
    weights = bytes(-len(header) % 32 + 256)
    with TemporaryDirectory() as folder:
        path, short = Path(folder) / "m.gguf", Path(folder) / "short.gguf"
        path.write_bytes(header + weights)
        with Gguf.open(path) as gguf:
            gone = {key for key in gguf._arrays if key.startswith("t.g.")}
            try:
                head, tail, size, data = gguf.header_without("t.g.")
            except BackboneError:
                assert len(gone) < 2 or "mse.left_out" in {*gguf.metadata, *gguf._arrays}
                return
            assert (size, data) == (len(header), len(header) + len(weights) - 256)
            short.write_bytes(head + bytes(size - len(head) - len(tail)) + tail + weights)
            with Gguf.open(short) as other:
                assert other.metadata.keys() - gguf.metadata.keys() == {"mse.left_out"}
                assert {k: other.metadata[k] for k in gguf.metadata} == gguf.metadata
                assert other.tensors == gguf.tensors
                left = [(k, a.kind, a.count) for k, a in gguf._arrays.items() if k not in gone]
                # Keys that are no UTF-8 may look alike: then one of them stays.
                found = [(k, a.kind, a.count) for k, a in other._arrays.items()]
                assert set(left) <= set(found)
                assert {k for k, _, _ in found} <= gguf._arrays.keys()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_rows_are_those_of_the_whole_table(tmp_path: Path, dtype: str) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype=dtype)
    tensor = next(t for t in reference.GGUFReader(path).tensors if t.name == "token_embd.weight")
    table = reference.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 64)
    with Gguf.open(path) as found:
        ids = [3, 0, 513, 3, 77]
        rows = found.rows(ids)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, table[ids])
        np.testing.assert_array_equal(found.tensor("token_embd.weight"), table)
        assert found.rows([]).shape == (0, 64)
    rows += 1  # a copy: writable, and alive after the file was closed


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - {"I8", "I16", "I32", "I64", "F64"}))
def test_every_type_is_decoded_as_the_gguf_package_does(kind: str) -> None:
    per_block, size = BLOCKS[kind]
    assert reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]] == (per_block, size)
    raw = np.random.default_rng(0).integers(0, 120, (5, 2 * size), dtype=np.uint8)
    if kind == "F32":
        raw = np.random.default_rng(0).standard_normal((5, 2), np.float32).view(np.uint8)
    try:
        expected = reference.quants.dequantize(raw, reference.GGMLQuantizationType[kind])
    except NotImplementedError:
        with pytest.raises(BackboneError, match=kind):
            dequantize(raw, kind)
        return
    np.testing.assert_array_equal(dequantize(raw, kind), expected)


def test_type_numbers_are_ggmls() -> None:
    for number, name in TYPE_NAMES.items():
        assert reference.GGMLQuantizationType[name] == number


def test_a_real_vocabulary(test_data: Callable[[str], Path]) -> None:
    with Gguf.open(test_data("models/ggml-vocab-llama-spm.gguf")) as found:
        assert found.array_length("tokenizer.ggml.tokens") == 32000
        assert found.n_ctx_train == 4096
        with pytest.raises(BackboneError, match="holds no embedding table"):
            found.rows([1])


@pytest.mark.parametrize("ids", [[-1], [514], [[1]], [0.5], "text"])
def test_rows_that_do_not_exist(tmp_path: Path, ids: object) -> None:
    with Gguf.open(toy_gguf(tmp_path / "m.gguf", "llama")) as found:
        with pytest.raises(BackboneError, match="Token ids must"):
            found.rows(ids)  # type: ignore[arg-type]
        with pytest.raises(BackboneError, match="no tensor"):
            found.tensor("nothing")
    with pytest.raises(BackboneError, match="closed"):
        found.rows([1])


# Files that are something else


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, message in (
        ("nothing", "does not exist"),
        ("pipe", "no regular file"),
        (".", "is a directory"),
        ("empty", "is empty"),
        ("a\0b", "no"),
    ):
        with pytest.raises(BackboneError, match=message):
            Gguf.open(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF....AVI ", "not a GGUF file"),
        (b"GGUF", "ends inside the header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata entries, more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors, more than"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"x" * 40,
            "ends inside a metadata key",
        ),
    ],
)
def test_foreign_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(BackboneError, match=message):
        Gguf.open(tmp_path / "bad")


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def _file(entries: list[bytes], tensors: list[bytes], data: int = 256) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    return head + b"".join(entries) + b"".join(tensors) + bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_file([_entry("a", 99, b"1234")], []), "unknown type 99"),
        (_file([_entry("a", 9, struct.pack("<IQ", 4, 1 << 61))], []), "ends inside"),
        (
            _file([_entry("a", 9, struct.pack("<IQ", 8, 1 << 61))], []),
            "more than the file can hold",
        ),
        (_file([_entry("a", 9, struct.pack("<IQQ", 8, 1, 1 << 63))], []), "ends inside"),
        (_file([_entry("a", 9, struct.pack("<IQ", 9, 1))], []), "unsupported type 9"),
        (_file([_entry("general.alignment", 4, struct.pack("<I", 0))], []), "power of two"),
        (_file([_entry("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
        (_file([_entry("split.count", 2, struct.pack("<H", 3))], []), "one part of a split model"),
        (_file([], [_tensor("t", (), 0, 0)]), "0 dimensions"),
        (_file([], [_tensor("t", (1, 1, 1, 1, 1), 0, 0)]), "5 dimensions"),
        (_file([], [_tensor("t", (4,), 77, 0)]), "unknown type 77"),
        (_file([], [_tensor("t", (0, 4), 0, 0)]), "impossible shape"),
        (_file([], [_tensor("t", (33,), 2, 0)]), "impossible shape"),
        (_file([], [_tensor("t", (1 << 40, 1 << 40), 0, 0)]), "outside the file"),
        (_file([], [_tensor("t", (4,), 0, 1 << 63)]), "outside the file"),
        (_file([], [_tensor("t", (4,), 0, 7)]), "outside the file"),
        (_file([], [_tensor("t", (4,), 0, 0)] * 2), "occurs twice"),
    ],
)
def test_lies_in_the_header(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(BackboneError, match=message):
        Gguf.open(tmp_path / "bad")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20  # a declared size allocates nothing
    tracemalloc.stop()


def test_metadata_that_is_missing_or_of_the_wrong_kind(tmp_path: Path) -> None:
    entries = [
        _entry("general.architecture", 8, struct.pack("<Q", 5) + b"llama"),
        _entry("llama.block_count", 6, struct.pack("<f", 2.5)),
    ]
    (tmp_path / "m").write_bytes(_file(entries, []))
    with Gguf.open(tmp_path / "m") as found:
        with pytest.raises(
            BackboneError, match=r"lacks the metadata entry .llama\.embedding_length"
        ):
            _ = found.n_embd
        with pytest.raises(BackboneError, match="not a whole number"):
            _ = found.n_layer


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid file with arrays of both kinds, cut behind its second tensor's data."""
    path = toy_gguf(tmp_path_factory.mktemp("seed") / "m.gguf", "qwen2", n_layer=1)
    return path.read_bytes()


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write_probe_model(tmp_path / "whole").read_bytes()
    with Gguf.open(tmp_path / "whole") as found:
        header = min(info.offset for info in found.tensors.values())
    assert header < 5000
    path = tmp_path / "cut"
    for size in [*range(1, header, 13), header, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(BackboneError, match=r"damaged or cut short|not a GGUF file"):
            Gguf.open(path)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 9000),
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from([2**64 - 1, 2**63, 2**62, 2**32, 2**31 - 1, 0]).map(
                    lambda n: n.to_bytes(8, "little")
                ),
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    cut=st.one_of(st.none(), st.integers(0, 12000)),
)
@example(edits=[(8, b"\xff" * 16)], cut=None)
def test_any_damage_is_an_error_or_harmless(
    tmp_path: Path, seed_file: bytes, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(seed_file)
    for at, patch in edits:
        data[at : at + len(patch)] = patch
    path = tmp_path / "fuzzed"
    path.write_bytes(data[:cut])
    with contextlib.suppress(BackboneError), Gguf.open(path) as found:
        for info in found.tensors.values():
            assert 0 < info.offset <= info.offset + info.size <= found.size
        rows = found.rows([0, 1])
        assert rows.shape == (2, found.tensors["token_embd.weight"].shape[1])
        found.array("tokenizer.ggml.tokens")


def test_what_ends_a_scan_is_what_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, say, while the mapping is looked at and cannot be closed."""
    path = toy_gguf(tmp_path / "m.gguf", "llama")

    def interrupted(data: Any, at: int, count: int) -> int:
        view = np.frombuffer(data, np.uint8)
        raise KeyboardInterrupt(len(view))

    monkeypatch.setattr("mse_runtime.gguf_scan._after_strings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Gguf.open(path)
    monkeypatch.undo()
    with Gguf.open(path) as gguf:
        assert gguf.arch == "llama"


def test_a_header_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the file is so new that a change might not show, or is another one."""
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    scans = []
    read = Gguf._read
    monkeypatch.setattr(Gguf, "_read", lambda found: scans.append(1) or read(found))

    def opened() -> tuple[object, ...]:
        with Gguf.open(path) as gguf:
            return (
                gguf.version,
                gguf.size,
                gguf.metadata,
                gguf.tensors,
                gguf.array("tokenizer.ggml.tokens"),
            )

    first = opened()
    assert opened() == first
    assert len(scans) == 2  # just written
    monkeypatch.setattr("mse_runtime.gguf._SETTLED", -1.0)
    assert opened() == opened() == first
    assert len(scans) == 3
    toy_gguf(path, "llama", n_ff=64)
    assert opened()[3] != first[3]
    assert len(scans) == 4
