"""A named model from the Hugging Face hub: from the local cache, else downloaded, pinned.

Files come one after the other, so that Ctrl-C works at once; the hub's client keeps what came in
of a file and goes on there. What cannot be had is explained in one paragraph: what to fetch, where
to put it, and how to go on without it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from mse_export.gguf_write import check_free_space
from mse_export.hf_folder import missing_shards
from mse_export.profiles import NamedBackbone
from mse_export.watcher import Watcher
from mse_runtime.bundle.hub import cache_folder
from mse_runtime.errors import BackboneError, DeviceError, MSEError

__all__ = ["snapshot"]

ATTEMPTS = 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def snapshot(entry: NamedBackbone, offline: bool, watcher: Watcher) -> Path:
    """The folder of `entry` at its pinned revision, whole.

    Raises BackboneError where it cannot be had, DeviceError where the disk will not hold it.
    """
    from huggingface_hub import try_to_load_from_cache

    cache = cache_folder()
    known = try_to_load_from_cache(entry.repo, "config.json", cache, entry.revision)
    lacking = ""
    if isinstance(known, str):
        lacking = _lacking(Path(known).parent, entry)
        if not lacking:
            return Path(known).parent
    if offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        state = f"has it without {lacking}" if lacking else "does not have it"
        raise _not_here(entry, f"the cache {cache} {state}, and downloads are switched off")
    watcher.stage(f"Downloading {entry.repo}")
    folder = _download(entry, cache, watcher)
    lacking = _lacking(folder, entry)
    if lacking:
        raise _not_here(entry, f"the hub has no {lacking} of it")
    return folder


def _download(entry: NamedBackbone, cache: Path, watcher: Watcher) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    endpoint = os.environ.get("HF_ENDPOINT")
    with _explained(entry, "the hub cannot be reached from here"):
        api = HfApi(endpoint=endpoint, library_name="mse-export")
        info = api.model_info(entry.repo, revision=entry.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [name for name in sizes if any(fnmatch(name, each) for each in entry.files)]
    wanted.sort(key=lambda name: sizes[name])  # what can be wrong in small files shows at once
    if not wanted:
        raise _not_here(entry, "the hub lists no files of it")
    missing = [
        name
        for name in wanted
        if not isinstance(try_to_load_from_cache(entry.repo, name, cache, entry.revision), str)
    ]
    _check_disk(entry, cache, sum(sizes[name] for name in missing))
    folder = Path()
    for name in wanted:
        with _explained(entry, "the connection to the hub was lost"):
            for attempt in range(ATTEMPTS):
                try:
                    path = hf_hub_download(
                        entry.repo,
                        name,
                        revision=entry.revision,
                        cache_dir=cache,
                        endpoint=endpoint,
                        library_name="mse-export",
                    )
                    break
                except OSError as error:
                    if attempt == ATTEMPTS - 1 or not _is_broken_stream(error):
                        raise
                    watcher.note(f"The connection broke; going on with {name}")
            folder = Path(path).parents[name.count("/")]
    return folder


def _check_disk(entry: NamedBackbone, cache: Path, needed: int) -> None:
    folder = cache / f"models--{entry.repo.replace('/', '--')}"
    there = sum(path.stat().st_size for path in (folder / "blobs").glob("*.incomplete"))
    check_free_space(
        folder,
        needed - there,
        f"Downloading {entry.repo}",
        "Free some space, or move the download cache to another disk with HF_HUB_CACHE.",
    )


def _lacking(folder: Path, entry: NamedBackbone) -> str:
    """What a snapshot lacks, "" where it is whole.

    An interrupted download leaves whole files, but not all of them.
    """
    models = [name for name in entry.files if name.endswith((".model", ".tiktoken"))]
    for name in ("config.json", *(models or ["tokenizer.json"])):
        if not (folder / name).is_file():
            return name
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return "weights" if not weights else next(iter(missing_shards(weights)), "")


@contextmanager
def _explained(entry: NamedBackbone, unreachable: str) -> Iterator[None]:
    """The client's errors as one paragraph that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(entry) from error
    except errors.RepositoryNotFoundError as error:
        # The hub hides gated repositories from strangers as well.
        raise (
            _gated(entry) if entry.gated else _not_here(entry, "the hub does not show it")
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise _failed(entry, error, unreachable) from error


def _failed(entry: NamedBackbone, error: Exception, unreachable: str) -> MSEError:
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403) and entry.gated:
        return _gated(entry)
    if status is not None:
        return _not_here(entry, f"the hub answered HTTP {status}")
    if isinstance(error, OSError) and error.errno in FULL:
        return DeviceError(
            f"The download of {entry.repo} stopped ({error.strerror}). What came in is kept. Free "
            "some space, or move the download cache to another disk with HF_HUB_CACHE, and run "
            "the same command again."
        )
    if isinstance(error, OSError) and _is_broken_stream(error) and "lost" in unreachable:
        return BackboneError(
            f"The download of {entry.repo} was interrupted {ATTEMPTS} times. What came in is kept: "
            "run the same command again to go on from there."
        )
    return _not_here(entry, unreachable)


def _is_broken_stream(error: OSError) -> bool:
    import requests

    broken = (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)
    return isinstance(error, broken)


def _ways_on(entry: NamedBackbone) -> str:
    patterns = " ".join(f"'{pattern}'" for pattern in entry.files)
    return (
        f"On a machine with a connection run: hf download {entry.repo} --revision "
        f"{entry.revision} --include {patterns} --local-dir {entry.name}, copy the folder here and "
        f"give it: mse-export --backbone ./{entry.name}. A GGUF made elsewhere will do as well "
        f"(--backbone FILE.gguf), and --synthetic measures speed and memory without the weights."
    )


def _not_here(entry: NamedBackbone, reason: str) -> BackboneError:
    gated = " The model is gated: accept its licence on its page first." if entry.gated else ""
    return BackboneError(
        f"The weights of {entry.name} ({entry.repo}) are not available: {reason}.{gated} "
        + _ways_on(entry)
    )


def _gated(entry: NamedBackbone) -> BackboneError:
    return BackboneError(
        f"{entry.repo} is gated and this machine has no access to it. (1) Log in to the Hugging "
        f"Face hub and accept the licence on the model's page, {entry.repo}; (2) create a token "
        "with read access in your settings; (3) run: hf auth login; (4) run this command again. "
        + _ways_on(entry)
    )
