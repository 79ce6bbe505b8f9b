"""Faults around the process: clock, locale, home, disks, memory. See docs/reliability.md."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from fault_tools import CLIP, ROOT, batch_list, command, json_lines, preloaded, tiny_disk
from make_fixtures import Shape, synthetic_gguf

from mse_runtime import cache, memory
from mse_runtime.batch.export import convert
from mse_runtime.batch.journal import Journal
from mse_runtime.batch.rows import Row, read_rows
from mse_runtime.errors import DeviceError, UsageError
from mse_runtime.gguf import Gguf
from mse_runtime.placement import plan

# -- clock -------------------------------------------------------------------------------------

JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) { /* ten years ahead, then ten years back, at every look */
  static long calls;
  return (__sync_fetch_and_add(&calls, 1) % 2 ? 1 : -1) * 315360000L;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += jump();
  return code;
}
int gettimeofday(struct timeval *t, void *zone) {
  static int (*real)(struct timeval *, void *);
  if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
  int code = real(t, zone);
  t->tv_sec += jump();
  return code;
}
time_t time(time_t *out) {
  static time_t (*real)(time_t *);
  if (!real) real = dlsym(RTLD_NEXT, "time");
  time_t now = real(0) + jump();
  if (out) *out = now;
  return now;
}
"""


def test_a_clock_that_jumps_changes_no_answer_and_no_time(tmp_path: Path) -> None:
    clock = preloaded(tmp_path, JUMPING_CLOCK)
    listing = batch_list(tmp_path, 4)
    text = listing.read_text("utf-8").replace("id,features,text", "id,features,text,clip")
    listing.write_text(f"{text}clip,,I love it.,{CLIP}\n", "utf-8")
    values = []
    for name, env in (("steady", {}), ("jumping", clock)):
        out = tmp_path / f"{name}.jsonl"
        arguments = ("--batch", listing, "-o", out, "--adapter", "onnx", "--clip-timeout", 100)
        done = command(*map(str, arguments), env=env)
        assert done.returncode == 0, done.stderr
        found = json_lines(out)
        values.append([entry["distribution"] for entry in found])
        for entry in found:
            assert all(0 <= ms < 300_000 for ms in entry["timing_ms"].values()), entry["timing_ms"]
    assert values[0] == values[1]
    jumped = "import time; a = time.time(); assert abs(time.time() - a) > 1e8"
    assert command("--help", env=clock, before=jumped).returncode == 0


# -- locale ------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_locale_c_keeps_texts_and_file_names(tmp_path: Path) -> None:
    ascii_only = "import sys; assert sys.getfilesystemencoding() == 'ascii' or sys.flags.utf8_mode"
    folder = tmp_path / "片段 🙂"
    folder.mkdir()
    shutil.copy(CLIP, folder / "我.mp4")
    (folder / "我.txt").write_text("我很喜欢 🙂", "utf-8")
    done = command(
        folder / "我.mp4", "我很喜欢 🙂", "--json", "--end", "1", env=ASCII, before=ascii_only
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["text"], document["clip"]) == ("我很喜欢 🙂", str(folder / "我.mp4"))
    out = tmp_path / "答.csv"
    done = command("--batch", folder, "-o", out, env=ASCII)
    assert done.returncode == 0, done.stderr
    assert "答.csv: 1 of 1 rows, 0 with errors" in done.stderr
    with out.open(encoding="utf-8", newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert (row["id"], row["text"]) == ("我", "我很喜欢 🙂")
    refused = command(folder / "nein.mp4", "文", env=ASCII)
    assert refused.returncode == 3
    assert "片段 🙂/nein.mp4" in refused.stderr


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    shutil.copy(CLIP, tmp_path / f"{name}.mp4")
    done = command(tmp_path / f"{name}.mp4", "I love it.", "--jsonl", "--end", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clip"] == str(tmp_path / f"{name}.mp4")
    (tmp_path / f"{name}.txt").write_text("I love it.")
    rows = read_rows(tmp_path)
    out = tmp_path / "out.csv"
    with Journal(tmp_path / "out.csv.jsonl", rows) as journal:
        journal.write({"index": 0, "id": rows[0].id, "clip": str(rows[0].source), "text": "\ud800"})
    convert(out)
    assert r"caf\udce9.mp4" in out.read_text("utf-8")
    (entry,) = json_lines(tmp_path / "out.csv.jsonl")
    assert entry["clip"] == str(rows[0].source)


# -- no home -----------------------------------------------------------------------------------

NOBODY = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown"
HOMELESS = {"HOME": None, "XDG_CACHE_HOME": None, "MSE_CACHE": None, "HF_HOME": None}


@pytest.mark.parametrize("home", [None, "/proc/nonexistent"])
def test_without_a_home_everything_works_and_nothing_is_left(
    home: str | None, tmp_path: Path
) -> None:
    env = {**HOMELESS, "HOME": home, "HF_HUB_CACHE": None, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    inside = {"env": env, "before": NOBODY, "cwd": tmp_path / "here"}
    done = command(CLIP, "I love it.", "--jsonl", "--end", "1", **inside)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "sentiment"
    refused = command(CLIP, "I love it.", "--bundle", "org/repo", "--offline", **inside)
    assert refused.returncode == 4
    assert "Traceback" not in refused.stderr
    if home is None:
        assert "HF_HUB_CACHE" in refused.stderr
    assert [*(tmp_path / "here").iterdir()] == [*(tmp_path / "tmp").iterdir()] == []


def test_without_a_home_nobody_elses_folder_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HOMELESS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not cache.write_json("facts.json", {"a": 1})
    assert cache.read_json("facts.json") == {}


@pytest.mark.parametrize("empty", [True, False])
def test_a_read_only_cache_changes_no_answer(empty: bool, tmp_path: Path) -> None:
    """A file system that refuses every write, root's too; empty, and with what was kept before."""
    ask = (CLIP, "I love it.", "--jsonl", "--end", "1", "--adapter", "onnx")
    usual = command(*ask, env={"MSE_CACHE": str(tmp_path / "usual")})
    assert usual.returncode == 0, usual.stderr
    with tiny_disk(tmp_path / "disk", 8192) as disk:
        if not empty:
            shutil.copytree(tmp_path / "usual", disk, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = sorted(disk.rglob("*"))
        with pytest.raises(OSError, match="Read-only"):
            (disk / "x").touch()
        done = command(*ask, env={"MSE_CACHE": str(disk), "HF_HUB_CACHE": str(disk)})
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(disk.rglob("*")) == before
        refused = command(
            *ask, "--bundle", "org/repo", "--offline", env={"HF_HUB_CACHE": str(disk)}
        )
        assert refused.returncode == 4
        assert "Traceback" not in refused.stderr
    first, second = json.loads(usual.stdout), json.loads(done.stdout)
    assert first["distribution"] == second["distribution"]


# -- disks -------------------------------------------------------------------------------------


def test_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    listing = batch_list(tmp_path, 30)
    with tiny_disk(tmp_path / "disk", 64) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(24 << 10))
        out = disk / "out.jsonl"
        arguments = ("--batch", listing, "-o", out, "--adapter", "onnx")
        full = command(*arguments)
        assert full.returncode == 2
        assert "Traceback" not in full.stderr
        assert "Cannot write" in full.stderr
        written = json_lines(out)  # whole lines only
        assert 0 < len(written) < 30
        filler.unlink()
        rows = [Row(i, f"r{i}", Path("f"), f"This is sentence number {i}.") for i in range(30)]
        with Journal(out, rows, run=written[0]["run"]) as journal:
            assert journal.done == set(range(len(written)))
            journal.write({"index": len(written), "id": f"r{len(written)}"})
        assert json_lines(out)[: len(written)] == written
        table = out.with_name("table.csv")
        out.rename(f"{table}.jsonl")
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(UsageError, match=r"Cannot write.*The rows are safe"):
            convert(table)
        assert not table.exists()


def test_features_need_no_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    shutil.copy(CLIP, tmp_path / "clips" / "a.mp4")
    (tmp_path / "clips" / "a.txt").write_text("I love it.")
    nowhere = "import tempfile; tempfile.tempdir = '/proc/nowhere'"
    out = tmp_path / "out.jsonl"
    done = command("--batch", tmp_path / "clips", "-o", out, "--max-seconds", "1", before=nowhere)
    assert done.returncode == 0, done.stderr
    assert "error" not in json_lines(out)[0]
    done = command(CLIP, "I love it.", "--end", "1", before=nowhere)
    assert done.returncode == 0, done.stderr


# -- memory ------------------------------------------------------------------------------------

GIB = 1 << 30


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))


def test_one_gigabyte_is_enough_for_tiny() -> None:
    done = command(CLIP, "I love it.", "--jsonl", "--plan", preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory_mb"]["peak_rss"] < 1000


def test_a_model_too_large_for_one_gigabyte_says_so(tmp_path: Path) -> None:
    shape = Shape("llama", 2048, 40, 16, 16, 8192, 1000)
    path = synthetic_gguf(tmp_path / "large.gguf", shape, sparse=True)
    assert path.stat().st_size > 1.2 * GIB
    code = (
        "import sys\n"
        "from mse_runtime.gguf import Gguf\n"
        "from mse_runtime.errors import DeviceError\n"
        "try: Gguf.open(sys.argv.pop())\n"
        "except DeviceError as error: sys.exit(f'{error.exit_code}: {error}')\n"
    )
    done = command(path, before=code, preexec_fn=limited)
    assert "5: The language model" in done.stderr
    assert "ulimit -v" in done.stderr
    with Gguf.open(path) as found:
        made = plan(found, program=0)
        with pytest.raises(DeviceError, match=r"weights.*MB are available"):
            made.check_ram(GIB)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc and a /sys/fs/cgroup of the test's own."""
    for name in ("PROC", "CGROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
        (tmp_path / name / "self").mkdir(parents=True)
    (tmp_path / "PROC" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  8000000 kB\n")
    (tmp_path / "PROC" / "self" / "status").write_text("VmSize:\t 500000 kB\n")
    return tmp_path


def test_the_limit_of_a_control_group_counts(machine: Path) -> None:
    assert memory.available() == 8_000_000 * 1024
    (machine / "PROC" / "self" / "cgroup").write_text("4:memory:/pod/a\n0::/pod/a\n")
    group = machine / "CGROUPS" / "pod"
    group.mkdir()
    (group / "memory.max").write_text("1073741824\n")
    (group / "memory.current").write_text("600000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 60000000\nactive_file 40000000\n")
    assert memory.available() == GIB - 500_000_000
    (group / "memory.max").write_text("max\n")
    assert memory.available() == 8_000_000 * 1024
    old = machine / "CGROUPS" / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("2000000000\n")
    (old / "memory.usage_in_bytes").write_text("1500000000\n")
    assert memory.available() == 500_000_000


def test_the_limit_of_the_address_space_counts(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    assert memory.available() == GIB - 500_000 * 1024


def test_nothing_is_known_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROC", "CGROUPS"):
        monkeypatch.setattr(memory, name, tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert memory.available() == 0


# -- the page itself ---------------------------------------------------------------------------


def test_every_test_that_the_table_names_is_there() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    tests = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
        for path in (ROOT / "tests").glob("test_*.py")
    }
    everywhere = set().union(*tests.values())
    cells = [line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("| ")]
    assert len(cells) > 30
    for cell in cells[1:]:
        names = re.findall(r"`([^`]+)`", cell)
        assert names, cell
        file = ""
        for name in names:
            before, _, after = name.rpartition("::")
            file = before or file
            if name.endswith(".py"):
                assert name in tests, name
                continue
            among = tests[before or file] if "::" in name else everywhere
            pattern = after.replace("*", r"\w+")
            assert any(re.fullmatch(pattern, test) for test in among), name
