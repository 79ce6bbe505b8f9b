"""Weights are copied straight from the mapped file, and its pages given back meanwhile."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from make_fixtures import toy_gguf

from mse_runtime.backbone import Backbone, loading
from mse_runtime.backbone.mapped import STEP, CopiedPages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no Linux")
SIZE = 48 << 20


def resident(path: Path) -> int:
    """Bytes of the mappings of `path` that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def test_pages_are_given_back_and_still_there(big: Path) -> None:
    pages = CopiedPages.of(big)
    assert pages is not None
    with big.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        expected = mapped[:]
        assert resident(big) == SIZE
        pages.give_back()
        assert resident(big) == 0
        assert mapped[: SIZE // 2] == expected[: SIZE // 2]
        assert resident(big) >= SIZE // 2
        pages.give_back()
        assert resident(big) == 0
        assert mapped[:] == expected


def test_pages_that_may_differ_from_the_file_are_left_alone(big: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * 4096)
    with (
        big.open("rb") as file, other.open("rb") as another,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as own,
        mmap.mmap(another.fileno(), 0, access=mmap.ACCESS_READ) as unrelated,
    ):  # fmt: skip
        own[:4] = b"mine"
        assert unrelated[0] == ord("x")
        pages = CopiedPages.of(big)
        assert pages is not None
        pages.give_back()
        assert own[:4] == b"mine"
        assert resident(other) == 4096


def test_the_answers_are_those_of_a_file_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    found = []
    for mapped in (True, False):
        if not mapped:
            monkeypatch.setattr(CopiedPages, "of", lambda _path: None)
        with Backbone.open(path, threads=1, extra_bufts=True) as backbone:
            assert not backbone.info["mapped"]
            found.append(backbone.prefill(np.arange(40)))
            found.append(backbone.prefill_tree([3], [5, 6], [-1, 0], candidates=[1, 2, 3]))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])


def test_progress_is_still_told_and_can_stop(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    told: list[float] = []
    with Backbone.open(path, threads=1, extra_bufts=True, progress=told.append):
        pass
    assert told == sorted(told)
    assert told[-1] == 1.0

    def stop(_fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Backbone.open(path, threads=1, extra_bufts=True, progress=stop)


def test_a_file_that_the_kernel_does_not_show_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a /proc of another kind: nothing could be given back, so nothing is mapped."""
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    monkeypatch.setattr("mse_runtime.backbone.mapped._mappings", lambda: iter([]))
    assert CopiedPages.of(path) is None
    assert CopiedPages.of(tmp_path / "missing.gguf") is None
    with Backbone.open(path, threads=1, extra_bufts=True) as backbone:
        assert not any("Mapped" in name for name in backbone.info["buffers_mib"])


def test_no_mapping_goes_while_addresses_are_in_use(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mse_runtime import gguf

    with gguf.MAPPINGS:
        model = toy_gguf(big.parent / "m.gguf", "llama")
        opened = gguf.Gguf.open(model)
        closing = threading.Thread(target=opened.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
    closing.join(5)
    assert not closing.is_alive()


def test_with_layers_on_a_gpu_the_file_is_read(tmp_path: Path) -> None:
    from mse_runtime.gguf import Gguf

    with Gguf.open(toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")) as gguf:
        assert loading.copied_pages(gguf, True, 0)
        assert not loading.copied_pages(gguf, True, 1)
        assert not loading.copied_pages(gguf, False, 0)


def test_the_peak_is_not_the_file_and_its_copy(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", n_embd=1024, n_layer=24, n_head=8, n_ff=2816,
                    dtype="q4_0")  # fmt: skip
    size = path.stat().st_size
    assert size > 3 * STEP
    code = (
        "import sys\n"
        "from mse_runtime.backbone import Backbone\n"
        "from mse_runtime.memory import measured\n"
        "Backbone.open(sys.argv[1], threads=1, extra_bufts=False, n_ctx=256).close()\n"
        "before = measured().peak_rss\n"
        "model = Backbone.open(sys.argv[2], threads=1, extra_bufts=True, n_ctx=256)\n"
        "print(measured().peak_rss - before)\n"
    )
    small = toy_gguf(tmp_path / "small.gguf", "llama", dtype="q4_0")
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 * size < int(done.stdout) < 1.4 * size
