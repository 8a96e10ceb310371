"""Clips whose frames carry their number as a picture, in many containers and codecs, and every reader compared with a plain decode.

`python tests/clips.py` writes and checks all of them, and prints counts.
"""
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder talks

import av
import numpy as np

from deepvideo_r1.data.video import VideoError, read_video

SIDE, BITS = 128, 10  # pixels of a side, and stripes across it


def picture(number: int, side: int = SIDE) -> np.ndarray:
    "A frame that shows its number as black and white stripes, the lowest bit on the left; both halves agree."
    bits = (number >> np.arange(BITS)) & 1
    stripes = np.repeat(bits * 200 + 20, -(-side // BITS))[:side].astype(np.uint8)
    return np.broadcast_to(stripes[None, :, None], (side, side, 3)).copy()


def number(pixels: np.ndarray) -> int:
    "The number that a frame shows, (H, W, 3) uint8; -1 where its halves disagree."
    height, width = pixels.shape[:2]
    width_of_one = -(-width // BITS)
    middle = [i * width_of_one + width_of_one // 2 for i in range(BITS)]
    upper, lower = (int((pixels[row, middle, 1] > 120) @ (1 << np.arange(BITS))) for row in (height // 4, 3 * height // 4))
    return upper if upper == lower else -1


@dataclass(frozen=True)
class Recipe:
    "How a clip is made."
    ending: str  # of the file, which decides the container
    codec: str
    rate: str = "constant"  # or "variable"
    is_cut: bool = False  # cut out of a longer clip without encoding it anew
    options: dict = field(default_factory=dict)  # of the encoder
    container: dict = field(default_factory=dict)  # options of the container
    pix_fmt: str = "yuv420p"
    note: str = ""
    n_frames: int = 90
    sound: bool = False

    @property
    def name(self) -> str:
        parts = [self.ending, self.codec, self.note, self.rate, "cut" if self.is_cut else "", "sound" if self.sound else ""]
        return "-".join(part for part in parts if part)


def stamps_of(recipe: Recipe) -> list[Fraction]:
    "Seconds of its frames: 25 a second, or a slow part before a fast one."
    if recipe.rate == "constant":
        return [Fraction(i, 25) for i in range(recipe.n_frames)]
    slow = recipe.n_frames // 5
    return [Fraction(i, 2) for i in range(slow)] + [Fraction(slow, 2) + Fraction(i, 25)
                                                    for i in range(recipe.n_frames - slow)]


def write(path: Path, recipe: Recipe) -> Path:
    "Writes the clip; raises `av.FFmpegError` or `ValueError` where this FFmpeg cannot."
    if recipe.is_cut:
        whole = write(path.with_name(f"whole-{path.name}"), replace(recipe, is_cut=False))
        return cut(whole, path, recipe)
    unit = Fraction(1, 25) if recipe.rate == "constant" else Fraction(1, 50)
    with av.open(str(path), "w", options=recipe.container) as container:
        stream = container.add_stream(recipe.codec, rate=25, options=recipe.options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = recipe.pix_fmt
        stream.codec_context.time_base = unit
        track = container.add_stream("mp2" if recipe.ending in ("mpg", "avi", "ts", "vob") else "aac", rate=44100) if recipe.sound else None
        if track:
            write_sound(container, track, float(stamps_of(recipe)[-1]))
        for i, seconds in enumerate(stamps_of(recipe)):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format=recipe.pix_fmt)
            frame.pts, frame.time_base = int(seconds / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(container, track, seconds: float) -> None:
    size = 1152 if track.name == "mp2" else 1024
    layout, form = "mono", "s16" if track.name == "mp2" else "fltp"
    for i in range(int(seconds * 44100 / size)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, size), np.int16 if form == "s16" else np.float32), format=form, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = 44100, i * size, Fraction(1, 44100)
        container.mux(track.encode(frame))
    container.mux(track.encode())


def cut(source: Path, path: Path, recipe: Recipe) -> Path:
    "Copies packets from the keyframe before second 1.3 on, as `ffmpeg -ss 1.3 -to 3 -c copy` does."
    start, end = (Fraction(13, 10), Fraction(3)) if recipe.rate == "constant" else (Fraction(33, 10), Fraction(21, 2))
    with av.open(str(source)) as whole, av.open(str(path), "w", options=recipe.container) as part:
        stream = whole.streams.video[0]
        copy = part.add_stream_from_template(stream)
        origin = (stream.start_time or 0) * stream.time_base
        shift = int((start + origin) / stream.time_base)
        packets = [packet for packet in whole.demux(stream) if packet.size]
        if any(packet.dts is None and packet.pts is None for packet in packets):
            raise ValueError("a stream without stamps cannot be cut")
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and (p.dts if p.pts is None else p.pts) <= shift]
        for packet in packets[keys[-1] if keys else 0 :]:
            if packet.dts is not None and packet.dts * stream.time_base - origin > end:
                break
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = copy
            part.mux(packet)
    return path


def x264(**more) -> dict:
    return {"x264-params": ":".join(f"{key.replace('_', '-')}={value}" for key, value in ({"keyint": 24, "scenecut": 0} | more).items())}


def plain_decode(path: Path) -> tuple[list[int], list[float | None]]:
    "Numbers and seconds of all frames, decoded from the start with one thread; seconds count from the start of the file."
    numbers, times = [], []
    with av.open(str(path)) as container:
        origin = None if container.start_time is None else max(0, container.start_time / 1e6)
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            numbers.append(number(frame.to_ndarray(format="rgb24")))
            times.append(None if frame.pts is None else float(frame.pts * stream.time_base))
    origin = next((time for time in times if time is not None), 0) if origin is None else origin
    return numbers, [None if time is None else time - origin for time in times]


CLOSED, OPEN = x264(bframes=3, b_adapt=0, open_gop=0), x264(bframes=3, b_adapt=0, open_gop=1)
HEVC = {"x265-params": "keyint=24:bframes=3:open-gop=1:log-level=none"}
BASE = [
    *(Recipe(ending, "libx264", options=CLOSED, note="b") for ending in ("mp4", "mov", "mkv", "ts", "avi", "flv", "3gp", "m4v", "nut", "h264", "asf", "vob", "m2ts", "f4v")),
    *(Recipe(ending, "libx264", options=OPEN, note="open") for ending in ("mp4", "mov", "mkv", "ts", "avi", "flv")),
    Recipe("mp4", "libx264", options=x264(bframes=0), note="p"),
    Recipe("avi", "libx264", options=x264(bframes=0), note="p"),
    Recipe("mp4", "libx264", options=x264(keyint=1), note="intra"),
    Recipe("mp4", "libx264", options=x264(intra_refresh=1, bframes=0), note="refresh"),
    Recipe("mp4", "libx264", options=CLOSED, container={"movflags": "frag_keyframe+empty_moov+default_base_moof"}, note="fragments"),
    Recipe("mp4", "libx264", options=CLOSED, container={"use_editlist": "0"}, note="no-edit-list"),
    Recipe("mp4", "libx264", options=CLOSED, note="sound", sound=True),
    Recipe("ts", "libx264", options=CLOSED, note="sound", sound=True),
    Recipe("mp4", "libx264", options=x264(bframes=3, interlaced=1), note="interlaced"),
    *(Recipe(ending, "libx265", options=HEVC, note="open") for ending in ("mp4", "mkv", "ts")),
    Recipe("mp4", "libx265", options={"x265-params": "keyint=24:bframes=3:open-gop=0:log-level=none"}, note="b"),
    Recipe("hevc", "libx265", options=HEVC, note="open"),
    *(Recipe(ending, "mpeg4", options={"g": "12", "bf": "2"}, note="b") for ending in ("mp4", "avi", "mkv", "mov")),
    Recipe("avi", "mpeg4", options={"g": "12"}, note="p"), Recipe("m4v", "mpeg4", options={"g": "12"}, note="p"),
    *(Recipe(ending, "mpeg2video", options={"g": "12", "bf": "2"}, note="b") for ending in ("mpg", "ts", "mkv", "vob", "m2v", "mxf", "avi", "mp4")),
    *(Recipe(ending, "mpeg1video", options={"g": "12", "bf": "2"}, note="b") for ending in ("mpg", "m1v")),
    *(Recipe("webm", "libvpx", options={"g": "24", "auto-alt-ref": alt, "lag-in-frames": "16"}, note=f"alt{alt}") for alt in ("0", "1")),
    *(Recipe(ending, "libvpx-vp9", options={"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime", "cpu-used": "8"}, note="alt") for ending in ("webm", "mp4", "ivf")),
    Recipe("mp4", "libsvtav1", options={"preset": "12", "g": "24"}), Recipe("mkv", "libsvtav1", options={"preset": "12", "g": "24"}),
    Recipe("wmv", "wmv2", options={"g": "12"}), Recipe("wmv", "wmv1", options={"g": "12"}), Recipe("asf", "msmpeg4", options={"g": "12"}), Recipe("avi", "msmpeg4", options={"g": "12"}),
    Recipe("avi", "mjpeg", pix_fmt="yuvj420p"), Recipe("mov", "mjpeg", pix_fmt="yuvj420p"),
    Recipe("mkv", "ffv1"), Recipe("avi", "ffv1"), Recipe("flv", "flv", options={"g": "12"}),
    Recipe("gif", "gif", pix_fmt="rgb8"), Recipe("apng", "apng", pix_fmt="rgb24"), Recipe("mov", "prores_ks", pix_fmt="yuv422p10le"),
    Recipe("avi", "huffyuv", pix_fmt="yuv422p"), Recipe("mov", "qtrle", pix_fmt="rgb24"), Recipe("mov", "png", pix_fmt="rgb24"), Recipe("avi", "rawvideo"),
    Recipe("avi", "cinepak", pix_fmt="rgb24"), Recipe("y4m", "wrapped_avframe"),
]


def variants() -> list[Recipe]:
    "Every base, whole and cut, at a constant and a variable rate."
    return [replace(base, rate=rate, is_cut=is_cut) for base in BASE for rate in ("constant", "variable")
            for is_cut in (False, True)]


# --- the check --------------------------------------------------------------------------------------------------------

SPANS = ({}, {"start": 0.5, "end": 1.7}, {"start": 1.0}, {"pick": lambda times: np.arange(len(times))})


def judge(path: Path, truth: tuple[list[int], list[float | None]], decoder: str, **choice) -> str:
    """What a reader makes of a clip: "right", "refused", or what is wrong with it.

    Right: every frame shows the number that a plain decode shows at its time, times rise, both ends are there, and each frame is
    as near to its share of the time as the frames of the file allow.
    """
    numbers, times = truth
    try:
        clip = read_video(path, max_frames=7, fps=1000.0, decoder=decoder, **choice)
    except VideoError as error:
        return "empty span" if "no frame between" in error.cause else "refused"
    seen = [number(frame.permute(1, 2, 0).numpy()) for frame in clip.frames]
    seconds = clip.timestamps.double().numpy()
    if (np.diff(seconds) <= 0).any():
        return f"times {seconds}"
    if None in times or (np.diff(times) <= 0).any():  # no stamps of its own: the order counts
        places = [numbers.index(n) if n in numbers else -1 for n in seen]
        return "right" if min(places) >= 0 and (np.diff(places) > 0).all() else f"order {seen}"

    # The frame of a plain decode at each time.
    times = np.array(times)
    nearest = np.abs(times[None] - seconds[:, None]).argmin(1)
    if np.abs(times[nearest] - seconds).max() > 2e-3:
        return f"no frame at {seconds[np.abs(times[nearest] - seconds).argmax()]:.3f} s"
    if [numbers[i] for i in nearest] != seen:
        return f"frames {seen}, a plain decode: {[numbers[i] for i in nearest]}"

    # Spread over time.
    if "pick" in choice:
        return "right" if len(seen) == len(numbers) else f"{len(seen)} of {len(numbers)} frames"
    inside = times[(times >= choice.get("start", -1) - 1e-6) & (times <= choice.get("end", np.inf) + 1e-6)]
    targets = np.linspace(inside[0], inside[-1], len(seconds))
    widest = np.diff(inside).max(initial=0)
    fits = len(seconds) == min(7, len(inside)) and np.abs(seconds - targets).max() <= widest + 2e-3
    return "right" if fits else f"spread {seconds}"


def check(recipes: Iterable[Recipe], folder: Path) -> tuple[Counter, dict[str, str]]:
    "Counts of (reader, outcome) over all clips and spans, and what was wrong by the name of the clip."
    counts, wrong = Counter(), {}
    for recipe in recipes:
        path = folder / f"{recipe.name}.{recipe.ending}"
        try:
            write(path, recipe)
        except (av.FFmpegError, ValueError):  # this FFmpeg has no such encoder, or the container takes no such stream
            counts["clips", "not written"] += 1
            continue
        try:
            truth = plain_decode(path)
        except av.FFmpegError:
            truth = None
        counts["clips", "written"] += 1
        for decoder in ("auto", "decord", "pyav"):
            for span in SPANS:
                outcome = "refused" if truth is None else judge(path, truth, decoder, **span)
                known = outcome in ("right", "refused", "empty span")
                counts[decoder, outcome if known else "wrong"] += 1
                if not known or (outcome == "refused" and decoder != "decord" and truth):
                    wrong[f"{recipe.name} {decoder} {[k for k in span]}"] = outcome
    return counts, wrong


if __name__ == "__main__":
    av.logging.set_level(None)
    with tempfile.TemporaryDirectory() as name:
        for result in check(variants(), Path(name)):
            print(*(f"{key}: {value}" for key, value in sorted(result.items())), sep="\n")
