"""16 frames of a clip in the ten most common containers: `read_video`, which knows every frame by its stamp, against plain decord.

Each frame carries its number as stripes, so the table can say which readers are right. Where decord is wrong, a plain decode by
PyAV from the start takes its place. Run: python benchmarks/reading.py
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np
import tyro
from harness import Options, interleaved, save, show

from deepvideo_r1.data.video import read_video

BITS = 12
CONTAINERS = {  # ending -> encoder and its options; a keyframe every two seconds
    "mp4": ("libx264", {"g": "50", "preset": "veryfast"}), "mov": ("libx264", {"g": "50", "preset": "veryfast"}),
    "mkv": ("libx264", {"g": "50", "preset": "veryfast"}), "webm": ("libvpx-vp9", {"g": "50", "deadline": "realtime", "cpu-used": "8"}),
    "avi": ("mpeg4", {"g": "50"}), "flv": ("libx264", {"g": "50", "preset": "veryfast"}), "wmv": ("wmv2", {"g": "50"}),
    "ts": ("libx264", {"g": "50", "preset": "veryfast"}), "mpg": ("mpeg2video", {"g": "15", "bf": "2"}),
    "3gp": ("libx264", {"g": "50", "preset": "veryfast", "bf": "0"})}


@dataclass
class Settings(Options):
    "How the readers are compared."
    seconds: int = 20  # length of a clip
    height: int = 360  # height of a frame; the width is 16 / 9 of it
    frames: int = 16  # frames that are read
    threads: int = 1  # number of CPU threads
    repeats: int = 9  # number of times that each side is timed; the sides take turns

    def __post_init__(self):
        if self.quick:
            self.seconds, self.height = 2, 72
        super().__post_init__()


def picture(number: int, height: int, width: int, ground: np.ndarray) -> np.ndarray:
    "A ground that moves, under stripes that show the number."
    frame = np.roll(ground, (3 * number) % width, axis=1).copy()
    stripes = np.repeat((number >> np.arange(BITS)) & 1, -(-width // BITS))[:width]
    frame[: height // 3] = (stripes * 200 + 20).astype(np.uint8)[None, :, None]
    return frame


def number(frame: np.ndarray) -> int:
    "The number that a frame (H, W, 3) shows."
    height, width = frame.shape[:2]
    middle = [i * -(-width // BITS) + width // BITS // 2 for i in range(BITS)]
    return int((frame[height // 6, middle, 1] > 120) @ (1 << np.arange(BITS)))


def write(path: Path, settings: Settings, codec: str, options: dict) -> None:
    height, width = settings.height, settings.height * 16 // 9 // 2 * 2
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    ground = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 1_500_000
        for i in range(25 * settings.seconds):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, height, width, ground), format="rgb24")))
        container.mux(stream.encode())


def by_decord(path: Path, index: np.ndarray) -> np.ndarray:
    reader = decord.VideoReader(str(path), num_threads=1)
    reader.get_frame_timestamp(range(len(reader)))  # every reader tells the times
    return reader.get_batch(index).asnumpy()


def by_pyav(path: Path, index: np.ndarray) -> np.ndarray:
    wanted, frames = set(index.tolist()), []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
    return np.stack(frames)


def numbers(read, *arguments) -> list[int]:
    try:
        return [number(frame) for frame in read(*arguments)]
    except Exception:  # decord's errors, of many classes
        return []


def main(settings: Settings) -> None:
    cases, n_frames = [], 25 * settings.seconds
    index = np.linspace(0, n_frames - 1, settings.frames).round().astype(int)
    decord.logging.set_level(decord.logging.QUIET)

    def ours(path: Path, index: np.ndarray) -> np.ndarray:
        return read_video(path, max_frames=settings.frames, fps=1000.0).frames.permute(0, 2, 3, 1).numpy()

    with tempfile.TemporaryDirectory() as folder:
        for ending, (codec, options) in CONTAINERS.items():
            path = Path(folder) / f"clip.{ending}"
            write(path, settings, codec, options)
            assert numbers(ours, path, index) == index.tolist(), ending
            decord_is_right = numbers(by_decord, path, index) == index.tolist()
            plain = by_decord if decord_is_right else by_pyav
            sides = interleaved({"plain": lambda: plain(path, index), "ours": lambda: ours(path, index)}, settings)
            cases.append(dict(container=ending, codec=codec, megabytes=path.stat().st_size / 1e6, decord_is_right=decord_is_right,
                              plain="decord" if decord_is_right else "pyav", sides=sides,
                              time_ratio=sides["ours"]["cpu_s"] / sides["plain"]["cpu_s"]))
    show(f"{settings.frames} frames of {settings.seconds} s at {settings.height} lines, milliseconds",
         ["container", "codec", "MB", "decord right", "plain reader", "plain", "ours", "ours / plain"],
         [[case["container"], case["codec"], case["megabytes"], str(case["decord_is_right"]), case["plain"],
           1000 * case["sides"]["plain"]["cpu_s"], 1000 * case["sides"]["ours"]["cpu_s"], case["time_ratio"]] for case in cases])
    save("reading", settings, cases)


if __name__ == "__main__":
    main(tyro.cli(Settings))
