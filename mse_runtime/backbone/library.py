"""llama.cpp's shared library: loading it late and light, its devices, its identity."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mse_runtime import cache, cpu
from mse_runtime.backbone.reports import redirect_log
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf
from mse_runtime.records import dataclass

__all__ = [
    "Device", "attention", "build_id", "devices", "folder", "kernel", "load", "mapped_types",
]  # fmt: skip

_PACKAGE, _CACHE = "llama_cpp", "kernels.json"
_SPINS = 8000  # some hundred microseconds
_lock = threading.Lock()
_library: Any = None
_kernel: str | None = None
_attention: str | None = None
_shortens = False
_mapped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp was built for and can see."""

    name: str
    description: str
    kind: str
    """`cpu`, `gpu`, `igpu` or `accel`."""
    free: int
    """Bytes; 0 where the backend doesn't say."""
    total: int


def folder() -> Path:
    """Where the shared libraries lie (`LLAMA_CPP_LIB_PATH`, else inside the installed package).

    Raises BackboneError where llama-cpp-python is not installed; nothing is loaded.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            "llama.cpp's Python binding is not installed, so no language model can run. Install "
            "it with: pip install 'mse-runtime[llama]' (it compiles for some minutes)."
        )
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    return Path(spec.submodule_search_locations[0]) / "lib"


def build_id() -> str:
    """A short name of this build: it changes whenever a library file does. Nothing is loaded."""
    digest = hashlib.sha256()
    kernels = importlib.util.find_spec("mse_kernels")
    ours = [Path(p) for p in (kernels and kernels.submodule_search_locations) or ()]
    for path in [*sorted(folder().glob("*")), *(p / "libmse_ggml.so" for p in ours)]:
        if path.is_file() and path.suffix in (".so", ".dylib", ".dll"):
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def load() -> Any:
    """The low-level bindings (`llama_cpp.llama_cpp`), loaded once, llama.cpp's log redirected.

    Redirected anew each time: importing the whole of llama_cpp takes the log away.
    Raises BackboneError where the library is missing or too old.
    """
    global _library
    with _lock:
        if _library is None:
            where = folder()
            try:
                with _patience(), _faster_functions(where):
                    lib = _import_bindings()
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                raise BackboneError(
                    f"llama.cpp's library in {where} cannot be loaded: {error}. Reinstall it with: "
                    "pip install --force-reinstall --no-cache-dir 'mse-runtime[llama]'"
                ) from error
            lib.llama_backend_init()
            _library = lib
        redirect_log(_library)
        return _library


@contextmanager
def _patience() -> Iterator[None]:
    """Let OpenMP's threads sleep soon where they wait for each other.

    GCC's runtime, which reads this when it is loaded, lets them spin for milliseconds at each of
    the thousand barriers of a decode. On a busy machine they spin away the time that the one they
    wait for needs: five times the wall clock and CPU time (bench/neighbour.py). What the user has
    set stays, and child processes see no change.
    """
    name = "GOMP_SPINCOUNT"
    if name in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[name] = str(_SPINS)
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _faster_functions(where: Path) -> Iterator[None]:
    """Around the loading of llama.cpp: our functions in place of its own, where there are any."""
    global _kernel, _mapped, _attention, _shortens
    try:
        from mse_kernels import ggml, mapped, opening, theirs
    except ImportError:  # the kernels are optional
        yield
        return
    # Loaded before us, its names are bound; and what is not there cannot be compared.
    if theirs.function(where, mapped.SYMBOL) is not None or not any(where.glob("libggml-cpu*.so*")):
        yield
        return
    ggml.preload()
    yield
    _shortens = opening.settle(_import_bindings()._lib)
    _attention, _kernel = _settled(where)
    if _kernel:
        _mapped = mapped.types_of(_kernel, where)


def _settled(where: Path) -> tuple[str | None, str | None]:
    """The kernels for attention and weights, which compute from now on.

    They are compared with llama.cpp's own once for a build and a processor.
    """
    from mse_kernels import attention, ggml, mapped

    key = hashlib.sha256(f"{build_id()} {cpu.model()}".encode()).hexdigest()[:24]
    known = cache.read_json(_CACHE).get(key)
    match known:
        case [str(first), str(second)] if first in attention.kernels() and second in ggml.kernels():
            attention.use(first, where)
            mapped.use(second, where)
            return first, second
    found = attention.settle(where), mapped.settle(where)
    if all(found):
        cache.remember(_CACHE, key, found)
    return found


@contextmanager
def without_arrays(gguf: Gguf, prefix: str) -> Iterator[Path]:
    """While it lasts, llama.cpp opens this path to the file, in this thread, as if the file lacked
    the metadata arrays whose keys begin with `prefix`; with them where that cannot be.

    Raises BackboneError where the file is not the one that was opened.
    """
    path = gguf.same_file()  # by its name another could be there, which has not this header
    with ExitStack() as stack:
        if _shortens:
            from mse_kernels.opening import shortened

            with suppress(BackboneError):
                short = gguf.header_without(prefix)
                stack.enter_context(shortened(os.fsencode(path), *short))
        yield path


def kernel() -> str | None:
    """The kernel of ours that multiplies mapped weights; None: llama.cpp's own. Loads llama.cpp."""
    load()
    return _kernel


def attention() -> str | None:
    """The kernel of ours that computes attention; None: llama.cpp's own. Loads llama.cpp."""
    load()
    return _attention


def mapped_types() -> tuple[str, ...]:
    """The types of weights that our product multiplies as the mapped file has them, so that another
    layout of llama.cpp's would not pay. Loads llama.cpp.
    """
    load()
    return _mapped


def _import_bindings() -> Any:
    """`llama_cpp.llama_cpp` without the package's own `__init__`.

    That one imports chat templates, a disk cache and a server's types, 0.15 s that nothing here
    uses. An empty package of the same name stands in during the import and is taken away again,
    so that a later `import llama_cpp` works as ever.
    """
    name = f"{_PACKAGE}.{_PACKAGE}"
    if _PACKAGE in sys.modules or name in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return importlib.import_module(name)
    shell = types.ModuleType(_PACKAGE)
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules[_PACKAGE] = shell
    try:
        return importlib.import_module(name)
    finally:
        if sys.modules.get(_PACKAGE) is shell:
            del sys.modules[_PACKAGE]


# Devices


def devices() -> list[Device]:
    """The devices llama.cpp can use, the CPU included."""
    lib = load()
    ggml = lib._lib  # libllama links libggml, so its symbols resolve through the same handle
    kinds = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}
    try:
        count = ggml.ggml_backend_dev_count
        get, name, description = (
            ggml.ggml_backend_dev_get,
            ggml.ggml_backend_dev_name,
            ggml.ggml_backend_dev_description,
        )
        memory, kind = ggml.ggml_backend_dev_memory, ggml.ggml_backend_dev_type
    except AttributeError:
        return []
    count.restype = ctypes.c_size_t
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for function in (name, description):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    memory.restype = None
    memory.argtypes = [ctypes.c_void_p] + [ctypes.POINTER(ctypes.c_size_t)] * 2
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    found = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=(name(device) or b"").decode(errors="replace"),
                description=(description(device) or b"").decode(errors="replace"),
                kind=kinds.get(kind(device), "accel"),
                free=int(free.value),
                total=int(total.value),
            )
        )
    return found
