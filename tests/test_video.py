"""Real files through both readers, damaged ones, the patches of transformers' image processor, sizes and frames."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from deepvideo_r1.core import Clip
from deepvideo_r1.data.frames import count_by_fps, pick_by_fps, pick_evenly, pick_longvideobench
from deepvideo_r1.data.guarded import ReaderProcess, read_video_safely
from deepvideo_r1.data.video import (
    CLIP_STD, READERS, VideoError, choose_frames, frame_budget, patchify, read_image, read_video, smart_size,
)
from deepvideo_r1.toy.world import write_video

STEP = 1 / 255 / min(CLIP_STD)  # one step of an 8-bit pixel, after normalisation
FILES = {  # frames in the file, height, width, seconds from the first to the last
    "flipping_a_pancake.mkv": (310, 240, 426, 10.3),
    "h264_10bits.mp4": (30, 200, 200, 0.967),
    "h265_video.mp4": (10, 128, 128, 0.9),
    "nasa_13013.mp4": (390, 270, 480, 12.98),
    "unordered.mov": (4, 50, 50, 0.094),  # stored in another order than shown
    "video_0.mov": (3, 320, 568, 0.067),
    "video_90.mov": (3, 568, 320, 0.067),  # 568 x 320 with the note "turn by 90 degrees"
}


def decode_all(path) -> tuple[np.ndarray, np.ndarray]:
    "Every frame of a file without rotation, and its time, by a plain loop."
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.best("video")))
    frames.sort(key=lambda frame: frame.pts)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), np.array([frame.time for frame in frames])


def moving_square(n_frames=16, size=64) -> np.ndarray:
    frames = np.full((n_frames, size, size, 3), 90, np.uint8)
    for i in range(n_frames):
        frames[i, 24:40, 3 * i : 3 * i + 16] = (220, 40, 40)
    return frames


# --- files --------------------------------------------------------------------------------------------------------


def read(path, decoder, **choice):
    "The clip; decord may refuse h265_video.mp4, whose frames before a keyframe it would miscount."
    try:
        return read_video(path, decoder=decoder, **choice)
    except VideoError:
        assert (path.name, decoder) == ("h265_video.mp4", "decord")
        pytest.skip("decord refuses this file")


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("name", FILES)
def test_both_readers_give_the_same_frames(shared_dir, name, decoder):
    path, (n, height, width, seconds) = shared_dir / "videos" / name, FILES[name]
    clips = [read(path, d, fps=4, max_frames=12) for d in (decoder, "pyav")]
    for clip in clips:
        assert clip.frames.dtype == torch.uint8 and clip.frames.shape[1:] == (3, height, width)
        assert 1 <= len(clip.frames) <= min(n, 12) and len(clip.timestamps) == len(clip.frames)
        assert (clip.timestamps.diff() > 0).all()
        if len(clip.frames) > 1:
            assert clip.timestamps[-1] - clip.timestamps[0] == pytest.approx(seconds, abs=2e-3)
    assert torch.allclose(clips[0].timestamps, clips[1].timestamps, atol=1e-5)
    difference = (clips[0].frames.int() - clips[1].frames.int()).abs().float()
    if name != "h264_10bits.mp4":
        assert difference.max() == 0
    else:  # the two ffmpegs scale the colour planes of 10-bit video differently: edges differ, areas do not
        assert difference.mean() < 5 and difference.median() <= 1


@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "h265_video.mp4", "unordered.mov"])
@pytest.mark.parametrize("decoder", ["auto", *READERS])
def test_chosen_frames_are_those_of_a_full_decode(shared_dir, name, decoder):
    frames, times = decode_all(shared_dir / "videos" / name)
    assert len(frames) == FILES[name][0]
    for count in (4, 7):
        index = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
        clip = read(shared_dir / "videos" / name, decoder, fps=1000, max_frames=count)
        assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), frames[index])
        np.testing.assert_allclose(clip.timestamps.numpy(), times[index], atol=1e-5)


def numbered(n: int) -> np.ndarray:
    "Frames that carry their number as eight black or white stripes."
    bits = (np.arange(n)[:, None] >> np.arange(8)) & 1
    return np.broadcast_to((bits.repeat(16, 1) * 200 + 20)[:, None, :, None], (n, 128, 128, 3)).astype(np.uint8)


def write_encoded(path, codec: str, frames: np.ndarray, **options) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("open_gop", [0, 1])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_frames_shown_before_their_keyframe_are_counted(tmp_path, open_gop, decoder):
    path, count = tmp_path / "numbers.mp4", 16
    wanted = f"keyint=50:scenecut=0:bframes=3:b-adapt=0:open-gop={open_gop}"
    write_encoded(path, "libx264", numbered(250), **{"x264-params": wanted})
    with av.open(str(path)) as container:
        packets = [(p.is_keyframe, p.pts) for p in container.demux(video=0) if p.pts is not None]
    assert any(a[0] and b[1] < a[1] for a, b in pairwise(packets)) == bool(open_gop)
    clip = read_video(path, fps=100, max_frames=count, decoder=decoder)
    seen = (clip.frames[:, 0, 64, 8::16] > 120).int().numpy() @ (1 << np.arange(8))
    assert seen.tolist() == np.linspace(0, 249, count).round().astype(int).tolist()


def test_pyav_reads_what_decord_cannot(tmp_path):
    path, frames = tmp_path / "av1.mp4", moving_square()
    try:
        write_encoded(path, "libsvtav1", frames)
    except av.codec.codec.UnknownCodecError:
        pytest.skip("this PyAV cannot write AV1")
    with pytest.raises(VideoError, match="decord"):
        read_video(path, decoder="decord")
    clip = read_video(path, fps=8)
    assert (clip.frames.permute(0, 2, 3, 1).int() - torch.from_numpy(frames).int()).abs().float().mean() < 8


READ_ALL = """
import json, sys, time
from deepvideo_r1.data.video import VideoError, read_video
told = {}
for path in sys.argv[1:]:
    for decoder in ("auto", "decord", "pyav"):
        started = time.perf_counter()
        try:
            frames = len(read_video(path, decoder=decoder).frames)
            told[f"{path} {decoder}"] = ["frames", str(frames), 0]
        except Exception as error:
            told[f"{path} {decoder}"] = [type(error).__name__, str(error), time.perf_counter() - started]
print(json.dumps(told))
"""


def test_a_bad_file_is_named_at_once(tmp_path):
    write_video(tmp_path / "good.mp4", moving_square(64))
    good = (tmp_path / "good.mp4").read_bytes()
    data = good.index(b"mdat") + 4
    bad = {
        "empty.mp4": b"", "text.mp4": b"a film\n" * 500, "random.mp4": np.random.default_rng(0).bytes(20_000),
        "half.mp4": good[: len(good) // 2], "start.mp4": good[:200],
        "damaged.mp4": good[:data] + bytes(len(good) - data - 2000) + good[-2000:],  # an index, and no pictures
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "folder.mp4").mkdir()
    names = [*bad, "sound.mp4", "folder.mp4", "missing.mp4"]
    # In a process of its own, so that a reader that hangs fails the test and not the whole run.
    done = subprocess.run([sys.executable, "-c", READ_ALL, *[str(tmp_path / name) for name in names]],
                          capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert len(told) == 3 * len(names)
    for case, (kind, message, seconds) in told.items():
        path = case.rpartition(" ")[0]
        assert kind == "VideoError" and message.startswith(f"{path}: "), f"{case}: {kind} {message}"
        assert "\n" not in message
        assert seconds < 10, f"{case} took {seconds} seconds"
    assert done.stderr == ""  # the readers below print nothing of their own


@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav"])
@pytest.mark.parametrize("name", FILES)
def test_bytes_in_memory_give_the_frames_of_the_file(shared_dir, name, decoder):
    path = shared_dir / "videos" / name
    from_file = read(path, decoder, fps=4, max_frames=6, max_pixels=28 * 28 * 20)
    for content in (path.read_bytes(), memoryview(path.read_bytes())):
        from_bytes = read_video(content, decoder=decoder, fps=4, max_frames=6, max_pixels=28 * 28 * 20)
        assert torch.equal(from_bytes.frames, from_file.frames)
        assert torch.equal(from_bytes.timestamps, from_file.timestamps)


@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav"])
@pytest.mark.parametrize("content, message", [(b"", "0 bytes in memory: the file is empty"),
                                              (b"a film", "6 bytes in memory: ")])
def test_bad_bytes_are_named(content, message, decoder):
    with pytest.raises(VideoError, match=message):
        read_video(content, decoder=decoder)


# --- folders of frames --------------------------------------------------------------------------------------------


def write_folder(folder, n, *, size=(40, 60), ending=".png"):
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (n, *size, 3), np.uint8)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{i}{ending}")
    return frames


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    frames = write_folder(tmp_path / "stills", 12)
    (tmp_path / "stills" / "notes.txt").write_text("no frame")
    clip = read_video(tmp_path / "stills", fps=3, folder_fps=3.0)
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), frames)  # frame_2 before frame_10
    assert clip.timestamps.tolist() == pytest.approx([i / 3 for i in range(12)])
    some = read_video(tmp_path / "stills", fps=1, folder_fps=2.0, start=1, end=4.5, max_pixels=28 * 28)
    assert some.timestamps.tolist() == [1.0, 2.0, 3.5, 4.5] and some.frames.shape == (4, 3, 28, 28)
    for decoder in READERS:
        assert torch.equal(read_video(tmp_path / "stills", fps=3, decoder=decoder).frames, clip.frames)


def test_bad_folders_are_named(tmp_path):
    write_folder(tmp_path / "mixed", 2)
    Image.new("L", (10, 10)).save(tmp_path / "mixed" / "frame_2.png")
    write_folder(tmp_path / "broken", 2)
    (tmp_path / "broken" / "frame_1.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for name, message in (("mixed", "different sizes: 10 x 10, 40 x 60"),
                          ("broken", "frame_1.png: not a readable image"),
                          ("empty", "the folder holds no images")):
        with pytest.raises(VideoError, match=message):
            read_video(tmp_path / name, fps=3)
    with pytest.raises(ValueError, match="folder_fps must be above 0"):
        read_video(tmp_path / "mixed", folder_fps=0)


def test_grey_and_transparent_images_become_three_colours(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (30, 20)).save(tmp_path / f"{mode}.tif")
        assert read_image(tmp_path / f"{mode}.tif").frames.shape == (1, 3, 20, 30)


# --- a process that can be cut off --------------------------------------------------------------------------------


def hang(path, **settings):
    time.sleep(600)


def crash(path, **settings):
    os.kill(os.getpid(), signal.SIGSEGV)


def talk(path, **settings):
    print("a library that prints")
    return Clip(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8), torch.zeros(1))


def fail(path, **settings):
    raise KeyError("frames")


@pytest.fixture(scope="module")
def reader():
    with ReaderProcess() as process:
        yield process


def test_a_guarded_read_gives_the_same_clip(tmp_path, reader):
    write_video(tmp_path / "good.mp4", moving_square())
    direct = read_video(tmp_path / "good.mp4", fps=4, max_pixels=28 * 28)
    for read_it in (reader.read, read_video_safely):
        clip = read_it(tmp_path / "good.mp4", fps=4, max_pixels=28 * 28)
        assert torch.equal(clip.frames, direct.frames) and torch.equal(clip.timestamps, direct.timestamps)
    with pytest.raises(VideoError, match="no such file") as caught:
        reader.read(tmp_path / "absent.mp4")
    assert caught.value.path == str(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match="allowed are 'auto'"):
        reader.read(tmp_path / "good.mp4", decoder="ffmpeg")


def test_a_read_that_hangs_is_cut_off(tmp_path, reader):
    write_video(tmp_path / "good.mp4", moving_square())
    reader.read(tmp_path / "good.mp4")
    process, started = reader.process, time.perf_counter()
    with pytest.raises(VideoError, match="clip.mp4: reading took more than 0.5 seconds and was cut off"):
        reader.read("clip.mp4", timeout=0.5, read=hang)
    assert time.perf_counter() - started < 10 and process.poll() is not None  # and nothing of it is left
    assert len(reader.read(tmp_path / "good.mp4").frames) > 0


def test_a_read_that_crashes_is_an_error_of_its_file(tmp_path, reader):
    write_video(tmp_path / "good.mp4", moving_square())
    with pytest.raises(VideoError, match=r"clip.mp4: the reading process ended with code -11"):
        reader.read("clip.mp4", read=crash)
    with pytest.raises(VideoError, match="clip.mp4: KeyError 'frames'"):
        reader.read("clip.mp4", read=fail)
    assert reader.read("clip.mp4", read=talk).frames.unique().tolist() == [7]
    assert len(reader.read(tmp_path / "good.mp4").frames) > 0


LEAVE = """
import os, sys, time
from deepvideo_r1.data.guarded import ReaderProcess
import test_video
reader = ReaderProcess()
reader.read("clip.mp4", read=test_video.talk)
print(reader.process.pid, flush=True)
reader.connection.send((test_video.hang, "clip.mp4", {}, None, 600))
time.sleep(0.5)  # it has begun
os._exit(0)  # without saying goodbye
"""


def test_a_hanging_read_does_not_outlive_its_parent():
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pid, deadline = int(done.stdout), time.perf_counter() + 20
    while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z":
        assert time.perf_counter() < deadline, "the reading process still runs"
        time.sleep(0.1)


READ_MANY = """
import resource, sys
import torch
from deepvideo_r1.data.video import read_video
torch.set_num_threads(1)
decoder, *paths = sys.argv[1:]
sources = [open(path, "rb").read() if decoder == "bytes" else path for path in paths]
for i in range(2000):
    read_video(sources[i % 3], decoder="auto" if decoder == "bytes" else decoder, max_frames=4, max_pixels=28 * 28 * 4)
    if i in (399, 1999):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav", "bytes"])
def test_memory_stays_flat_over_two_thousand_reads(tmp_path, decoder):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", moving_square(16 + 8 * i, 96))
    done = subprocess.run([sys.executable, "-c", READ_MANY, decoder, *(str(tmp_path / f"{i}.mp4") for i in range(3))],
                          capture_output=True, text=True, timeout=1200)
    early, late = map(int, done.stdout.split())
    assert late - early < 20_000, f"{(late - early) // 1024} MiB more after 1600 reads"  # in KiB; a clip has 108


# --- patches ------------------------------------------------------------------------------------------------------


def reference(picture: torch.Tensor, **settings) -> tuple[torch.Tensor, list[int]]:
    found = Qwen2VLImageProcessorPil(**settings)(images=[picture.permute(1, 2, 0).numpy()], return_tensors="pt")
    return found["pixel_values"], found["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("size", [(28, 28), (56, 140), (252, 84)])
def test_patches_equal_those_of_transformers(size):
    picture = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected, grid = reference(picture, do_resize=False)
    patches, grid_thw = patchify(picture[None])
    assert grid_thw.tolist() == grid and torch.equal(patches, expected)


def test_patches_of_a_video_interleave_those_of_its_frames():
    frames = torch.randint(0, 256, (3, 3, 56, 84), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    single = [reference(frame, do_resize=False)[0].view(-1, 3, 2, 14, 14)[:, :, 0] for frame in frames]
    patches, grid_thw = patchify(frames)
    assert grid_thw.tolist() == [2, 4, 6]
    expected = [torch.stack([single[a], single[b]], 2) for a, b in ((0, 1), (2, 2))]  # the odd last frame twice
    assert torch.equal(patches, torch.cat(expected).flatten(1))


@pytest.mark.parametrize("size", [(240, 426), (100, 100), (57, 300), (20, 40), (1080, 720)])
def test_resized_patches_are_those_of_transformers_up_to_rounding(size):
    # PIL rounds and clips between its two passes, torch once at the end: up to 3 of 255 steps on smooth pictures.
    coarse = torch.rand(1, 3, size[0] // 8 + 1, size[1] // 8 + 1, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255).to(torch.uint8)
    bounds = dict(min_pixels=4 * 28 * 28, max_pixels=252 * 252)
    expected, grid = reference(smooth[0], **bounds)
    patches, grid_thw = patchify(smooth, **bounds)
    assert grid_thw.tolist() == grid
    assert (patches - expected).abs().max() <= 3.5 * STEP and (patches - expected).abs().mean() < 0.3 * STEP


# --- sizes and frames ---------------------------------------------------------------------------------------------

sides = st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(height=sides, width=sides, factor=st.sampled_from([14, 28, 32]), blocks=st.integers(1, 400))
def test_a_new_size_has_whole_blocks_and_keeps_the_budget(height, width, factor, blocks):
    assume(max(height, width) / min(height, width) <= 200)
    budget = blocks * factor**2
    small = smart_size(height, width, factor=factor, max_pixels=budget)
    large = smart_size(height, width, factor=factor, min_pixels=budget)
    for size in (small, large):
        assert all(side % factor == 0 and side >= factor for side in size)
    # One block is the least: only a strip one block wide can be longer than the budget.
    assert math.prod(small) <= budget or min(small) == factor
    assert math.prod(large) >= budget


@settings(max_examples=300, deadline=None)
@given(height=st.integers(28, 3000), width=st.integers(28, 3000), low=st.integers(1, 100), more=st.integers(0, 900))
def test_a_new_size_is_that_of_transformers(height, width, low, more):
    bounds = dict(factor=28, min_pixels=low * 28**2, max_pixels=(low + more) * 28**2)
    assert smart_size(height, width, **bounds) == smart_resize(height, width, **bounds)


@settings(max_examples=300, deadline=None)
@given(gaps=st.lists(st.floats(0.01, 2.0), max_size=200), fps=st.floats(0.1, 60), max_frames=st.integers(1, 40))
def test_chosen_frames_are_increasing_with_both_ends(gaps, fps, max_frames):
    times = np.cumsum([0.0, *gaps])
    index = choose_frames(times, fps=fps, max_frames=max_frames).tolist()
    assert all(a < b for a, b in pairwise(index)) and index[0] == 0
    assert len(index) == 1 or index[-1] == len(times) - 1
    wanted = (times[-1] + (np.median(gaps) if gaps else 0)) * fps
    most = min(max_frames, len(times))
    assert len(index) <= most and abs(len(index) - np.clip(wanted, 1, most)) <= 1
    if len(index) > 2:  # evenly spaced in time: each share of it has a frame as near as the file allows
        targets = np.linspace(0, times[-1], len(index))
        nearest = np.abs(times[None] - targets[:, None]).min(1)
        slack = 0.25 * times[-1] / (len(times) - 1)  # a nearly constant rate is taken as constant
        assert (np.abs(times[index][None] - targets[:, None]).min(1) <= nearest + 2 * slack + 1e-9).all()


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 100), start=st.floats(0, 12), length=st.floats(0, 12), fps=st.floats(0.5, 30))
def test_chosen_frames_lie_within_the_bounds(n, start, length, fps):
    times = np.arange(n) / 8
    inside = (times >= start - 1e-6) & (times <= start + length + 1e-6)
    if not inside.any():
        with pytest.raises(ValueError, match="no frame between"):
            choose_frames(times, fps=fps, start=start, end=start + length)
    else:
        assert inside[choose_frames(times, fps=fps, start=start, end=start + length)].all()


# --- the frames that other loaders take ---------------------------------------------------------------------------
# Independent rewrites of qwen-vl-utils (smart_nframes, then linspace) and of LongVideoBench's load_video.


def reference_qwen(total, video_fps, fps, low, high):
    low, high = -(-low // 2) * 2, min(high, total) // 2 * 2
    wanted = min(total / video_fps * fps if total / video_fps * fps > low else low, high, total)
    count = int(wanted / 2) * 2
    return torch.linspace(0, total - 1, count).round().long().tolist() if count >= 2 else None


@settings(max_examples=400, deadline=None)
@given(total=st.integers(1, 20_000), video_fps=st.floats(1, 120), fps=st.floats(0.1, 30), low=st.integers(1, 20),
       high=st.integers(1, 800))
def test_frames_of_qwen_vl_utils(total, video_fps, fps, low, high):
    bounds = dict(fps=fps, min_frames=low, max_frames=high)
    expected = reference_qwen(total, video_fps, fps, low, high)
    if expected is None:
        with pytest.raises(ValueError, match="a patch takes 2 frames"):
            count_by_fps(total, video_fps, **bounds)
    else:
        index = pick_by_fps(total, video_fps, **bounds).tolist()
        assert index == expected and all(a < b for a, b in pairwise(index)) and len(index) % 2 == 0


@pytest.mark.parametrize("total, video_fps, count", [
    (300, 30, 20), (900, 30, 60), (60_000, 30, 768), (30, 30, 4), (5, 30, 4), (3, 30, 2), (2, 1, 2), (301, 29.97, 20)])
def test_frame_counts_of_qwen_vl_utils(total, video_fps, count):
    assert count_by_fps(total, video_fps) == count  # with its default bounds, 4 and 768, and 2 frames a second


def test_single_precision_picks_a_neighbour_now_and_then():
    single = (torch.linspace(0, n - 1, 15).round().long().tolist() for n in range(16, 500))
    differing = sum(index != pick_evenly(n, 15).tolist() for n, index in enumerate(single, 16))
    assert 0 < differing < 20


@settings(max_examples=300, deadline=None)
@given(duration=st.floats(1, 4000), video_fps=st.floats(1, 60), max_frames=st.integers(1, 300))
def test_frames_of_longvideobench(duration, video_fps, max_frames):
    total, count = int(duration * video_fps), min(max_frames, int(duration))
    expected = [int(total / count) * i for i in range(count)]
    index = pick_longvideobench(duration, video_fps, max_frames=max_frames).tolist()
    assert index == expected and index[-1] < total


@pytest.mark.parametrize("duration, video_fps, max_frames, expected", [
    (473.0, 30.0, 4, [0, 3547, 7094, 10641]), (10.5, 30.0, 16, [31 * i for i in range(10)]), (0.5, 30.0, 16, [0]),
    (8.0, 0.5, 16, [0]), (3.99, 24.0, 2, [0, 47])])
def test_frames_of_longvideobench_by_hand(duration, video_fps, max_frames, expected):
    assert pick_longvideobench(duration, video_fps, max_frames=max_frames).tolist() == expected


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_even_frames_are_those_of_a_plain_loop(n, share):
    count = max(1, int(n * share))
    expected = [round(i * (n - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]
    assert np.abs(pick_evenly(n, count) - expected).max() <= (1 if count > 2 else 0)  # ties may fall either way
    assert len(set(pick_evenly(n, count))) == count


def test_read_video_takes_the_frames_it_is_told(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(32))
    everything = read_video(tmp_path / "a.mp4", fps=1000, max_frames=1000)
    for decoder in READERS:
        for index in ([0], [31], [3, 4, 9], list(range(32))):
            clip = read_video(tmp_path / "a.mp4", pick=lambda times: np.array(index), decoder=decoder)
            assert torch.equal(clip.frames, everything.frames[index]), (decoder, index)
    for index in ([], [32], [-1], [4, 3], [3, 3]):
        with pytest.raises(VideoError, match="chosen frames must be increasing and among 0 to 31"):
            read_video(tmp_path / "a.mp4", pick=lambda times: np.array(index))


# --- a budget for the whole video ---------------------------------------------------------------------------------


def reference_budget(n, total, low, high):
    share = max(min(768 * 28 * 28, total / n * 2), int(low * 1.05))
    return min(high, share)


@given(n=st.integers(1, 384).map(lambda half: 2 * half), blocks=st.integers(1, 24576), low=st.integers(1, 128),
       high=st.integers(1, 768))
def test_the_total_budget_is_that_of_qwen_vl_utils(n, blocks, low, high):
    total, low, high = blocks * 28 * 28, low * 28 * 28, high * 28 * 28
    budget = frame_budget(n, total_pixels=total, min_pixels=low, max_pixels=min(high, 768 * 28 * 28))
    assert budget == int(reference_budget(n, total, low, high))


@pytest.mark.parametrize("total", [28 * 28, 16 * 28 * 28, 200 * 28 * 28, 5000 * 28 * 28])
def test_a_clip_keeps_its_total_budget(tmp_path, total):
    write_video(tmp_path / "a.mp4", moving_square(32, 256))
    for max_frames in (1, 4, 16):
        frames = read_video(tmp_path / "a.mp4", fps=100, max_frames=max_frames, total_pixels=total).frames
        assert len(frames) == max_frames
        pixels = math.ceil(len(frames) / 2) * frames.shape[2] * frames.shape[3]
        assert pixels <= total or frames.shape[2:] == (28, 28)  # one block is the least
