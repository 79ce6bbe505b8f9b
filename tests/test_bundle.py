"""Bundles: every fault has its own clear error, and nothing outside the folder is touched."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import edit, file_ref, make_bundle, set_key, snapshot, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_fixtures import toy_gguf

from mse_runtime import cache
from mse_runtime.bundle import (
    Bundle,
    DamagedFileError,
    HubRef,
    ManifestError,
    MismatchError,
    MissingFileError,
    UnsafePathError,
    VersionError,
    load_bundle,
    manifest,
)
from mse_runtime.bundle import files as bundle_files
from mse_runtime.bundle.hub import builtin_bundles, resolve_bundle
from mse_runtime.errors import BackboneError, BundleError, MSEError


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A valid manifest; do not change it."""
    return make_bundle(tmp_path_factory.mktemp("template"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle's folder of the test's own."""
    make_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def refused(folder: Path, kind: type[MSEError]) -> str:
    """Loading `folder` fails with exactly `kind`, in one paragraph, and writes nothing there."""
    before = snapshot(folder) if folder.is_dir() else {}
    with pytest.raises(MSEError) as caught:
        load_bundle(folder)
    assert type(caught.value) is kind, caught.value
    assert (snapshot(folder) if folder.is_dir() else {}) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_load(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.name == "toy"
    assert not bundle.trained
    assert bundle.task.range == (-3.0, 3.0)
    assert bundle.features.audio.std == (2.0,) * 13
    assert bundle.gguf_path() == folder / "backbone.gguf"
    assert bundle.onnx_path().is_file()
    assert bundle.path == folder


def test_builtin_bundles_load() -> None:
    assert "tiny" in builtin_bundles()
    for name in builtin_bundles():
        bundle = load_bundle(resolve_bundle(name))
        assert bundle.name == name
        assert manifest.parse(bundle.to_dict()) == bundle


def test_round_trip_through_json(template: dict[str, Any]) -> None:
    bundle = manifest.parse(template)
    assert manifest.parse(json.loads(json.dumps(bundle.to_dict()))) == bundle


# -- faults of the manifest --------------------------------------------------------------------

ENCODER = {"id": "hf-audio:0a", "file": "e.onnx", "size": 1, "sha256": "0" * 64}
FAULTS = [
    ("name", 7, "should be a string"),
    ("name", "", "should not be empty"),
    ("name", "red\x1b[31m", "control characters"),
    ("version", ..., "is missing"),
    ("created_by", None, "should be a string"),
    ("training", "untrained", "should be an object"),
    ("training.status", "half", '"trained" or "untrained"'),
    ("layout", "new", '"published" or "pseudo-last"'),
    ("default_task", "other", "one of the tasks (sentiment, emotion)"),
    ("tasks", [], "should be an object"),
    ("tasks.sentiment.kind", "ranking", '"regression" or "classification"'),
    ("tasks.sentiment.temprature", 2.0, "is not a key of this object"),
    ("tasks.sentiment.temperature", 0, "should be above 0"),
    ("tasks.sentiment.temperature", True, "should be a number, but is true"),
    ("tasks.sentiment.max_new_tokens", 4.5, "should be a whole number"),
    ("tasks.sentiment.max_new_tokens", 0, "should be from 1 to 256"),
    ("tasks.sentiment.range", [3, -3], "low below high"),
    ("tasks.sentiment.range", [1, 2, 3], "should have 2 numbers"),
    ("tasks.sentiment.range.1", 10**400, "finite"),
    ("tasks.sentiment.step", 0.07, "evenly"),
    ("tasks.sentiment.step", 1e-9, "at most 2001 values"),
    ("tasks.sentiment.number_format", "{:.0f}", "same text for several steps"),
    ("tasks.sentiment.number_format", "{0.__class__}", "one number field"),
    ("tasks.sentiment.number_format", "{:999999999.1f}", "one number field"),
    ("tasks.sentiment.number_scale", 0, "should be above 0"),
    ("tasks.emotion.number_scale", 10.0, "regression tasks only"),
    ("tasks.sentiment.labels", [{"text": "a", "name": "a"}], "should be empty"),
    ("tasks.emotion.labels", [{"text": "0", "name": "one"}], "at least two"),
    ("tasks.emotion.labels.1.text", "0", "distinct"),
    ("tasks.emotion.labels.1.name", 5, "should be a string"),
    ("tasks.emotion.range", [0, 1], "regression tasks only"),
    ("tasks.sentiment.prompt", [{"slot": "text"}], "text and pseudo once each"),
    ("tasks.sentiment.prompt.1.slot", "audio", '"pseudo" or "text"'),
    ("tasks.sentiment.prompt.0.slot", "text", "either text or slot"),
    ("tasks.sentiment.prompt.0.text", "\ud800", "not text"),
    ("text.pad", "right", '"left" or "none"'),
    ("text.pad_id", 10**6, "below backbone.n_vocab"),
    ("text.max_tokens", -1, "from 1 to"),
    ("features.audio", ..., "is missing"),
    ("features.audio.mean", [0.0] * 12, "should have 13 numbers"),
    ("features.audio.mean", ..., "needs mean beside it"),
    ("features.audio.std.3", 0, "above 0 in every column"),
    ("features.audio.clip", "wide", "should be a number"),
    ("features.audio.dim", True, "should be a whole number"),
    ("features.face.nonfinite", "ignore", '"zero" or "refuse"'),
    ("adapter.onnx", "adapter.onnx", "should be an object"),
    ("adapter.onnx.size", "12", "should be a whole number"),
    ("adapter.onnx.sha256", "A" * 64, "64 hexadecimal digits in lower case"),
    ("adapter.onnx.file", "adapter.pkl", "should name a .onnx file"),
    ("adapter.n_embd", 63, "should equal backbone.n_embd, which is 64"),
    ("adapter.audio_dim", 14, "should equal features.audio.dim, which is 13"),
    ("backbone.gguf.hub", {"repo": "a/b"}, "is not a key of this object (known: file"),
    ("backbone.n_layer", 2**60, "from 1 to"),
    ("backbone.rope_table", "fp8", 'should be "bf16"'),
    ("encoders", {}, "should be a list"),
    ("encoders", [{**ENCODER, "id": "other"}], 'should start with "hf-audio:"'),
    ("parity", 3, "should be an object"),
]

# Where two keys disagree, or a list is wrong as a whole, the message names the other one.
REPORTED_AT = {
    "distinct": "tasks.emotion.labels",
    "either text or slot": "tasks.sentiment.prompt.0",
    "needs mean beside it": "features.audio.std",
    "above 0 in every column": "features.audio.std",
    "is not a key of this object (known: file": "backbone.gguf.hub",
    'should start with "hf-audio:"': "encoders.0.id",
}


@pytest.mark.parametrize(("key", "value", "expected"), FAULTS, ids=lambda v: str(v)[:40])
def test_each_fault_names_its_key(
    template: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    document = copy.deepcopy(template)
    set_key(document, key, value)
    with pytest.raises(ManifestError) as caught:
        manifest.parse(document)
    assert expected in str(caught.value)
    assert caught.value.key.replace("[", ".").replace("]", "") == REPORTED_AT.get(expected, key)
    assert f'"{caught.value.key}"' in str(caught.value)


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.1"])
def test_unknown_major_version(folder: Path, version: str) -> None:
    edit(folder, "schema_version", version)
    message = refused(folder, VersionError)
    assert version in message


@pytest.mark.parametrize("version", ["1", "one", "1.0.0", "", 1.0, None, "9" * 30 + ".0"])
def test_malformed_version(folder: Path, version: Any) -> None:
    edit(folder, "schema_version", version)
    assert "schema_version" in refused(folder, ManifestError)


def test_newer_minor_version_may_have_more_keys(folder: Path) -> None:
    edit(folder, "schema_version", "1.7")
    edit(folder, "features.audio.window", 25)
    assert load_bundle(folder).schema_version == "1.7"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[]", "should be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"name": 1, "name": 2}', "twice"),
        (b'{"schema_version": NaN}', "NaN, which is not JSON"),
        (b'{"schema_version": 1' + b"0" * 9000 + b"}", "not valid JSON"),
        (b" " * (5 << 20), "at most 4,194,304"),
        (b'{"schema_version"', "line 1, column 18"),
    ],
    ids=["empty", "utf16", "list", "deep", "twice", "nan", "digits", "huge", "cut"],
)
def test_a_manifest_that_is_no_manifest(folder: Path, data: bytes, expected: str) -> None:
    (folder / "manifest.json").write_bytes(data)
    assert expected in refused(folder, ManifestError)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing", MissingFileError)
    (tmp_path / "empty").mkdir()
    assert "has no manifest.json" in refused(tmp_path / "empty", MissingFileError)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file", MissingFileError)
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    assert "not a file" in refused(tmp_path / "odd", MissingFileError)


# -- faults of the files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter.onnx", "adapter.safetensors", "backbone.gguf"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refused(folder, MissingFileError)
    assert f"{name} is missing" in message


@pytest.mark.parametrize("name", ["adapter.onnx", "backbone.gguf"])
def test_truncated_file(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated?" in refused(folder, DamagedFileError)


def test_changed_byte_even_after_a_good_load(folder: Path) -> None:
    load_bundle(folder)
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in refused(folder, DamagedFileError)


def test_a_directory_or_fifo_in_place_of_a_file(folder: Path) -> None:
    (folder / "adapter.onnx").unlink()
    (folder / "adapter.onnx").mkdir()
    assert "not a regular file" in refused(folder, MissingFileError)
    (folder / "adapter.onnx").rmdir()
    os.mkfifo(folder / "adapter.onnx")
    with pytest.raises(MissingFileError, match="not a regular file"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../adapter.onnx",
        "/etc/adapter.onnx",
        "a/../../b.onnx",
        "C:\\a.onnx",
        "..\\a.onnx",
        "C:a.onnx",
    ],
)
def test_path_out_of_the_folder(folder: Path, name: str) -> None:
    edit(folder, "adapter.onnx.file", name)
    message = refused(folder, UnsafePathError)
    assert "adapter.onnx.file" in message


def test_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (folder / "adapter.onnx").rename(outside)
    (folder / "adapter.onnx").symlink_to(outside)
    assert "outside the bundle's folder" in refused(folder, UnsafePathError)


def test_blobs_are_allowed_in_a_hub_snapshot_only(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for parent in ("snapshots", "elsewhere"):
        folder = tmp_path / parent / "abc"
        make_bundle(folder)
        (folder / "adapter.onnx").rename(tmp_path / "blobs" / parent)
        (folder / "adapter.onnx").symlink_to(f"../../blobs/{parent}")
    assert load_bundle(tmp_path / "snapshots" / "abc").name == "toy"
    refused(tmp_path / "elsewhere" / "abc", UnsafePathError)


def test_link_of_a_parent_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "adapter.onnx").rename(tmp_path / "elsewhere" / "adapter.onnx")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    edit(folder, "adapter.onnx.file", "sub/adapter.onnx")
    refused(folder, UnsafePathError)


def test_links_inside_and_a_linked_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "real").mkdir()
    (folder / "adapter.onnx").rename(folder / "real" / "a.onnx")
    (folder / "adapter.onnx").symlink_to("real/a.onnx")
    (tmp_path / "link").symlink_to(folder)
    assert load_bundle(tmp_path / "link").name == "toy"


def test_loop_of_links(folder: Path) -> None:
    (folder / "adapter.onnx").unlink()
    (folder / "adapter.onnx").symlink_to("adapter.onnx")
    with pytest.raises(BundleError):
        load_bundle(folder)


# -- parts that do not fit ---------------------------------------------------------------------


def replace_gguf(folder: Path, arch: str, **shape: Any) -> None:
    """Another language model, with its true size and hash in the manifest."""
    toy_gguf(folder / "backbone.gguf", arch, **shape)
    edit(folder, "backbone.gguf", {**file_ref(folder / "backbone.gguf"), "type": "F32"})


@pytest.mark.parametrize(
    ("arch", "shape", "expected"),
    [
        ("qwen2", {"n_embd": 64, "n_layer": 1}, "its arch is qwen2"),
        ("llama", {"n_embd": 32, "n_layer": 1}, "its n_embd is 32"),
        ("llama", {"n_embd": 64, "n_layer": 2}, "its n_layer is 2"),
    ],
)
def test_gguf_of_another_model(
    folder: Path, arch: str, shape: dict[str, int], expected: str
) -> None:
    replace_gguf(folder, arch, **shape)
    assert expected in refused(folder, MismatchError)


@pytest.mark.parametrize("cut", [0.999, 0.5, 0.05])
def test_truncated_gguf_with_a_manifest_to_match(folder: Path, cut: float) -> None:
    path = folder / "backbone.gguf"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    edit(folder, "backbone.gguf", file_ref(path))
    assert "backbone.gguf" in refused(folder, BackboneError)


def test_gguf_that_is_none(folder: Path) -> None:
    (folder / "backbone.gguf").write_bytes(b"GG" * 100)
    edit(folder, "backbone.gguf", file_ref(folder / "backbone.gguf"))
    assert "backbone.gguf" in refused(folder, BackboneError)


def test_unknown_feature_spec(folder: Path) -> None:
    edit(folder, "features.face.spec", "face9000/1")
    message = refused(folder, MismatchError)
    assert "face9000/1" in message
    assert "face167/1" in message


def test_spec_of_the_other_modality(folder: Path) -> None:
    edit(folder, "features.audio.spec", "face167/1")
    assert "describes face" in refused(folder, MismatchError)


def test_dimension_of_another_spec(folder: Path) -> None:
    edit(folder, "features.audio.spec", "egemaps25/1")
    assert "has 25 columns" in refused(folder, MismatchError)


def test_encoder_spec_must_travel_with_the_bundle(folder: Path) -> None:
    spec = "hf-image:" + "ab" * 10
    edit(folder, "features.face.spec", spec)
    assert "no encoder" in refused(folder, MismatchError)
    (folder / "face.onnx").write_bytes(b"some encoder")
    entry = {"id": spec, **file_ref(folder / "face.onnx"), "config": {"size": 224}}
    edit(folder, "encoders", [entry])
    bundle = load_bundle(folder)
    assert bundle.encoder_path(spec) == folder / "face.onnx"
    assert bundle.encoders[0].config == {"size": 224}
    (folder / "face.onnx").write_bytes(b"some encodex")
    refused(folder, DamagedFileError)
    edit(folder, "features.audio.spec", spec)
    assert "not audio" in refused(folder, MismatchError)


# -- remembered hashes -------------------------------------------------------------------------


def test_hashes_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_bundle(folder)
    monkeypatch.setattr(bundle_files.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    load_bundle(folder)


@pytest.mark.parametrize("broken", ["unwritable", "nonsense"])
def test_loading_works_without_a_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    place = tmp_path / "cache"
    monkeypatch.setenv("MSE_CACHE", str(place))
    if broken == "unwritable":
        place.write_text("a file where the folder should be")
    else:
        place.mkdir()
        (place / bundle_files.HASHES).write_text('{"a": 3, "b": [')
    assert load_bundle(folder).name == "toy"
    (folder / "adapter.onnx").write_bytes(b"x" * 800)
    assert "SHA-256" in refused(folder, DamagedFileError)


def test_the_memory_of_hashes_is_bounded(folder: Path) -> None:
    cache.write_json(bundle_files.HASHES, {str(i): "0" * 64 for i in range(2000)})
    load_bundle(folder)
    assert len(cache.read_json(bundle_files.HASHES)) <= bundle_files.MAX_REMEMBERED


# -- anything at all ---------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
PRINTABLE = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)


def paths(value: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a JSON document."""
    found = [prefix[1:]] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found += paths(item, f"{prefix}.{key}") if isinstance(item, (dict, list)) else []
        if not isinstance(item, (dict, list)):
            found.append(f"{prefix}.{key}"[1:])
    return found


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_value_at_any_key_parses_or_is_explained(
    template: dict[str, Any], data: st.DataObject
) -> None:
    document = copy.deepcopy(template)
    set_key(document, data.draw(st.sampled_from(paths(template))), data.draw(JSON))
    try:
        bundle = manifest.parse(document)
    except BundleError:
        return
    assert manifest.parse(bundle.to_dict()) == bundle


@settings(deadline=None, max_examples=150)
@given(value=JSON)
def test_any_json_is_explained(value: Any) -> None:
    with pytest.raises(BundleError):
        manifest.parse(value)


@st.composite
def bundles(draw: st.DrawFn, base: Bundle) -> Bundle:
    """Valid bundles that differ from `base` in every kind of field."""
    task = dataclasses.replace(
        base.tasks["emotion"],
        language=draw(PRINTABLE),
        temperature=draw(st.floats(0.01, 100)),
        max_new_tokens=draw(st.integers(1, 256)),
        labels=tuple(
            dataclasses.replace(base.tasks["emotion"].labels[0], text=text, name=f"n{text}")
            for text in draw(st.lists(PRINTABLE, min_size=2, max_size=9, unique=True))
        ),
    )
    numbers = st.floats(-1e6, 1e6)
    face = dataclasses.replace(
        base.features.face,
        mean=tuple(draw(st.lists(numbers, min_size=167, max_size=167))),
        std=(draw(st.floats(1e-6, 1e6)),) * 167,
        clip=draw(st.none() | st.floats(0.1, 100)),
    )
    digest = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
    hub = HubRef(
        "org/x-1", draw(st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True)), "q/m.gguf", 9, digest
    )
    gguf = draw(st.sampled_from([base.backbone.gguf, hub, dataclasses.replace(hub, type="Q4_0")]))
    return dataclasses.replace(
        base,
        name=draw(PRINTABLE),
        tasks={"emotion": task, draw(st.from_regex(r"[a-z_-]{1,9}", fullmatch=True)): task},
        default_task="emotion",
        features=dataclasses.replace(base.features, face=face),
        backbone=dataclasses.replace(
            base.backbone, gguf=gguf, rope_table=draw(st.sampled_from([None, "bf16"]))
        ),
        parity=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_bundle_round_trips(template: dict[str, Any], data: st.DataObject) -> None:
    bundle = data.draw(bundles(manifest.parse(template)))
    assert manifest.parse(json.loads(json.dumps(bundle.to_dict()))) == bundle


def test_a_manifest_from_before_the_rotary_table(template: dict[str, Any]) -> None:
    """Schema 1.0 did not know the key: it loads, and is written as it was."""
    bundle = manifest.parse(template)
    assert (bundle.schema_version, bundle.backbone.rope_table) == ("1.0", None)
    assert set(bundle.to_dict()["backbone"]) == set(template["backbone"])


def test_write_manifest_of_a_parsed_bundle_loads(folder: Path) -> None:
    bundle = load_bundle(folder)
    write_manifest(folder, bundle.to_dict())
    assert load_bundle(folder) == bundle
