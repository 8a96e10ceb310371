"""Frames are those that a player shows, at the times at which it shows them, or the clip is bad: containers, damage, limits, images."""
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import BASE, SPANS, Recipe, check, judge, number, picture, plain_decode, variants, write, x264
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated_clips import read_mutated
from PIL import Image, ImageCms

from deepvideo_r1.core import Sample
from deepvideo_r1.data.check import check_dataset
from deepvideo_r1.data.clip_cache import ClipCache, file_identity
from deepvideo_r1.data.frames import pick_evenly, pick_in_time
from deepvideo_r1.data.guarded import ReaderProcess, read_video_safely
from deepvideo_r1.data.images import read_image
from deepvideo_r1.data.video import VideoError, choose_frames, read_video
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.prompt import load_processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    "A clip of H.264 in MP4, 90 frames with B-frames."
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", Recipe("mp4", "libx264", options=x264(bframes=2)))


@pytest.fixture
def processor(tiny_model):
    return load_processor(tiny_model)


def a_question(**visuals) -> Sample:
    return Sample(id="q", question="?", answer="1", kind="number", **visuals)


# --- containers and codecs ----------------------------------------------------------------------------------------


def test_every_reader_gives_the_frames_of_a_plain_decode(tmp_path):
    "A sample: each container and codec once, in turn whole and cut, at a constant and a variable rate."
    kinds = [("constant", False), ("variable", False), ("constant", True), ("variable", True)]
    sample = [r for i, base in enumerate(BASE) for r in variants() if (r.rate, r.is_cut) == kinds[i % 4]
              and (r.ending, r.codec, r.note) == (base.ending, base.codec, base.note) and r.codec != "libsvtav1"]
    counts, wrong = check(sample, tmp_path)
    assert wrong == {} and counts["decord", "wrong"] == 0
    assert counts["clips", "written"] >= 50 and counts["auto", "right"] > 190 and counts["decord", "right"] > 40
    assert len({r.ending for r in sample}) >= 12 and len({r.codec for r in sample}) >= 12


@pytest.mark.slow
def test_every_reader_on_all_clips(tmp_path):
    counts, wrong = check(variants(), tmp_path)
    print(dict(counts))
    assert wrong == {} and counts["clips", "written"] > 250 and counts["auto", "right"] > 1000


@pytest.mark.parametrize("ending, codec", [("ts", "libx264"), ("ts", "mpeg2video"), ("mpg", "mpeg2video")])
def test_a_recording_that_begins_and_ends_in_the_middle_of_a_group(tmp_path, ending, codec):
    path = write(tmp_path / f"a.{ending}", Recipe(ending, codec, options={"g": "12", "bf": "2"}))
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 5 // 188 * 188 : len(content) * 4 // 5])
    truth = plain_decode(path)
    assert 30 < len(truth[0]) < 70 and judge(path, truth, "auto") == "right"
    path.write_bytes(content * 2)  # two recordings in one file: time begins anew
    with pytest.raises(VideoError, match="the times of its frames do not rise: frame 90"):
        read_video(path, pick=lambda times: np.arange(len(times)))


@pytest.mark.parametrize("ending, codec, options", [
    ("mp4", "mpeg4", {"g": "12"}), ("mp4", "libx264", x264(bframes=2)), ("mov", "mpeg2video", {"g": "12"}), ("avi", "wmv2", {"g": "12"}),
    ("mp4", "libx265", {"x265-params": "keyint=24:bframes=0:log-level=none"}), ("avi", "msmpeg4", {"g": "12"})])
def test_a_container_that_calls_every_packet_a_keyframe(tmp_path, ending, codec, options):
    path = write(tmp_path / f"a.{ending}", Recipe(ending, codec, options=options))
    content = bytearray(path.read_bytes())
    if ending == "avi":
        place = content.index(b"idx1") + 8
        for entry in range(place, place + int.from_bytes(content[place - 4 : place], "little"), 16):
            content[entry + 4] |= 0x10
    else:
        content[content.index(b"stss") : content.index(b"stss") + 4] = b"free"
    path.write_bytes(content)
    truth = plain_decode(path)
    for span in SPANS:
        assert judge(path, truth, "auto", **span) == "right"
        assert judge(path, truth, "decord", **span) in ("right", "refused")


def test_times_count_from_the_start_of_the_file(tmp_path):
    "The first picture is at 0, but for a sound that begins before it."
    for ending in ("ts", "mpg", "flv", "mp4"):
        path = write(tmp_path / f"a.{ending}", Recipe(ending, "mpeg2video" if ending == "mpg" else "libx264", options={"bf": "2"}))
        times = read_video(path, fps=25.0, max_frames=100).timestamps
        np.testing.assert_allclose(times, np.arange(90) / 25, atol=2e-3)
    recipe = Recipe("mp4", "libx264", options=x264(bframes=2), sound=True)
    times = read_video(write(tmp_path / "sound.mp4", recipe), fps=25.0, max_frames=100).timestamps
    np.testing.assert_allclose(times, np.arange(90) / 25, atol=1e-6)


def with_matrix(path: Path, values: list[int]) -> Path:
    "The clip with another display matrix in its track header."
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", *(value << (30 if i % 3 == 2 else 16) for i, value in enumerate(values)))
    turned = path.with_name("turned.mp4")
    turned.write_bytes(content)
    return turned


@pytest.mark.parametrize("matrix, shown", [
    ([1, 0, 0, 0, 1, 0, 0, 0, 1], lambda x: x), ([0, 1, 0, -1, 0, 0, 0, 0, 1], lambda x: np.rot90(x, -1)),
    ([-1, 0, 0, 0, -1, 0, 0, 0, 1], lambda x: np.rot90(x, 2)), ([0, -1, 0, 1, 0, 0, 0, 0, 1], lambda x: np.rot90(x)),
    ([-1, 0, 0, 0, 1, 0, 0, 0, 1], lambda x: x[:, ::-1]), ([1, 0, 0, 0, -1, 0, 0, 0, 1], lambda x: x[::-1]),
    ([0, 1, 0, 1, 0, 0, 0, 0, 1], lambda x: x.transpose(1, 0, 2)),
    ([0, -1, 0, -1, 0, 0, 0, 0, 1], lambda x: np.rot90(x, 2).transpose(1, 0, 2))])
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, matrix, shown):
    path = tmp_path / "corner.mp4"
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:16, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path = with_matrix(path, matrix)
    for decoder in ("auto", "decord"):
        try:
            seen = read_video(path, decoder=decoder).frames[0].permute(1, 2, 0).numpy()
        except VideoError as error:  # decord turns and does not mirror
            assert decoder == "decord" and "mirrored" in str(error)
            continue
        expected = shown(frame)
        assert seen.shape == expected.shape and np.abs(seen.astype(int) - expected).mean() < 3


# --- frames in time -----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(gaps=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=150), share=st.floats(0, 1))
def test_frames_are_spread_over_time(gaps, share):
    times = np.cumsum([0.0, *gaps])
    count = max(2, round(share * len(times)))
    index = pick_in_time(times, count)
    assert len(index) == count and (np.diff(index) > 0).all() and (index[0], index[-1]) == (0, len(times) - 1)
    # Each target has a chosen frame next to it that is as near as any frame, or within a quarter of a frame of that.
    for target in np.linspace(0, times[-1], count):
        nearest = np.abs(times - target).min()
        assert np.abs(times[index] - target).min() <= nearest + times[-1] / (len(times) - 1) + 1e-9


@settings(max_examples=300, deadline=None)
@given(n=st.integers(1, 2000), rate=st.floats(1, 240), share=st.floats(0, 1), start=st.floats(0, 1e5),
       unit=st.sampled_from([0, 1 / 90_000, 1e-3]))
def test_a_constant_rate_keeps_its_indices(n, rate, share, start, unit):
    times = start + np.arange(n) / rate
    times = np.round(times / unit) * unit if unit else times
    count = max(1, int(n * share))
    assert pick_in_time(times, count).tolist() == pick_evenly(n, count).tolist()


def test_slow_and_fast_parts_get_their_share_of_frames():
    times = np.concatenate([np.arange(50), 50 + np.arange(300) / 30])
    chosen = times[choose_frames(times, fps=2.0, max_frames=16)]
    assert (chosen < 50).sum() == 13
    np.testing.assert_allclose(chosen, np.linspace(0, times[-1], 16), atol=0.5)
    slides = np.concatenate([[0.0, 30.0], 60 + np.arange(100) / 25])  # fewer frames than targets before second 60
    chosen = slides[choose_frames(slides, fps=2.0, max_frames=12)]
    assert len(chosen) == 12 and chosen[:3].tolist() == [0, 30, 60] and np.diff(chosen[2:]).max() < 0.8


# --- what may be opened -------------------------------------------------------------------------------------------


def special_files(folder: Path) -> list[Path]:
    "A pipe, a socket, a device and two links to such."
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.mp4"))
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "link.mp4").symlink_to(folder / "pipe.mp4")
    return [folder / name for name in ("pipe.mp4", "socket.mp4", "zero.mp4", "link.mp4")]


def test_only_regular_files_are_opened(tmp_path, processor):
    started = time.perf_counter()
    for path in special_files(tmp_path):
        for read in (read_video, read_image):
            with pytest.raises(VideoError, match="not a regular file|cannot be opened"):
                read(path)
        for sample in (a_question(video=str(path)), a_question(images=(str(path),))):
            for load in (load_visuals, ClipCache(tmp_path / "cache").load):
                with pytest.raises(VideoError, match=path.name):
                    load(sample, processor)
        with pytest.raises(OSError):
            file_identity(path)
    (tmp_path / "stills").mkdir()
    os.mkfifo(tmp_path / "stills/frame_0.png")
    with pytest.raises(VideoError, match="frame_0.png: not a regular file"):
        read_video(tmp_path / "stills")
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("name", ["2022-01-26T20:57:04Z.mp4", "http:/a.mp4", "concat:a|b", "pipe:0", "data:video", "file:x.mp4",
                                  "50%d.mp4", "-i.mp4", " a b.mp4", "\u732b \u00e9.mp4", "a\nb.mp4", "subfile,,start,0,end,9,,:a"])
def test_no_name_is_taken_for_a_protocol(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="no such file"):
        read_video(name)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(clip.read_bytes())
    direct = read_video(clip, max_frames=4)
    for read in (read_video, read_video_safely):
        assert torch.equal(read(name, max_frames=4).frames, direct.frames)


@pytest.mark.parametrize("content", [
    "ffconcat version 1.0\nfile clip.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclip.mp4\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXTINF:4,\nhttp://localhost:1/clip.ts\n", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"])
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "sdp"])
def test_a_playlist_opens_nothing(tmp_path, clip, content, ending):
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / f"list.{ending}").write_text(content)
    with pytest.raises(VideoError, match=f"list.{ending}"):
        read_video_safely(tmp_path / f"list.{ending}", timeout=20)


@pytest.mark.parametrize("name", ["a\0b.mp4", "x" * 300 + ".mp4", "clip.mp4/inside", ""])
def test_names_that_no_file_can_have(tmp_path, clip, name):
    for read in (read_video, read_image):
        with pytest.raises(VideoError):
            read(str(clip.parent / name) if name else name)


# --- damage, limits and codecs ------------------------------------------------------------------------------------


def test_a_few_hundred_mutated_clips(tmp_path):
    outcomes = read_mutated(300, tmp_path)
    assert outcomes.total() == 300 and outcomes["read"] > 50 and outcomes["refused"] > 50
    assert outcomes["took too long"] == 0


@pytest.mark.slow
def test_forty_thousand_mutated_clips(tmp_path):
    outcomes = read_mutated(40_000, tmp_path)
    print(dict(outcomes))
    assert outcomes.total() == 40_000


def test_a_file_on_which_decord_ends_the_process_is_a_bad_clip(tiny_world, tmp_path, processor):
    content = bytearray(next((tiny_world / "videos").glob("*.mp4")).read_bytes())
    content[content.index(b"stts") + 11] = 0x11
    path = tmp_path / "aborts.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="aborts.mp4"):
        load_visuals(a_question(video=str(path)), processor)
    with pytest.raises(VideoError, match="aborts.mp4"):
        read_video_safely(path, decoder="decord")


@pytest.mark.parametrize("codec", [b"zzzz", b"av01", b"vvc1"])
def test_a_codec_without_a_decoder_is_named(tmp_path, clip, codec):
    path = tmp_path / "codec.mp4"
    path.write_bytes(clip.read_bytes().replace(b"avc1", codec))
    for decoder in ("auto", "decord", "pyav"):
        with pytest.raises(VideoError, match="codec.mp4"):
            read_video_safely(path, decoder=decoder)


def test_a_cover_picture_is_no_video(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.png")
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        try:
            cover.disposition = av.stream.Disposition.attached_pic
        except (AttributeError, TypeError):
            pytest.skip("this PyAV cannot mark a cover")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_video(tmp_path / "song.mp4")


def claiming(path: Path, source: Path, n_frames: int) -> Path:
    "The clip with an index that claims so many frames of 8 bytes."
    content = bytearray(source.read_bytes())
    for box, values in ((b"stts", [1, n_frames, 512]), (b"stsz", [8, n_frames]), (b"stsc", [1, 1, n_frames, 1])):
        place = content.index(box) + 8
        content[place : place + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    content[content.index(b"ctts") : content.index(b"ctts") + 4] = b"free"
    content[content.index(b"stss") : content.index(b"stss") + 4] = b"free"
    path.write_bytes(content)
    return path


def test_a_file_that_claims_ten_million_frames(tmp_path, clip, processor):
    path, started = claiming(tmp_path / "claims.mp4", clip, 10_000_000), time.perf_counter()
    with pytest.raises(VideoError, match="claims.mp4: it claims 10,000,000 frames"):
        load_visuals(a_question(video=str(path)), processor)
    with pytest.raises(VideoError, match="claims.mp4"):
        read_video_safely(claiming(path, clip, 3_000_000))
    assert time.perf_counter() - started < 60


def giant_gif(path: Path, side: int) -> Path:
    "A GIF of a few bytes with a canvas of side x side pixels."
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<2H", side, side)
    path.write_bytes(content)
    return path


def test_a_gif_of_a_few_bytes_that_unpacks_to_gigabytes(tmp_path, processor):
    path = giant_gif(tmp_path / "giant.gif", 41_000)
    for sample in (a_question(video=str(path)), a_question(images=(str(path),))):
        with pytest.raises(VideoError, match="giant.gif: .* pixels"):
            load_visuals(sample, processor)


def film(path: Path, width: int, height: int, n_frames: int, codec: str = "libx264") -> Path:
    "A texture that moves."
    ground = np.random.default_rng(0).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    ground = ground.repeat(16, 0).repeat(16, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"preset": "ultrafast", "g": "25"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(n_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(ground, 16 * i, 1), format="rgb24")))
        container.mux(stream.encode())
    return path


MEMORY = """
import resource, sys
import torch
from deepvideo_r1.data.video import read_video
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = read_video(sys.argv[1], max_frames=64, fps=1000.0, max_pixels=252 * 252)
print(len(clip.frames), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - clip.frames.nbytes)
"""


@pytest.mark.parametrize("width, height, n_frames, most", [(3840, 2160, 32, 400e6), (7680, 4320, 3, 1200e6)])
def test_memory_stays_small_for_large_frames(tmp_path, width, height, n_frames, most):
    path = film(tmp_path / "large.mp4", width, height, n_frames)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, timeout=300)
    read, above = map(int, done.stdout.split())
    assert read == n_frames and above < most, f"{above / 1e6:.0f} MB above the clip"


def test_a_read_that_takes_too_much_memory_is_a_bad_clip(tmp_path, clip):
    path = film(tmp_path / "large.mp4", 3840, 2160, 8)
    with ReaderProcess(memory_limit=100 * 10**6) as reader:
        for _ in range(2):
            with pytest.raises(VideoError, match=r"large.mp4: .*\(limit 0.1 GB\)"):
                reader.read(path, fps=25.0, max_pixels=28 * 28)
            assert len(reader.read(clip, max_frames=4).frames) == 4  # and the next one is read


def late_crash(path):
    "Crashes where another file was read before, as a decoder does that an earlier file has damaged."
    global was_called
    if globals().get("was_called"):
        os.abort()
    was_called = True
    return read_video(path, max_frames=2)


def test_a_file_is_blamed_only_when_a_fresh_process_fails_on_it(clip):
    with ReaderProcess() as reader:
        for _ in range(3):
            assert len(reader.read(clip, read=late_crash).frames) == 2


def test_large_clips_come_back_whole(tmp_path):
    path = film(tmp_path / "hd.mp4", 1280, 720, 40)
    direct = read_video(path, fps=25.0, max_frames=40)
    apart = read_video_safely(path, fps=25.0, max_frames=40)
    assert apart.frames.shape == (40, 3, 720, 1280) and torch.equal(apart.frames, direct.frames)


LEFT_ALONE = """
import os, signal, sys, time
from deepvideo_r1.data.guarded import ReaderProcess
reader = ReaderProcess()
reader.read(sys.argv[1], max_frames=2)
print(reader.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_reading_process_goes_with_a_killed_parent(clip):
    done = subprocess.run([sys.executable, "-c", LEFT_ALONE, str(clip)], capture_output=True, text=True, timeout=120)
    pid, deadline = int(done.stdout), time.perf_counter() + 5
    while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z":
        assert time.perf_counter() < deadline, "the reading process still runs"
        time.sleep(0.05)


def test_a_ctrl_c_reaches_the_parent_alone(clip):
    with ReaderProcess() as reader:
        reader.read(clip, max_frames=2)
        pid = reader.process.pid
        assert os.getpgid(pid) != os.getpgid(0) and os.getsid(pid) == pid
        assert not (set(os.listdir(f"/proc/{pid}/fd")) - set("0123456789")) or len(os.listdir(f"/proc/{pid}/fd")) < 12


def test_damaged_clips_are_told_by_data_check(tmp_path, clip):
    import json

    content = clip.read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    special_files(tmp_path)
    giant_gif(tmp_path / "giant.gif", 41_000)
    names = ["half.mp4", "pipe.mp4", "giant.gif", "absent.mp4"]
    one = write(tmp_path / "one.mp4", Recipe("mp4", "libx264", n_frames=1))
    rows = [{"id": name, "video": name, "question": "?", "kind": "number", "answer": 1} for name in [*names, "one.mp4"]]
    Image.new("L", (300, 1)).save(tmp_path / "line.png")
    rows.append({"id": "line", "images": ["line.png"], "question": "?", "kind": "number", "answer": 1})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check_dataset(tmp_path / "rows.jsonl", timeout=20)
    assert {Path(path).name for path in report["bad"]} == {*names, "line.png"}
    assert report["seconds"] == [0.0] and report["frames"] == [1] and one.exists()


# --- images -------------------------------------------------------------------------------------------------------


def saved(folder: Path, image: Image.Image, ending: str = "png", **options) -> torch.Tensor:
    path = folder / f"image.{ending}"
    image.save(path, **options)
    return read_image(path).frames[0]


def drawing(mode: str) -> Image.Image:
    "A black square on a transparent ground."
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    return image.convert(mode)


@pytest.mark.parametrize("mode, ending", [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("RGBA", "tga"), ("RGBA", "gif")])
def test_transparent_images_are_on_white(tmp_path, mode, ending):
    frame = saved(tmp_path, drawing(mode), ending, **({"lossless": True} if ending == "webp" else {}))
    assert frame[:, 0, 0].tolist() == [255] * 3 and frame[:, 8, 8].tolist() == [0] * 3


def test_a_transparent_colour_of_a_palette_or_of_a_plain_image_is_white(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.paste(0, (0, 0, 4, 8))
    for ending in ("png", "gif"):
        frame = saved(tmp_path, palette, ending, transparency=0)
        assert frame[:, 0, 0].tolist() == [255] * 3 and frame[:, 0, 6].tolist() == [255, 0, 0]
    plain = Image.new("RGB", (8, 8), (10, 20, 30))
    plain.paste((1, 2, 3), (0, 0, 4, 8))
    frame = saved(tmp_path, plain, transparency=(1, 2, 3))
    assert frame[:, 0, 0].tolist() == [255] * 3 and frame[:, 0, 6].tolist() == [10, 20, 30]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    frame = saved(tmp_path, Image.new("RGBA", (4, 4), (0, 100, 200, 128)))
    expected = [round(c * 128 / 255 + 255 * 127 / 255) for c in (0, 100, 200)]
    assert max(abs(a - b) for a, b in zip(frame[:, 0, 0].tolist(), expected)) <= 1


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    frame = saved(tmp_path, Image.fromarray(ramp), ending)
    assert (frame[0].flatten().int() - torch.arange(256)).abs().max() <= 1 and torch.equal(frame[0], frame[2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_photos_are_turned_upright(tmp_path, orientation, ending):
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:20, :40], upright[:20, 40:], upright[20:, :40] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {1: upright, 2: upright[:, ::-1], 3: np.rot90(upright, 2), 4: upright[::-1], 5: upright.transpose(1, 0, 2),
              6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    frame = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), ending, exif=exif)
    assert frame.shape == (3, 40, 80)
    assert (frame.permute(1, 2, 0).int() - torch.from_numpy(upright).int()).abs().float().mean() < 6


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "P"])
def test_other_modes_become_three_colours(tmp_path, mode):
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    frame = saved(tmp_path, image if mode != "HSV" else image.convert("RGB"), "tif" if mode != "P" else "png")
    assert frame.shape == (3, 16, 16) and frame.min() >= 250


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_animated_images_are_refused_as_images(tmp_path, ending, processor):
    steps = [Image.fromarray(picture(i, 32)) for i in range(4)]
    path = tmp_path / f"film.{ending}"
    steps[0].save(path, save_all=True, append_images=steps[1:], duration=100)
    with pytest.raises(VideoError, match=f"film.{ending}: an animated .* image, or one of several pages"):
        load_visuals(a_question(images=(str(path),)), processor)
    if ending == "gif":
        assert len(read_video(path, fps=10.0).frames) == 4
    assert saved(tmp_path, steps[0], "gif").shape == (3, 32, 32)  # one picture is an image


def test_a_photo_with_its_preview_is_an_image(tmp_path):
    photo, preview = Image.new("RGB", (64, 64), (200, 0, 0)), Image.new("RGB", (8, 8))
    frame = saved(tmp_path, photo, "mpo", save_all=True, append_images=[preview])
    assert frame.shape == (3, 64, 64)


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1), (16, 4080), (4080, 16), (1, 28)])
def test_extreme_shapes_are_named(tmp_path, size, processor):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    with pytest.raises(VideoError, match=rf"thin.png: {size[0]} x {size[1]} pixels \(width x height\)"):
        load_visuals(a_question(images=(str(tmp_path / "thin.png"),)), processor)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (12_000, 12_000)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">2I", 100_000, 100_000)
    for claimed in (path.read_bytes(), bytes(content)):
        path.write_bytes(claimed)
        started = time.perf_counter()
        with pytest.raises(VideoError, match="huge.png"):
            read_image(path)
        assert time.perf_counter() - started < 20


def test_broken_images_are_named(tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    for i in range(300):
        content = bytearray(whole[: rng.integers(1, len(whole))] if i % 3 == 0 else whole)
        for place in rng.integers(len(content), size=4):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert read_image(path).frames.dtype == torch.uint8
        except VideoError as error:
            assert error.path == str(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start another program
    with pytest.raises(VideoError, match="not a readable image"):
        read_image(path)
