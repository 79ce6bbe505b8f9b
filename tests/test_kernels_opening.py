"""Opening models without llama.cpp's spare work: shortened headers, caches that are not filled."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_fixtures import ARCHES, toy_gguf

from mse_kernels import attention, ggml, mapped, opening
from mse_runtime import cache
from mse_runtime.backbone import Backbone, library
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf

LIB = library.load()
pytestmark = pytest.mark.skipif(
    not library._shortens, reason="no x86-64 with AVX2, no Linux, or the kernel library is missing"
)
PREFIX = "tokenizer.ggml."


def described(path: Path) -> list[str]:
    """What llama.cpp's own reader says of a file that it opens as a model's loader does."""

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))

    theirs, ours = LIB._lib, ggml.preload()
    ours.gguf_init_from_file.restype = ctypes.c_void_p
    ours.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    file = ours.gguf_init_from_file(os.fsencode(path), Params(True, None))
    assert file

    def ask(name: str, kind: Any, *more: int) -> Any:
        function = getattr(theirs, name)
        function.restype, function.argtypes = kind, [ctypes.c_void_p, *[ctypes.c_int64] * len(more)]
        return function(file, *more)

    keys = [
        ask("gguf_get_key", ctypes.c_char_p, i).decode()
        for i in range(ask("gguf_get_n_kv", ctypes.c_int64))
    ]
    said = [f"data at {ask('gguf_get_data_offset', ctypes.c_size_t)}", *keys]
    for i in range(ask("gguf_get_n_tensors", ctypes.c_int64)):
        name = ask("gguf_get_tensor_name", ctypes.c_char_p, i).decode()
        place = ask("gguf_get_tensor_offset", ctypes.c_size_t, i)
        said.append(f"{name} {ask('gguf_get_tensor_type', ctypes.c_int, i)} {place}")
    ask("gguf_free", None)
    return said


@pytest.mark.parametrize("arch", ARCHES)
def test_a_shortened_header_says_the_same_without_its_arrays(tmp_path: Path, arch: str) -> None:
    path = toy_gguf(tmp_path / "m.gguf", arch)
    every = described(path)
    with Gguf.open(path) as gguf:
        left_out = {key for key in gguf._arrays if key.startswith(PREFIX)}
        before = opening.headers()
        with opening.shortened(os.fsencode(path), *gguf.header_without(PREFIX)):
            found = described(path)
            other = described(toy_gguf(tmp_path / "other.gguf", arch))
        assert opening.headers() == before + 1
        assert len(left_out) >= 2
        assert set(every) - set(found) == left_out
        assert set(found) - set(every) == {"mse.left_out"}
        assert other == every
        assert described(path) == every
        # A header whose data would lie elsewhere is not taken.
        head, tail, size, data = gguf.header_without(PREFIX)
        with opening.shortened(os.fsencode(path), head, tail, size - 32, data):
            assert described(path) == every
        with opening.shortened(os.fsencode(path), b"GGUF", tail, size, data):
            assert described(path) == every
        with pytest.raises(BackboneError, match="left out"):
            gguf.header_without("no such")


def test_a_cache_begins_as_zeros_without_being_filled() -> None:
    theirs, ours = LIB._lib, ggml.preload()
    pointer = ctypes.c_void_p
    theirs.ggml_backend_cpu_buffer_type.restype = pointer
    theirs.ggml_backend_buft_alloc_buffer.restype = pointer
    theirs.ggml_backend_buft_alloc_buffer.argtypes = [pointer, ctypes.c_size_t]
    theirs.ggml_backend_buffer_get_base.restype = pointer
    theirs.ggml_backend_buffer_get_base.argtypes = [pointer]
    theirs.ggml_backend_buffer_free.argtypes = [pointer]
    ours.ggml_backend_buffer_clear.argtypes = [pointer, ctypes.c_uint8]
    for size in (1, 4096, 12_345, 3 << 20):
        kind = theirs.ggml_backend_cpu_buffer_type()
        buffer = theirs.ggml_backend_buft_alloc_buffer(kind, size)
        base = theirs.ggml_backend_buffer_get_base(buffer)
        values = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        values[:] = 9
        before = opening.bytes_given_back()
        ours.ggml_backend_buffer_clear(buffer, 0)
        assert not values.any()
        assert 0 <= size - (opening.bytes_given_back() - before) <= max(8192, min(size, 4096))
        before = opening.bytes_given_back()
        ours.ggml_backend_buffer_clear(buffer, 7)
        assert (values == 7).all()
        assert opening.bytes_given_back() == before
        del values
        theirs.ggml_backend_buffer_free(buffer)


def test_a_models_cache_is_not_filled(tmp_path: Path) -> None:
    before = opening.bytes_given_back()
    with Backbone.open(toy_gguf(tmp_path / "m.gguf", "llama"), threads=1) as model:
        size = model.info["buffers_mib"]["CPU KV"] * (1 << 20)
        assert opening.bytes_given_back() - before > 0.9 * size


def test_without_llama_cpps_functions_headers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def __getattr__(self, name: str) -> Any:
            if name == "gguf_init_from_callback":
                raise AttributeError(name)
            return getattr(LIB._lib, name)

    try:
        assert not opening.settle(Older())  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(ggml, "preload", lambda: None)
            assert not opening.settle(LIB._lib)
    finally:
        assert opening.settle(LIB._lib)


def test_where_llama_cpps_own_functions_cannot_be_found_the_process_ends() -> None:
    code = (
        "import ctypes, resource; from mse_kernels import ggml\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "ggml.preload().ggml_backend_buffer_clear(ctypes.c_void_p(), 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -6
    assert "is called before llama.cpp's own is known" in done.stderr


def test_another_packages_llama_cpp_opens_models_as_ever(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    code = (
        "from mse_kernels import ggml; ggml.preload()\n"
        "from llama_cpp import llama_cpp as lib\n"
        "params = lib.llama_model_default_params(); params.use_mmap = False\n"
        f"model = lib.llama_model_load_from_file({os.fsencode(path)!r}, params)\n"
        "context = lib.llama_init_from_model(model, lib.llama_context_default_params())\n"
        "print(bool(model), bool(context))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


# What was compared is remembered


def test_kernels_are_compared_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path))
    compared: list[str] = []
    for module in (attention, mapped):
        real = module.settle

        def settle(folder: Path, real: Any = real, name: str = module.__name__) -> str | None:
            compared.append(name)
            return real(folder)  # type: ignore[no-any-return]

        monkeypatch.setattr(module, "settle", settle)
    names = library.attention(), library.kernel()
    if None in names:
        pytest.skip("not every kernel agrees with this llama.cpp")
    for _ in range(2):
        assert library._settled(library.folder()) == names
        assert len(compared) == 2
    ((key, known),) = cache.read_json("kernels.json").items()
    assert tuple(known) == names
    for damaged in (None, [], ["avx512"], ["no such", names[1]], [names[0], 5], "text"):
        cache.write_json("kernels.json", {key: damaged})
        compared.clear()
        assert library._settled(library.folder()) == names
        assert len(compared) == 2
    monkeypatch.setattr("mse_runtime.cpu.model", lambda: "another processor")
    compared.clear()
    assert library._settled(library.folder()) == names
    assert len(compared) == 2
    # What does not agree is looked at again each time.
    monkeypatch.setattr(mapped, "settle", lambda _: None)
    monkeypatch.setattr("mse_runtime.cpu.model", lambda: "a third")
    assert library._settled(library.folder()) == (names[0], None)
    assert len(cache.read_json("kernels.json")) == 2
    monkeypatch.undo()
    mapped.use(names[1], library.folder())
