"""Real files through both readers, damaged ones, the patches of transformers' image processor, sizes and frames."""
import json
import math
import subprocess
import sys
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from deepvideo_r1.video import CLIP_STD, READERS, VideoError, choose_frames, patchify, read_video, smart_size
from deepvideo_r1.world import write_video

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
from deepvideo_r1.video import VideoError, read_video
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
        assert kind == "VideoError" and message.startswith(f"{path}: ") and "\n" not in message, f"{case}: {kind} {message}"
        assert seconds < 10, f"{case} took {seconds} seconds"
    assert done.stderr == ""  # the readers below print nothing of their own


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
    assert len(index) <= min(max_frames, len(times)) and abs(len(index) - np.clip(wanted, 1, min(max_frames, len(times)))) <= 1
    if len(index) > 2:  # evenly spaced: steps differ by one frame at most
        steps = np.diff(index)
        assert steps.max() - steps.min() <= 1


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
