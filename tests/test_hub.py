"""Bundles by name: built-in, folder, or a repository of a hub that runs inside the test."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_factory import edit, file_ref, make_bundle
from hub_server import COMMIT, HubServer, Refusal

from mse_runtime.bundle import (
    DamagedFileError,
    HubRef,
    ManifestError,
    MissingFileError,
    UnsafePathError,
    load_bundle,
)
from mse_runtime.bundle.hub import ATTEMPTS, HubError, builtin_bundles, fetch_gguf, resolve_bundle
from mse_runtime.errors import BundleError

REPO = "org/toy-bundle"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one bundle; the client's cache is empty and belongs to the test."""
    make_bundle(tmp_path / "served")
    for name in ("evil.py", "weights.pkl"):
        (tmp_path / "served" / name).write_text("raise SystemExit('executed')")
    with HubServer({REPO: tmp_path / "served"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def served(hub: HubServer) -> Path:
    """The folder that the hub serves."""
    return hub.repos[REPO]


def refused(name: str, kind: type[BundleError], *, offline: bool = False) -> str:
    """Resolving `name` fails with `kind`, in one paragraph."""
    with pytest.raises(BundleError) as caught:
        resolve_bundle(name, offline=offline, progress=False)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# -- names -------------------------------------------------------------------------------------


def test_builtin_name_and_folder(tmp_path: Path) -> None:
    assert (resolve_bundle("tiny") / "manifest.json").is_file()
    make_bundle(tmp_path / "mine")
    assert resolve_bundle(str(tmp_path / "mine")) == tmp_path / "mine"
    assert resolve_bundle(tmp_path / "mine") == tmp_path / "mine"


def test_a_folder_wins_over_a_repository(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert resolve_bundle(REPO) == Path(REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["nosuch", "./nosuch", "/no/such", "a/b/c", "org/../x", "org/", "a b/c", "-x/y"]
)
def test_names_that_are_nothing(hub: HubServer, name: str) -> None:
    message = refused(name, MissingFileError)
    assert all(known in message for known in builtin_bundles())
    assert hub.requests == []


# -- downloads ---------------------------------------------------------------------------------


def test_full_download(hub: HubServer) -> None:
    folder = resolve_bundle(REPO, progress=False)
    bundle = load_bundle(folder)
    assert bundle.name == "toy"
    assert folder.name == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter.onnx", "adapter.safetensors", "backbone.gguf", "manifest.json",
    ]  # fmt: skip


@pytest.mark.parametrize("progress", [True, False])
def test_bar_on_the_terminal(hub: HubServer, progress: bool) -> None:
    """stderr is a terminal of the test's own: the bar is there, and stdout stays clean."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    code = f"import mse_runtime.bundle.hub as h; h.resolve_bundle({REPO!r}, progress={progress})"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, timeout=60
        )
        os.set_blocking(controller, False)
        try:
            shown = os.read(controller, 1 << 16).decode()
        except BlockingIOError:
            shown = ""
    finally:
        os.close(controller)
        os.close(terminal)
    assert child.returncode == 0, shown
    assert child.stdout == b""
    assert ("backbone.gguf: 100%" in shown) is progress


def test_a_second_run_downloads_nothing(hub: HubServer) -> None:
    first = resolve_bundle(REPO, progress=False)
    hub.requests.clear()
    assert resolve_bundle(REPO, progress=False) == first
    assert [request for request in hub.requests if request[0] == "GET"] == []


def test_a_commit_in_the_cache_needs_no_network(
    hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    folder = resolve_bundle(f"{REPO}@{COMMIT}", progress=False)
    hub.stop()
    assert resolve_bundle(f"{REPO}@{COMMIT}", progress=False) == folder
    assert caplog.text == ""


def test_all_files_are_of_one_commit(hub: HubServer) -> None:
    """The branch may move on while files come in: only the manifest is asked for by branch."""
    resolve_bundle(REPO, progress=False)
    by_branch = {path for _, path, _ in hub.requests if "/main/" in path}
    assert by_branch == {f"/{REPO}/resolve/main/manifest.json"}


def test_only_files_of_the_manifest_are_fetched(hub: HubServer) -> None:
    resolve_bundle(REPO, progress=False)
    asked = {path.rpartition("/")[2] for _, path, _ in hub.requests}
    assert asked == {
        "manifest.json", "README.md", "adapter.onnx", "adapter.safetensors", "backbone.gguf",
    }  # fmt: skip


def test_a_bundle_without_a_model_card(hub: HubServer, served: Path) -> None:
    (served / "README.md").unlink()
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client writes every 50,000 bytes instead of every 10 MiB, so small files can resume."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_once_goes_on_by_itself(hub: HubServer) -> None:
    hub.cuts["backbone.gguf"] = [120_000]
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"
    assert hub.downloads("backbone.gguf") == [None, "bytes=100000-"]


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_for_good_goes_on_in_the_next_run(hub: HubServer) -> None:
    hub.cuts["backbone.gguf"] = [50_000] * ATTEMPTS
    message = refused(REPO, HubError)
    assert "interrupted" in message
    assert "again" in message
    hub.requests.clear()
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"
    assert hub.downloads("backbone.gguf") == [f"bytes={50_000 * ATTEMPTS}-"]


def test_killed_in_the_middle_goes_on_in_the_next_run(hub: HubServer, served: Path) -> None:
    """A process of its own is killed while a large file comes in: the next one continues."""
    with (served / "backbone.gguf").open("ab") as handle:
        handle.truncate(24 << 20)
    edit(served, "backbone.gguf", file_ref(served / "backbone.gguf"))
    hub.stalls["backbone.gguf"] = 22 << 20
    code = f"import mse_runtime.bundle.hub as h; h.resolve_bundle({REPO!r}, progress=False)"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:
            assert hub.stalled.wait(60)
            blobs = Path(os.environ["HF_HUB_CACHE"]).glob("models--*/blobs/*.incomplete")
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not any(
                p.stat().st_size >= 20 << 20 for p in blobs
            ):
                time.sleep(0.02)
                blobs = Path(os.environ["HF_HUB_CACHE"]).glob("models--*/blobs/*.incomplete")
        finally:
            child.kill()
    hub.stalls.clear()
    hub.requests.clear()
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"
    assert hub.downloads("backbone.gguf") == [f"bytes={20 << 20}-"]


# -- faults ------------------------------------------------------------------------------------


def test_wrong_hash_is_removed_and_fetched_again(hub: HubServer, served: Path) -> None:
    good = (served / "adapter.onnx").read_bytes()
    (served / "adapter.onnx").write_bytes(good[:-1] + b"!")
    message = refused(REPO, DamagedFileError)
    assert "SHA-256" in message
    assert "fetches it again" in message
    (served / "adapter.onnx").write_bytes(good)
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"


def test_damage_on_the_way_is_removed_and_fetched_again(hub: HubServer) -> None:
    hub.damaged.add("backbone.gguf")
    assert "SHA-256" in refused(REPO, DamagedFileError)
    hub.damaged.clear()
    assert load_bundle(resolve_bundle(REPO, progress=False)).name == "toy"


def test_wrong_size(hub: HubServer, served: Path) -> None:
    with (served / "adapter.safetensors").open("ab") as handle:
        handle.write(b"more")
    assert "bytes long" in refused(REPO, DamagedFileError)


def test_manifest_faults_are_the_bundles_own(hub: HubServer, served: Path) -> None:
    edit(served, "adapter.onnx.file", "../../../adapter.onnx")
    refused(REPO, UnsafePathError)
    edit(served, "adapter.onnx.file", "evil.py")
    refused(f"{REPO}@{COMMIT}", UnsafePathError)  # the commit is in the cache and does not change


def test_a_script_in_the_manifest_is_refused(hub: HubServer, served: Path) -> None:
    edit(served, "adapter.onnx.file", "evil.py")
    assert "should name a .onnx file" in refused(REPO, ManifestError)
    assert not [path for _, path, _ in hub.requests if "evil" in path]


def test_repository_that_is_not_there(hub: HubServer) -> None:
    message = refused("org/nothing", HubError)
    assert "no repository org/nothing" in message


def test_repository_that_is_hidden(hub: HubServer) -> None:
    hub.refusals[REPO] = Refusal(401, "RepoNotFound", "Repository not found")
    assert "private" in refused(REPO, HubError)


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: HubServer, status: int) -> None:
    hub.refusals[REPO] = Refusal(status, "GatedRepo", f"Access to model {REPO} is restricted.")
    message = refused(REPO, HubError)
    assert "gated" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("status", [401, 403])
def test_refused_without_a_code(hub: HubServer, status: int) -> None:
    hub.refusals[REPO] = Refusal(status, "", "")
    assert "HF_TOKEN" in refused(REPO, HubError)


def test_revision_that_is_not_there(hub: HubServer) -> None:
    message = refused(f"{REPO}@v9", HubError)
    assert "no revision 'v9'" in message


def test_repository_without_a_manifest(hub: HubServer, served: Path) -> None:
    (served / "manifest.json").unlink()
    assert "not a bundle" in refused(REPO, HubError)


def test_file_that_the_manifest_names_but_is_not_there(hub: HubServer, served: Path) -> None:
    (served / "adapter.onnx").unlink()
    message = refused(REPO, HubError)
    assert "adapter.onnx" in message
    assert "manifest.json names it" in message


def test_hub_is_ill(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts
    hub.refusals[REPO] = Refusal(503)
    assert "503" in refused(REPO, HubError)


def test_hub_is_unreachable_without_a_cache(hub: HubServer) -> None:
    hub.stop()
    message = refused(REPO, HubError)
    assert "cannot be reached" in message


def test_hub_is_unreachable_with_a_cache(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    folder = resolve_bundle(REPO, progress=False)
    hub.stop()
    assert resolve_bundle(REPO, progress=False) == folder
    assert "using the cache" in caplog.text


# -- offline -----------------------------------------------------------------------------------


def test_offline_with_a_cache(hub: HubServer) -> None:
    folder = resolve_bundle(REPO, progress=False)
    hub.requests.clear()
    assert resolve_bundle(REPO, offline=True, progress=False) == folder
    assert load_bundle(folder, offline=True).name == "toy"
    assert hub.requests == []


def test_offline_without_a_cache(hub: HubServer) -> None:
    message = refused(REPO, HubError, offline=True)
    assert "--offline" in message
    assert hub.requests == []


def test_offline_by_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(REPO, HubError)
    assert hub.requests == []


def test_offline_with_half_a_cache(hub: HubServer) -> None:
    hub.cuts["backbone.gguf"] = [10, 10, 10, 10]
    refused(REPO, HubError)
    message = refused(REPO, HubError, offline=True)
    assert "backbone.gguf" in message


def test_cache_that_cannot_be_written(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "blocked"))
    assert "HF_HUB_CACHE" in refused(REPO, HubError)


# -- a language model on the hub ---------------------------------------------------------------


@pytest.fixture
def split(hub: HubServer, tmp_path: Path) -> Path:
    """A local bundle whose language model lies on the hub."""
    folder = tmp_path / "split"
    make_bundle(folder)
    models = tmp_path / "models" / "q8"
    models.mkdir(parents=True)
    (folder / "backbone.gguf").rename(models / "model.gguf")
    hub.repos["org/models"] = tmp_path / "models"
    ref = file_ref(models / "model.gguf")
    place = {"repo": "org/models", "revision": COMMIT, "file": "q8/model.gguf"}
    gguf = {"hub": place, "size": ref["size"], "sha256": ref["sha256"], "type": "F32"}
    edit(folder, "backbone.gguf", gguf)
    return folder


def test_language_model_on_the_hub(hub: HubServer, split: Path) -> None:
    bundle = load_bundle(split, progress=False)
    assert bundle.gguf_path().read_bytes()[:4] == b"GGUF"
    hub.stop()
    assert load_bundle(split, offline=True).gguf_path() == bundle.gguf_path()
    assert load_bundle(split, progress=False) == bundle


def test_language_model_on_the_hub_offline(hub: HubServer, split: Path) -> None:
    with pytest.raises(HubError, match=r"q8/model\.gguf"):
        load_bundle(split, offline=True)


def test_damaged_language_model_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.gguf").write_bytes(b"GGUF" * 10)
    hub.repos["org/m"] = tmp_path / "m"
    ref = HubRef("org/m", "main", "a.gguf", 40, "0" * 64)
    with pytest.raises(DamagedFileError, match="removed from the download cache"):
        fetch_gguf(ref, progress=False)
