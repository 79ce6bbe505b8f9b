"""Every row of "what real files do": each trap is a file made here with PyAV."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import (
    SIZE,
    corrupt,
    frame_number,
    numbered_frame,
    rotate_mp4,
    tone,
    two_hours,
    write_clip,
)

from mse_runtime.errors import MediaError, UsageError
from mse_runtime.media import (
    FrameReader,
    SoundReader,
    Waveform,
    Window,
    plan_window,
    probe,
)


def frames(
    path: Path, fps: float = 5, window: Window | None = None, threads: int = 1
) -> FrameReader:
    clip = probe(path)
    return FrameReader(clip, window or plan_window(clip, None, None, 60)[0], fps, threads=threads)


def numbers(reader: FrameReader) -> list[int]:
    return [frame_number(sample.image) for sample in reader]


def sound(path: Path, window: Window | None = None) -> Waveform:
    clip = probe(path)
    wave = SoundReader(clip, window or plan_window(clip, None, None, 60)[0]).read()
    assert wave is not None
    return wave


def level(wave: Waveform) -> float:
    middle = wave.samples[len(wave.samples) // 4 : -len(wave.samples) // 4]
    return float(np.sqrt(np.mean(middle.astype(np.float64) ** 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return write_clip(folder / "plain.mp4")


@pytest.fixture(scope="module")
def film(folder: Path) -> Path:
    return two_hours(folder / "film.mp4")


# -- what it should do with good files ---------------------------------------------------------


def test_frames_are_those_a_player_shows_at_the_grid_times(plain: Path) -> None:
    reader = frames(plain)
    samples = list(reader)
    assert [frame_number(s.image) for s in samples] == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert [s.time for s in samples] == pytest.approx(np.arange(10) / 5)
    assert samples[0].image.shape == (SIZE[1], SIZE[0], 4)
    assert reader.warnings == []


def test_sound_is_16_khz_mono_and_as_loud_as_it_was(plain: Path) -> None:
    wave = sound(plain)
    original = tone(2.0, 16_000)
    assert wave.start == pytest.approx(0, abs=1e-3)
    assert len(wave.samples) == pytest.approx(32_000, abs=200)
    assert level(wave) == pytest.approx(np.sqrt(np.mean(original.astype(float) ** 2)), rel=0.03)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_comes_out_does_not_depend_on_threads(folder: Path, threads: int) -> None:
    path = folder / "wide.mp4"
    if not path.exists():
        write_clip(path, size=(1280, 720), seconds=1.0)
    ours = [s.image.tobytes() for s in frames(path, 10, threads=threads)]
    one = [s.image.tobytes() for s in frames(path, 10, threads=1)]
    assert ours == one


def test_frames_nobody_sees_are_not_decoded(folder: Path) -> None:
    path = write_clip(folder / "bframes.mp4", seconds=4.0)
    reader = frames(path, fps=2)
    assert numbers(reader) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert reader.stats["decoded"] < reader.stats["packets"] == 100


@pytest.mark.parametrize("fps", [1, 3, 7.5, 25, 50])
def test_any_sampling_rate(plain: Path, fps: float) -> None:
    reader = frames(plain, fps)
    grid = np.arange(round(2 * fps)) / fps
    assert numbers(reader) == [int(t * 25 + 1e-6) for t in grid]


# -- missing streams ---------------------------------------------------------------------------


def test_no_sound(folder: Path) -> None:
    path = write_clip(folder / "silent.mp4", audio=None)
    clip = probe(path)
    assert clip.audio is None
    assert SoundReader(clip, Window(0, 2, False)).read() is None
    assert len(numbers(frames(path))) == 10


@pytest.mark.parametrize(
    ("name", "codec"), [("v.wav", "pcm_s16le"), ("v.mp3", "libmp3lame"), ("v.flac", "flac")]
)
def test_no_picture(folder: Path, name: str, codec: str) -> None:
    path = write_clip(folder / name, video=None, audio=codec)
    assert probe(path).video is None
    assert list(frames(path)) == []
    assert len(sound(path).samples) == pytest.approx(32_000, abs=1000)


# -- not clips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"just some text\n" * 50, np.random.default_rng(1).bytes(20_000), b"\0" * 999]
)
def test_bytes_that_are_no_clip_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.mp4 is not a clip"):
        probe(path)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.binary(max_size=600),
    head=st.sampled_from([b"", b"RIFF", b"\x1aE\xdf\xa3", b"ftypmp42"]),
)
def test_random_bytes_never_do_worse_than_a_media_error(
    tmp_path: Path, data: bytes, head: bytes
) -> None:
    path = tmp_path / "random.bin"
    path.write_bytes(head + data)
    try:
        clip = probe(path)
    except MediaError:
        return
    list(frames(path, 5, Window(0, 5, False)))
    SoundReader(clip, Window(0, 5, False)).read()


def test_a_clip_cut_before_its_index(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    with pytest.raises(MediaError, match="cut off before its index"):
        probe(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="No such file"):
        probe(tmp_path / "nothing.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        probe(tmp_path)
    with pytest.raises(MediaError, match="null"):
        probe("a\0b.mp4")


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe.mp4"
    os.mkfifo(path)
    with pytest.raises(MediaError, match="pipe or device"):
        probe(path)
    with pytest.raises(MediaError, match="pipe or device"):
        probe("/dev/zero")


@pytest.mark.parametrize("codec", ["png", "mjpeg"])
def test_a_still_image_is_refused(tmp_path: Path, codec: str) -> None:
    from PIL import Image

    path = tmp_path / ("photo.png" if codec == "png" else "photo.jpg")
    Image.fromarray(numbered_frame(3)).save(path)
    with pytest.raises(MediaError, match="still image"):
        probe(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile '{target}'\n"),
        (
            "list.sdp",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        ),
    ],
)
def test_playlists_do_not_lead_to_other_files(
    plain: Path, tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text.format(target=plain))
    with pytest.raises(MediaError):
        probe(path)


# -- damage ------------------------------------------------------------------------------------


def test_truncated_after_the_index_keeps_what_there_is(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", seconds=8.0, options={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    clip = probe(path)
    assert clip.duration == pytest.approx(8.0, abs=0.1)
    reader = frames(path)
    seen = numbers(reader)
    assert 0 < len(seen) < 25
    assert seen == [5 * i for i in range(len(seen))]
    assert reader.stats["end"] < 5
    assert 0 < sound(path).end < 5


@pytest.mark.parametrize("name", ["noise.mp4", "noise.mkv", "noise.ts"])
def test_corrupted_bytes_keep_the_prefix_and_say_so(tmp_path: Path, name: str) -> None:
    path = write_clip(tmp_path / name, seconds=4.0)
    corrupt(path, begin=0.4, end=0.9)
    reader = frames(path)
    seen = numbers(reader)
    wave = sound(path)
    assert seen[:4] in ([0, 5, 10, 15], [4, 9, 14, 19])
    assert len(wave.samples) > 16_000
    assert any("damaged" in w or "breaks off" in w for w in [*reader.warnings, *wave.warnings])


# -- clocks ------------------------------------------------------------------------------------


def test_variable_frame_rate_is_sampled_by_time(folder: Path) -> None:
    times = [0, 0.04, 0.08, 0.5, 0.54, 1.2, 1.24, 1.28, 1.9]
    path = write_clip(folder / "vfr.mp4", frame_times=times)
    grid = np.arange(10) / 5
    shown = [int(np.searchsorted(times, t + 1e-6, side="right")) - 1 for t in grid]
    assert numbers(frames(path)) == shown


@pytest.mark.parametrize("name", ["late.mkv", "late.mp4"])
def test_late_sound_stays_late(folder: Path, name: str) -> None:
    path = write_clip(folder / name, audio_start=0.7)
    wave = sound(path)
    assert wave.start == pytest.approx(0.7, abs=0.03)
    assert numbers(frames(path))[:3] == [0, 5, 10]


def test_late_picture_stays_late(folder: Path) -> None:
    path = write_clip(folder / "latepicture.mkv", video_start=0.5, seconds=2.0)
    samples = list(frames(path))
    assert samples[0].time == pytest.approx(0.6)
    # The frame shown at 0.6 s is the one painted for 0.1 s.
    assert frame_number(samples[0].image) == 2
    assert sound(path).start == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("name", "first"), [("offset.ts", 4), ("offset.mkv", 0)])
def test_a_clip_whose_clock_does_not_start_at_zero(folder: Path, name: str, first: int) -> None:
    path = write_clip(folder / name, video_start=100.0, audio_start=100.0)
    # MPEG-TS keeps the encoder's delay: the sound, and with it time 0, starts 23 ms early there,
    # so at 0.2 s the frame painted for 0.16 s is still shown.
    assert numbers(frames(path)) == list(range(first, 50, 5))
    wave = sound(path)
    assert wave.start == pytest.approx(0, abs=0.05)
    assert wave.end == pytest.approx(2, abs=0.1)


def test_gaps_in_the_sound_become_silence(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    wave = tone(1.0, 16_000)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for begin in (0, 32_000):
            frame = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, begin
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    read = sound(path)
    assert read.end == pytest.approx(3.0, abs=0.01)
    assert np.abs(read.samples[17_000:31_000]).max() == 0
    assert np.abs(read.samples[33_000:47_000].astype(int) - wave[1_000:15_000]).max() <= 2


def test_frame_counts_of_containers_are_not_trusted(folder: Path) -> None:
    path = write_clip(
        folder / "clip.webm", video="libvpx", audio="libopus", rate=48_000, format="webm"
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(frames(path)) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert len(sound(path).samples) == pytest.approx(32_000, abs=700)


# -- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phone_held_sideways_is_turned_upright(tmp_path: Path, degrees: int) -> None:
    path = write_clip(tmp_path / "phone.mp4", audio=None)
    flat = [s.image for s in frames(path)]
    rotate_mp4(path, degrees)
    turned = [s.image for s in frames(path)]
    # A player turns the picture clockwise by `degrees`.
    assert np.array_equal(turned[3], np.rot90(flat[3], -degrees // 90))
    assert turned[3].flags.c_contiguous


def test_cover_art_is_no_moving_picture(folder: Path) -> None:
    path = folder / "cover.mp3"
    with av.open(str(path), "w") as out:
        sound_stream = out.add_stream("libmp3lame", rate=16_000, layout="mono")
        cover = out.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 160, 160, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered_frame(1, (160, 160)), "rgb24")
        out.mux(cover.encode(picture.reformat(format="yuvj420p")))
        out.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(2.0, 16_000)[None], "s16", "mono")
        frame.sample_rate, frame.pts = 16_000, 0
        out.mux(sound_stream.encode(frame))
        out.mux(sound_stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    clip = probe(path)
    assert clip.video is None
    assert clip.audio is not None


def test_large_pictures_are_scaled_while_they_are_converted(folder: Path) -> None:
    path = write_clip(
        folder / "uhd.mp4", size=(3840, 2160), seconds=0.08, pix_fmt="yuv420p10le", audio=None
    )
    (sample,) = frames(path)
    assert sample.image.shape == (360, 640, 4)
    assert frame_number(sample.image) == 0


def test_pixels_that_are_not_square_are_stretched(folder: Path) -> None:
    path = folder / "anamorphic.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 180, 144, "yuv420p"
        stream.codec_context.sample_aspect_ratio = (
            av.video.stream.Fraction(4, 3)
            if hasattr(av.video.stream, "Fraction")
            else __import__("fractions").Fraction(4, 3)
        )
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, (180, 144)), "rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    sample = next(iter(frames(path)))
    assert sample.image.shape == (144, 240, 4)


@pytest.mark.parametrize(
    ("name", "codec", "message"),
    [
        ("huge.mp4", "libx264", "16384x2176, over the limit of 35 million pixels"),
        ("huge.mkv", "mjpeg", "over 35 million pixels"),
    ],
)
def test_pictures_over_the_limit_are_refused_by_name(
    tmp_path: Path, name: str, codec: str, message: str
) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            codec, rate=25, options={"preset": "ultrafast"} if codec == "libx264" else {}
        )
        stream.width, stream.height = 16_384, 2_176
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frame = av.VideoFrame(stream.width, stream.height, stream.pix_fmt)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(MediaError, match=message):
        probe(path)


# -- sound -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("5.1.mp4", "aac", 48_000, "5.1"),
        ("8k.mkv", "pcm_s16le", 8_000, "mono"),
        ("96k.mkv", "flac", 96_000, "stereo"),
        ("Grüße 你好 😀.mp4", "aac", 44_100, "mono"),
        ("%d it's: odd?.mp4", "aac", 22_050, "mono"),
    ],
)
def test_any_layout_rate_and_name(
    folder: Path, name: str, codec: str, rate: int, layout: str
) -> None:
    path = write_clip(folder / name, audio=codec, rate=rate, layout=layout)
    assert len(sound(path).samples) == pytest.approx(32_000, abs=300)
    assert len(numbers(frames(path))) == 10


@pytest.mark.parametrize(
    ("codec", "suffix"), [("pcm_s16le", "wav"), ("pcm_f32le", "wav"), ("aac", "mp4")]
)
def test_stereo_is_as_loud_as_mono(folder: Path, codec: str, suffix: str) -> None:
    levels = []
    for layout in ("mono", "stereo"):
        path = folder / f"{codec}-{layout}.{suffix}"
        write_clip(path, video=None, audio=codec, rate=16_000, layout=layout)
        levels.append(level(sound(path)))
    assert levels[1] == pytest.approx(levels[0], rel=0.02)


# -- windows -----------------------------------------------------------------------------------


def test_a_window_in_two_hours_is_found_without_reading_them(film: Path) -> None:
    clip = probe(film)
    window, said = plan_window(clip, 3600.0, 3604.0, 60.0)
    assert said == ()
    reader = FrameReader(clip, window, 5)
    samples = list(reader)
    assert [s.time for s in samples] == pytest.approx(list(3600 + np.arange(20) / 5))
    # Each turn of the film lasts 1.024 s and holds frames 0 to 24, 40 ms each.
    expected = [min(24, int((t % 1.024) / 0.04 + 1e-6)) for t in 3600 + np.arange(20) / 5]
    assert [frame_number(s.image) for s in samples] == pytest.approx(expected, abs=1)
    assert reader.stats["packets"] < 200
    wave = SoundReader(clip, window).read()
    assert wave is not None
    assert (wave.start, wave.end) == pytest.approx((3600, 3604), abs=0.01)


def test_the_limit_on_length_is_said_when_it_cuts(film: Path) -> None:
    clip = probe(film)
    window, said = plan_window(clip, None, None, 60.0)
    assert window == Window(0.0, 60.0, True)
    assert "only 60 s from 0 s on were read" in said[0]
    assert "--max-seconds" in said[0]
    assert plan_window(clip, 10.0, 12.0, 60.0) == (Window(10.0, 12.0, False), ())
    assert plan_window(clip, None, None, None)[0].end == clip.duration


def test_a_limit_over_a_clip_of_unknown_length_is_said_too(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "live.mkv", options={"live": "1"}, seconds=3.0)
    clip = probe(path)
    assert clip.duration is None
    window, said = plan_window(clip, None, None, 1.0)
    assert said == ()
    reader = FrameReader(clip, window, 5)
    assert len(list(reader)) == 5
    assert any("--max-seconds" in w for w in reader.warnings)


@pytest.mark.parametrize(
    ("start", "end"), [(-1.0, None), (2.5, None), (1.0, 1.0), (1.5, 0.5), (float("nan"), None)]
)
def test_windows_that_make_no_sense(plain: Path, start: float, end: float | None) -> None:
    with pytest.raises(UsageError):
        plan_window(probe(plain), start, end, 60.0)


def test_a_window_takes_the_same_frames_as_the_whole(plain: Path) -> None:
    whole = list(frames(plain))
    part = list(frames(plain, window=Window(0.8, 1.6, False)))
    assert [s.time for s in part] == pytest.approx([0.8, 1.0, 1.2, 1.4])
    assert [s.image.tobytes() for s in part] == [s.image.tobytes() for s in whole[4:8]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("w.wav", {"video": None, "audio": "pcm_s16le"}),
        ("w.mp3", {"video": None, "audio": "libmp3lame"}),
        ("w.mkv", {}),
        ("w.ts", {}),
    ],
)
def test_sound_in_a_window_lies_where_it_lies_in_the_whole(
    folder: Path, name: str, options: dict[str, Any]
) -> None:
    seconds = np.arange(6 * 44_100) / 44_100
    glide = (8000 * np.sin(2 * np.pi * (100 * seconds + 40 * seconds**2))).astype(np.int16)
    path = write_clip(folder / name, seconds=6.0, samples=glide, **options)
    whole, part = sound(path, Window(0, 9, False)), sound(path, Window(3, 4, False))
    assert (part.start, part.end) == pytest.approx((3, 4), abs=1e-3)
    offset = round((part.start - whole.start) * 16_000)
    errors = {
        shift: np.abs(
            whole.samples[offset + shift + 500 : offset + shift + 15_000].astype(int)
            - part.samples[500:15_000]
        ).mean()
        for shift in range(-40, 41)
    }
    # Within a millisecond: containers round their timestamps.
    assert abs(min(errors, key=errors.__getitem__)) <= 16


def test_a_jump_of_the_clock_does_not_make_a_million_rows(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "jump.mkv", frame_times=[0, 0.04, 500_000.0], audio=None)
    reader = frames(path, fps=1, window=Window(0, float("inf"), False))
    assert 60 <= len(list(reader)) <= 62


@pytest.mark.parametrize("fps", [0, -1, 1000, float("nan")])
def test_sampling_rates_that_make_no_sense(plain: Path, fps: float) -> None:
    with pytest.raises(UsageError, match="--fps"):
        frames(plain, fps)
