"""The process in which `mse-run` reads its clip: same answers, its end, its memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest
from fault_tools import CLIP, ROOT, command, decoder_traps

from mse_runtime import Analyzer, background, entry
from mse_runtime.errors import MediaError, MSEError
from mse_runtime.features import child
from mse_runtime.features.pool import FeaturePool
from mse_runtime.features.spec import Features
from mse_runtime.memory import measured
from mse_runtime.placement import MB
from mse_runtime.result import Stopwatch

pytestmark = pytest.mark.skipif(background.cores() == 1, reason="one core: no process beside")
TEXT = "I really love it."


def children(parent: int) -> list[int]:
    """Process ids, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # gone by now
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(process: int) -> bool:
    for _ in range(400):
        try:
            if "\nState:\tZ" in Path(f"/proc/{process}/status").read_text("utf-8"):
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_answer_is_that_of_one_process() -> None:
    documents = []
    for more in ((), ("--low-memory",)):
        done = command(CLIP, TEXT, "--jsonl", "--end", "1", *more)
        assert done.returncode == 0, done.stderr
        documents.append(json.loads(done.stdout))
    apart, together = documents
    assert apart["probabilities"] == pytest.approx(together["probabilities"], abs=1e-4)
    assert set(apart["timing_ms"]) == set(together["timing_ms"])
    assert apart["timing_ms"]["decode"] > 0
    assert apart["timing_ms"]["features"] > 0
    # The process beside counts, in what was measured and in what was planned.
    for kind in ("peak_rss", "plan"):
        assert apart["memory_mb"][kind] > together["memory_mb"][kind] + 20


def test_a_pool_is_used_where_pictures_are_not_kept() -> None:
    with FeaturePool() as pool, Analyzer.open("tiny", adapter="onnx", pool=pool) as analyzer:
        found = analyzer.analyze(CLIP, TEXT, end=1.0)
        assert analyzer.last_features is not None
        beside = analyzer.last_features.process_peak
        assert 30 * MB < beside < 1000 * MB
        assert found.memory_mb["peak_rss"] == pytest.approx(
            (measured().peak_rss + beside) / MB, rel=0.05
        )
        again = analyzer.analyze(CLIP, TEXT, end=1.0, keep_frames=2)
        assert again.distribution == found.distribution
        assert analyzer.last_features is not None
        assert analyzer.last_features.info["frames"]
        assert analyzer.last_features.process_peak == 0
        # A pool that is kept: features that were there before bring no process with them.
        later = analyzer.analyze_features(analyzer.last_features, TEXT)
        assert later.memory_mb["peak_rss"] == pytest.approx(measured().peak_rss / MB, rel=0.05)


def test_a_clip_that_kills_its_decoder_is_an_error(tmp_path: Path) -> None:
    clip = tmp_path / "crashes.mp4"
    shutil.copy(CLIP, clip)
    done = command(clip, TEXT, env=decoder_traps(tmp_path))
    assert done.returncode == 3
    assert done.stderr == f"mse-run: {clip}: the decoder died (SIGSEGV); the clip is broken\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_was_stopped(how: signal.Signals, tmp_path: Path) -> None:
    """Not even a decoder that hangs."""
    clip = tmp_path / "hangs.mp4"
    shutil.copy(CLIP, clip)
    run = subprocess.Popen(
        [sys.executable, "-c", "from mse_runtime.entry import mse_run; mse_run()", clip, TEXT],
        env={**os.environ, **decoder_traps(tmp_path)}, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        # A test run started in the background hands an ignored Ctrl-C down to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not children(run.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    (beside,) = children(run.pid)
    time.sleep(2.0)  # in the middle of the clip by now
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode == (130 if how == signal.SIGINT else -how)
    assert said.strip() == ("mse-run: interrupted" if how == signal.SIGINT else "")
    assert gone(beside)


def test_without_another_process_this_one_reads_the_clip() -> None:
    """As where the number of processes is limited (simulated: a limit does not hold for root)."""
    code = (
        "import os\n"
        "def refuse(*_, **__): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "os.posix_spawn = refuse\n"
    )
    done = command(CLIP, TEXT, "--end", "1", before=code)
    assert done.returncode == 0, done.stderr
    assert "positive" in done.stdout


@pytest.mark.parametrize(
    ("words", "early"),
    [
        ([str(CLIP), TEXT], True),
        (["--task=emotion", str(CLIP), TEXT, "--jsonl"], True),
        (["--bundle", "tiny", "--plan", str(CLIP), TEXT], True),
        ([TEXT, str(CLIP)], True),  # an error, which this is too early to see
        (["no such clip.mp4", TEXT], False),
        (["x" * 5000, "a\nb"], False),
        ([], False),
        (["--help"], False),
        ([str(CLIP), TEXT, "--plot=a.png"], False),
        ([str(CLIP), TEXT, "--low-memory"], False),
        ([str(CLIP), TEXT, "-v"], False),
        ([str(CLIP), "--features-only", "-o", "f.npz"], False),
        (["--batch", str(CLIP), "-o", "x.jsonl"], False),
    ],
)
def test_the_process_starts_before_the_command_line_is_understood(
    words: list[str], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(sys, "argv", ["mse-run", *words])
    monkeypatch.setattr(child, "start_early", lambda: started.append(True))
    entry._start_reader()
    assert started == [True] * early


def test_an_early_process_is_used_once_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.take_early() is None
    child.start_early()
    (early,) = children(os.getpid())
    with FeaturePool(once=True) as pool:
        pool.start()
        assert children(os.getpid()) == [early]
        assert child.take_early() is None
        request = {"path": str(CLIP), "audio_spec": "lld13/1", "face_spec": None, "end": 0.5}
        assert pool.submit(request).result().audio is not None
    assert children(os.getpid()) == []
    child.start_early()
    with FeaturePool(once=True, memory_mb=4096) as pool:  # that one has no limit
        pool.start()
        assert len(children(os.getpid())) == 2
        left = child.take_early()
        assert left is not None
        left.stdin.close()
        assert left.wait(60.0) == 0
        left.stdout.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        child.start_early()
        assert child.take_early() is None
    done = command(CLIP)  # without a text
    assert done.returncode == 2
    assert done.stderr.startswith("mse-run: Give a clip and its text")


def test_no_more_threads_is_said() -> None:
    code = (
        "import threading\n"
        'def refuse(_): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = refuse\n"
    )
    done = command(CLIP, TEXT, before=code)
    assert done.returncode == 5
    assert done.stderr.startswith("mse-run: the system allows no more threads")


def test_a_process_that_reads_once_is_gone_after_its_clip() -> None:
    request = {"path": str(CLIP), "audio_spec": "lld13/1", "face_spec": None, "end": 0.5}
    with FeaturePool(once=True) as pool:
        pool.start()
        for _ in range(2):
            assert pool.submit(request).result().audio is not None
            process = pool._all[0]._process
            assert process is not None
            assert process.wait(30) == 0
        pool.retire()
        assert pool._all[0]._process is None


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_that_is_not_the_clips_has_a_traceback_where_that_was_asked_for(
    verbose: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    request = {"path": str(CLIP), "audio_spec": "lld13/1", "face_spec": None, "end": "x"}
    with FeaturePool(verbose=verbose) as pool, pytest.raises(MSEError, match="ValueError"):
        pool.submit(request).result()
    assert ("Traceback" in capfd.readouterr().err) is verbose


@pytest.mark.parametrize("more", [(), ("--low-memory",)])
def test_a_clip_of_which_nothing_can_be_used_is_answered_from_its_text(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    with wave.open(str(tmp_path / "short.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(2 * 160))
    done = command(tmp_path / "short.wav", TEXT, "--jsonl", *more)
    assert done.returncode == 0, done.stderr
    assert "voice is masked" in " ".join(json.loads(done.stdout)["warnings"])


@pytest.mark.parametrize("info", ['"x"', '{"decode": "x"}', '{"decode": NaN, "face": -1}', "{}"])
def test_what_a_process_says_about_itself_cannot_hurt(info: str) -> None:
    features = Features(None, None, 1.0, (), {"seconds": json.loads(info)})
    ready: Future[Features] = Future()
    ready.set_result(features)
    with Analyzer.open("tiny", adapter="onnx") as analyzer:
        watch = Stopwatch()
        found = analyzer._answer(ready, TEXT, None, None, None, watch, fresh=True)
        assert set(found.timing_ms) <= {"load", "adapter", "prefill", "readout", "total"}


def test_closing_does_not_wait_for_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for one whose own child holds the pipe."""
    hang = "import subprocess, time; subprocess.Popen(['sleep', '20'], start_new_session=True)"
    monkeypatch.setattr("mse_runtime.features.child.CODE", f"{hang}; time.sleep(60)")
    begun = time.monotonic()
    with FeaturePool() as pool:
        pending = pool.submit({"path": "clip.mp4"})
        time.sleep(1.0)
    with pytest.raises(MediaError):
        pending.result()
    assert time.monotonic() - begun < 30


def test_a_process_has_no_files_of_its_parents(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with (tmp_path / "secret").open() as file:
        os.set_inheritable(file.fileno(), True)
        made = child.Child()
        try:
            folder, deadline = Path(f"/proc/{made.pid}/fd"), time.monotonic() + 60
            while "onnxruntime" not in Path(f"/proc/{made.pid}/maps").read_text("utf-8", "replace"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            names = set()
            for place in folder.iterdir():
                with suppress(FileNotFoundError):  # it still imports, and closes what it has read
                    names.add(place.readlink())
            assert tmp_path / "secret" not in names
            assert Path(os.devnull) in names
        finally:
            made.kill()
            assert made.wait() == -signal.SIGKILL
            made.stdin.close()
            made.stdout.close()
    made.kill()  # the number may be another's by now


def test_an_end_that_somebody_else_was_told_of() -> None:
    """As where a program ignores its children, or waits for all of them."""
    made = child.Child()
    assert made.wait(0.0) is None
    made.stdin.close()
    os.waitpid(made.pid, 0)
    assert made.wait() == 0
    made.stdout.close()
    done = command(
        CLIP,
        TEXT,
        "--end",
        "1",
        before="import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_where_none_can_be_started_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise NotImplementedError("no sessions")

    files = len([*Path("/proc/self/fd").iterdir()])
    monkeypatch.setattr(os, "posix_spawn", refuse)
    with pytest.raises(OSError, match="no sessions"):
        child.Child()
    child.start_early()
    assert child.take_early() is None
    assert len([*Path("/proc/self/fd").iterdir()]) == files


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_streams_do_not_keep_a_clip_from_being_read(closed: str) -> None:
    code = "from mse_runtime.entry import mse_run; mse_run()"
    done = subprocess.run(
        f'"$PYTHON" -c "{code}" "{CLIP}" "{TEXT}" --end 1 --jsonl {closed}', shell=True,
        env={**os.environ, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["timing_ms"]["features"] > 0


def test_a_closed_output_is_no_error(tmp_path: Path) -> None:
    code = "from mse_runtime.entry import mse_run; mse_run()"
    out = tmp_path / "f.npz"
    done = subprocess.run(
        f'"$PYTHON" -c "{code}" "{CLIP}" --end 1 --features-only -o "{out}" >&-',
        shell=True, env={**os.environ, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_cycles_are_looked_for_as_usual_once_a_program_has_started() -> None:
    code = (
        "import gc; usual = gc.get_threshold()\n"
        "from mse_runtime import heap; heap.collect_late()\n"
        "late = gc.get_threshold()\n"
        "kept = [[] for _ in range(200_000)]\n"
        "print(late[0] > 100 * usual[0], gc.get_threshold() == usual, len(gc.callbacks))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True True 0\n", done.stderr


def test_a_text_that_cannot_be_is_said_at_once() -> None:
    done = command(CLIP, " ")
    assert done.returncode == 2
    assert "text is empty" in done.stderr
