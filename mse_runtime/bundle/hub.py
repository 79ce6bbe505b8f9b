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
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from mse_runtime.bundle.schema import MANIFEST, DamagedFileError, FileRef, HubRef, MissingFileError
from mse_runtime.errors import BundleError

__all__ = ["HubError", "builtin_bundles", "cache_folder", "fetch_gguf", "resolve_bundle"]

BUILTIN = Path(__file__).resolve().parent.parent / "data" / "bundles"
REPO_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
COMMIT = re.compile(r"[0-9a-f]{40}")
ATTEMPTS = 4
CONNECT_SECONDS = 5.0
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
        return _fetch_bundle(_Repository(found["repo"], found["revision"] or "main", offline))


def fetch_gguf(ref: HubRef, *, offline: bool = False, progress: bool = True) -> Path:
    """The checked local file of a language model on the hub, downloaded if needed."""
    with _progress_bars(progress):
        path = _Repository(ref.repo, ref.revision, offline).fetch(ref.file)
    _check_download(path, ref)
    return path


def _fetch_bundle(repository: _Repository) -> Path:
    from mse_runtime.bundle import files, manifest

    folder = repository.fetch(MANIFEST).parent
    # From here on by commit, so that all files belong together even if the branch moves on.
    repository.revision = folder.name
    for ref in files.files(manifest.read(folder)):
        _check_download(repository.fetch(ref.file), ref)
    try:
        repository.fetch("README.md")
    except BundleError as error:
        log.info("no model card: %s", error)
    return folder


def _check_download(path: Path, ref: FileRef | HubRef) -> None:
    """Check a downloaded file; a damaged one is removed so that the next run fetches it again."""
    from mse_runtime.bundle.files import check_file

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


class _Repository:
    """A repository at a revision; `fetch` gives local files, from the cache where possible."""

    def __init__(self, repo: str, revision: str, offline: bool) -> None:
        self.repo = repo
        self.revision = revision
        self.forbidden = offline or _switched_on("HF_HUB_OFFLINE")
        self.endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self.cache = cache_folder()

    def fetch(self, name: str) -> Path:
        """One file. A broken connection is resumed a few times, then in the next run."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        with self._explained(name):
            if COMMIT.fullmatch(self.revision):
                known = try_to_load_from_cache(self.repo, name, self.cache, self.revision)
                if isinstance(known, str):
                    return Path(known)
            for attempt in range(ATTEMPTS):
                try:
                    return Path(
                        hf_hub_download(
                            self.repo,
                            name,
                            revision=self.revision,
                            cache_dir=self.cache,
                            local_files_only=self.forbidden or self.unreachable is not None,
                            endpoint=self.endpoint,
                            library_name="mse-runtime",
                        )
                    )
                except OSError as error:
                    if attempt == ATTEMPTS - 1 or not _is_broken_stream(error):
                        raise
                    log.warning("%s: the connection broke, resuming", name)
        raise HubError(f"{name} of {self.repo} could not be downloaded. Try again.")

    @cached_property
    def unreachable(self) -> str | None:
        """Why the hub cannot be reached, or None.

        The client would try for 20 seconds, also where all files are in the cache.
        """
        import socket
        from urllib.parse import urlsplit
        from urllib.request import getproxies, proxy_bypass

        address = urlsplit(self.endpoint)
        host, scheme = address.hostname or "", address.scheme
        if scheme in getproxies() and not proxy_bypass(host):
            return None
        try:
            port = address.port or (443 if scheme == "https" else 80)
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            log.warning("%s cannot be reached (%s): using the cache", self.endpoint, reason)
            return reason
        return None

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn the client's errors into one paragraph that says what to do."""
        from huggingface_hub import errors

        repo, revision = self.repo, self.revision
        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            raise self._not_in_cache(name, error) from error
        except errors.GatedRepoError as error:
            raise HubError(
                f"{repo} is gated: its owners let in only people who accepted their terms. Open "
                "its page on the hub and accept them, then log in here: hf auth login (or set "
                "HF_TOKEN)."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubError(
                f"{repo} has no revision {revision!r}. Give a branch, tag or commit of the "
                "repository after the @, or leave it out for main."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(
                f"There is no repository {repo} on the hub ({self.endpoint}), or it is private. "
                "Check the spelling; for a private one log in first: hf auth login (or set "
                "HF_TOKEN)."
            ) from error
        except errors.EntryNotFoundError as error:
            why = "so it is not a bundle" if name == MANIFEST else f"although {MANIFEST} names it"
            raise HubError(
                f"{repo} (revision {revision}) has no file {name}, {why}. Check the name after "
                "--bundle and its revision."
            ) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(name, error) from error
        except errors.HFValidationError as error:
            raise HubError(
                f"{repo!r} is not a repository name of the hub. It looks like org/repo."
            ) from error
        except OSError as error:
            if _is_broken_stream(error):
                raise HubError(
                    f"The download of {name} of {repo} was interrupted. What came in is kept: run "
                    "the same command again to go on from there."
                ) from error
            raise HubError(
                f"{name} of {repo} could not be stored ({error}). Check the space and permissions "
                f"of the download cache {self.cache} (HF_HUB_CACHE moves it)."
            ) from error

    def _not_in_cache(self, name: str, error: Exception) -> HubError:
        what = f"{name} of {self.repo} (revision {self.revision}) is not in the download cache"
        if self.forbidden:
            return HubError(
                f"{what} {self.cache}, and the network is not to be used. Run the command once "
                "without --offline (and without HF_HUB_OFFLINE)."
            )
        if self.unreachable is None and error.__cause__ is not None:
            return self._refused(name, error.__cause__)
        return HubError(
            f"{what}, and the hub ({self.endpoint}) cannot be reached: {self.unreachable}. Check "
            "the connection (and HF_ENDPOINT, HTTPS_PROXY), or use a bundle in a folder."
        )

    def _refused(self, name: str, error: BaseException) -> HubError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return HubError(
                f"The hub refused {self.repo} (HTTP {status}). Log in with an account that may "
                "read it: hf auth login (or set HF_TOKEN to a valid token)."
            )
        what = f"answered HTTP {status}" if status else f"broke off ({type(error).__name__})"
        return HubError(
            f"The hub ({self.endpoint}) {what} when asked for {name} of {self.repo}. Try again "
            "later; what was downloaded is kept."
        )


def _is_broken_stream(error: OSError) -> bool:
    """True for a connection that was cut while a file was coming in."""
    import requests

    broken = (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)
    return isinstance(error, broken)


def cache_folder() -> Path:
    """The hub's cache, looked up now: the client itself reads the environment at its import."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    if not folder.is_absolute():  # the client would make a folder called ~ right here
        raise HubError(
            "There is no home folder to keep downloads in. Name a folder in HF_HUB_CACHE, or use a "
            "bundle in a folder."
        )
    return folder


def _switched_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


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
