"""From a name to a bundle's folder: built-in, on this machine, or on the Hugging Face hub.

From a repository only `manifest.json`, `README.md` and the files that the manifest names are
fetched (the parser allows .onnx, .safetensors and .gguf there), into the hub's usual cache, where
other tools find them. Nothing of them is executed. Interrupted downloads resume.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mse_runtime.bundle import MANIFEST, DamagedFileError, FileRef, HubRef, MissingFileError
from mse_runtime.errors import BundleError

if TYPE_CHECKING:
    from mse_runtime.bundle import Bundle

__all__ = ["HubError", "builtin_bundles", "fetch_gguf", "resolve_bundle"]

BUILTIN = Path(__file__).resolve().parent / "data" / "bundles"
REPO_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
ATTEMPTS = 4
log = logging.getLogger("mse_runtime")


class HubError(BundleError):
    """The hub does not have the repository, does not let it out, or cannot be reached."""


def builtin_bundles() -> tuple[str, ...]:
    """Names of the bundles that come with the package."""
    return tuple(sorted(path.parent.name for path in BUILTIN.glob(f"*/{MANIFEST}")))


def resolve_bundle(name: str | Path, *, offline: bool = False, progress: bool = True) -> Path:
    """The folder of the bundle `name`.

    `name` is a built-in name, a folder, or `org/repo[@revision]` on the Hugging Face hub, looked
    for in this order. A repository is downloaded where its files are not in the hub's cache yet
    (`$HF_HUB_CACHE`), with a bar on stderr if `progress`; with `offline` only the cache is used.
    Downloaded files are checked against the manifest before they are returned.

    Raises `MissingFileError` for a name that is nothing of these, `HubError` for the hub's
    refusals and network faults, `DamagedFileError` for a wrong size or hash.
    """
    text = str(name)
    if text in builtin_bundles():
        return BUILTIN / text
    path = Path(text).expanduser()
    if path.exists():
        return path
    found = REPO_NAME.fullmatch(text)
    if text.count("/") != 1 and "@" not in text:
        found = None
    if not found or ".." in text:
        raise MissingFileError(
            f"There is no bundle {text!r}: it is no folder here, no built-in bundle "
            f"({', '.join(builtin_bundles()) or 'none is installed'}), and not of the form "
            "org/repo or org/repo@revision of the Hugging Face hub."
        )
    with _progress_bars(progress):
        return _fetch_bundle(found["repo"], found["revision"] or "main", _offline(offline))


def fetch_gguf(ref: HubRef, *, offline: bool = False, progress: bool = True) -> Path:
    """The checked local file of a language model on the hub, downloaded if needed."""
    with _progress_bars(progress):
        path = _fetch(ref.repo, ref.revision, ref.file, _offline(offline))
    _check_download(path, ref)
    return path


def _fetch_bundle(repo: str, revision: str, offline: bool) -> Path:
    from mse_runtime import bundle_files, manifest

    folder = _fetch(repo, revision, MANIFEST, offline).parent
    bundle: Bundle = manifest.read(folder)
    commit = folder.name  # so that all files are of one commit, even if the branch moves on
    for ref in bundle_files.files(bundle):
        _check_download(_fetch(repo, commit, ref.file, offline), ref)
    try:
        _fetch(repo, commit, "README.md", offline)
    except BundleError as error:
        log.info("no model card: %s", error)
    return folder


def _check_download(path: Path, ref: FileRef | HubRef) -> None:
    """Check a downloaded file; a damaged one is removed so that the next run fetches it again."""
    from mse_runtime.bundle_files import check_file

    try:
        check_file(path, ref.size, ref.sha256)
    except DamagedFileError as error:
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise DamagedFileError(
            f"{error} It was removed from the download cache, so running the command again fetches "
            "it again; if that fails too, the repository's manifest is wrong.",
            path,
        ) from error


def _fetch(repo: str, revision: str, name: str, offline: bool) -> Path:
    """One file of a repository in the hub's cache. Broken connections are resumed a few times."""
    from huggingface_hub import hf_hub_download

    for attempt in range(ATTEMPTS):
        with _explained(repo, revision, name, offline):
            try:
                return Path(
                    hf_hub_download(
                        repo,
                        name,
                        revision=revision,
                        cache_dir=_cache_folder(),
                        local_files_only=offline,
                        endpoint=os.environ.get("HF_ENDPOINT") or None,
                        library_name="mse-runtime",
                    )
                )
            except OSError as error:
                if attempt == ATTEMPTS - 1 or not _is_broken_stream(error):
                    raise
                log.warning("%s: the connection broke, resuming", name)
    raise HubError(f"{repo} could not be downloaded.")  # not reached


def _is_broken_stream(error: OSError) -> bool:
    """True for a connection that was cut while a file was coming in."""
    import requests

    broken = (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)
    return isinstance(error, broken)


@contextmanager
def _explained(repo: str, revision: str, name: str, offline: bool) -> Iterator[None]:
    """Turn the hub client's errors into one paragraph that says what to do."""
    from huggingface_hub import errors

    where = f"{repo} (revision {revision}) on the Hugging Face hub"
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise HubError(
                f"{name} of {where} is not in the download cache {_cache_folder()}, and the "
                "network is not to be used. Run the command once without --offline (and without "
                "HF_HUB_OFFLINE)."
            ) from error
        raise HubError(
            f"{where} cannot be reached ({_reason(error)}), and {name} is not in the download "
            "cache. Check the connection (and HF_ENDPOINT, HTTPS_PROXY), or use a bundle in a "
            "folder."
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: its owners let in only people who accepted their terms. Open its "
            "page on the hub and accept them, then log in here: hf auth login (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo} has no revision {revision!r}. Give a branch, tag or commit of the repository "
            "after the @, or leave it out for main."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repository {repo} on the Hugging Face hub, or it is private. Check the "
            "spelling; for a private one log in first: hf auth login (or set HF_TOKEN)."
        ) from error
    except errors.EntryNotFoundError as error:
        why = "so it is not a bundle" if name == MANIFEST else f"although its {MANIFEST} names it"
        raise HubError(
            f"{where} has no file {name}, {why}. Check the name after --bundle and its revision."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"The hub refused {where} (HTTP {status}). Log in with an account that may read "
                "it: hf auth login (or set HF_TOKEN to a valid token)."
            ) from error
        raise HubError(
            f"The hub answered HTTP {status} for {name} of {where}. Try again later; what was "
            "downloaded is kept."
        ) from error
    except errors.HFValidationError as error:
        raise HubError(
            f"{repo!r} is not a repository name of the Hugging Face hub. It looks like org/repo."
        ) from error
    except OSError as error:
        if _is_broken_stream(error):
            raise HubError(
                f"The download of {name} from {where} was interrupted. What came in is kept: run "
                "the same command again to go on from there."
            ) from error
        raise HubError(
            f"{name} of {where} could not be downloaded ({_reason(error)}). Check the space and "
            f"permissions of the download cache {_cache_folder()} (HF_HUB_CACHE moves it) and try "
            "again."
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _cache_folder() -> Path:
    """The hub's cache, looked up now: the client itself reads the environment at its import."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _offline(asked: bool) -> bool:
    return asked or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    utils: Any = import_module("huggingface_hub.utils")
    before = utils.are_progress_bars_disabled()
    if not wanted and not before:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not wanted and not before:
            utils.enable_progress_bars()
