"""A named language model from a hub that runs inside the test, by the hub's own client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, Refusal

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("huggingface_hub")

from export_folders import CONFIGS, make_folder

from mse_export import download, profiles
from mse_export.pipeline import Request, export
from mse_export.resolve import resolve_backbone
from mse_runtime.bundle import load_bundle
from mse_runtime.errors import BackboneError, DeviceError, MSEError

NAME = "qwen2.5-0.5b"
ENTRY = profiles.named_backbone(NAME)
SHARD = "model-00001-of-00002.safetensors"  # the larger one, and so the last to come


@pytest.fixture
def hub(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """A hub with a small model under a known name; the cache is empty and the test's own."""
    folder = make_folder(tmp_path / "served", "qwen2", shards=2)
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    (folder / "pytorch_model.bin").write_bytes(b"not asked for")
    entry = profiles._data("backbones.toml")[NAME]
    monkeypatch.setitem(entry, "config", CONFIGS["qwen2"])
    monkeypatch.setitem(entry, "pad_id", 0)
    gated = profiles.named_backbone("llama3.2-1b")
    with HubServer({ENTRY.repo: folder, gated.repo: folder}, commit=ENTRY.revision) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


def content(hub: HubServer) -> list[str]:
    """Names of the files whose bytes were asked for."""
    return [p.rpartition("/")[2] for m, p, _ in hub.requests if m == "GET" and "/api/" not in p]


def refused(name: str = NAME, *, offline: bool = False) -> MSEError:
    with pytest.raises(MSEError) as caught:
        resolve_backbone(name, offline=offline)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ")."))
    return caught.value


def test_a_name_becomes_a_bundle(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(Request(NAME, output=out, init="random", quant="f16", threads=1))
    assert load_bundle(out).backbone.arch == "qwen2"
    assert {check["result"] for check in result.bundle.parity["checks"]} == {"ok"}
    assert f"{ENTRY.repo} at revision {ENTRY.revision}" in (out / "README.md").read_text()
    files = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{ENTRY.revision}/" in path for path in files)
    assert not {"evil.py", "pytorch_model.bin"} & set(content(hub))


def test_the_second_time_nothing_is_asked(hub: HubServer) -> None:
    first = resolve_backbone(NAME).path
    hub.stop()
    hub.requests.clear()
    assert resolve_backbone(NAME).path == first
    assert resolve_backbone(NAME, offline=True).path == first


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client writes every 10,000 bytes instead of every 10 MiB, so small files can resume."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_once_goes_on_by_itself(hub: HubServer) -> None:
    hub.cuts[SHARD] = [45_000]
    folder = resolve_backbone(NAME).path
    assert folder is not None
    assert (folder / SHARD).read_bytes() == (hub.repos[ENTRY.repo] / SHARD).read_bytes()
    assert hub.downloads(SHARD)[-1] == "bytes=40000-"


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_for_good_goes_on_in_the_next_run(hub: HubServer) -> None:
    hub.cuts[SHARD] = [10_000] * download.ATTEMPTS
    error = refused()
    assert "run the same command again" in str(error)
    assert error.exit_code == 6
    offline = refused(offline=True)
    assert f"has it without {SHARD}, and downloads are switched off" in str(offline)
    hub.requests.clear()
    folder = resolve_backbone(NAME).path
    assert folder is not None
    assert (folder / SHARD).read_bytes() == (hub.repos[ENTRY.repo] / SHARD).read_bytes()
    assert hub.downloads(SHARD)[-1] == f"bytes={10_000 * download.ATTEMPTS}-"
    assert set(content(hub)) == {SHARD}


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_gives_the_steps(hub: HubServer, status: int) -> None:
    gated = profiles.named_backbone("llama3.2-1b")
    hub.commit = gated.revision
    hub.refusals[gated.repo] = Refusal(status, "GatedRepo", "Access is restricted")
    error = refused("llama3.2-1b")
    for step in ("(1) Log in", "accept the licence", "(2) create a token", "(3) run: hf auth login",
                 "(4) run this command again"):  # fmt: skip
        assert step in str(error)
    assert not list(Path(os.environ["HF_HUB_CACHE"]).glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal(401, "RepoNotFound", "Repository not found"), "the hub does not show it"),
        (Refusal(500), "the hub answered HTTP 500"),
        (Refusal(404, "RevisionNotFound", "Invalid rev id"), "the hub answered HTTP 404"),
    ],
)
def test_what_the_hub_refuses(hub: HubServer, refusal: Refusal, words: str) -> None:
    hub.refusals[ENTRY.repo] = refusal
    error = refused()
    assert isinstance(error, BackboneError)
    assert words in str(error)
    assert f"hf download {ENTRY.repo} --revision {ENTRY.revision}" in str(error)


def test_no_connection(hub: HubServer) -> None:
    hub.stop()
    assert "not available: the hub cannot be reached from here." in str(refused())


def test_no_room_in_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    error = refused()
    assert isinstance(error, DeviceError)
    assert "HF_HUB_CACHE" in str(error)
    assert content(hub) == []


def test_ctrl_c_while_downloading(hub: HubServer, tmp_path: Path) -> None:
    """The client's threads don't hold the process back, and the next run goes on."""
    hub.stalls[SHARD] = 30_000
    out = tmp_path / "out"
    arguments = ["--backbone", NAME, "--init", "random", "-o", str(out), "--no-verify"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mse_export.cli", *arguments],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not out.exists()
    hub.stalls.clear()
    assert resolve_backbone(NAME).path is not None
