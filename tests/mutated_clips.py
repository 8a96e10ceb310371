"""Clips with a few changed bytes, from fixed seeds, read one after the other: `python tests/mutated_clips.py 40000` prints counts."""
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from clips import Recipe, write, x264

from deepvideo_r1.data.guarded import ReaderProcess
from deepvideo_r1.data.video import VideoError

RECIPES = [
    Recipe("mp4", "libx264", options=x264(keyint=12, bframes=2), n_frames=40),
    Recipe("mkv", "libx265", options={"x265-params": "keyint=12:bframes=2:log-level=none"}, n_frames=40),
    Recipe("avi", "mpeg4", options={"g": "12", "bf": "2"}, n_frames=40),
    Recipe("webm", "libvpx-vp9", options={"g": "12", "deadline": "realtime", "cpu-used": "8"}, n_frames=40),
    Recipe("mpg", "mpeg2video", options={"g": "12", "bf": "2"}, n_frames=40),
]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    "The content with changed bytes, a changed number, a run of zeros, a piece left out or twice, or cut short."
    changed = bytearray(content)
    # Headers and indices lie at the ends; half of the changes are there.
    places = rng.integers(len(changed), size=rng.integers(1, 17))
    ends = rng.integers(1024, size=len(places)) % len(changed)
    where = np.where(rng.random(len(places)) < 0.25, ends, np.where(rng.random(len(places)) < 0.33, -1 - ends, places))
    for place in where:
        changed[place] = rng.choice([int(rng.integers(256)), changed[place] ^ (1 << int(rng.integers(8))), 0, 255])
    kind, a, b = rng.random(), *sorted(rng.integers(len(changed), size=2))
    b = min(b, a + 4096)
    if kind < 0.05:
        changed[a:b] = bytes(b - a)
    elif kind < 0.1:
        del changed[a:b]
    elif kind < 0.15:
        changed[a:a] = changed[a:b]
    elif kind < 0.2:
        del changed[a + 1 :]
    elif kind < 0.3:
        changed[a : a + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x80\x00\x00\x00"])
    return bytes(changed)


def read_mutated(count: int, folder: Path, *, timeout: float = 20.0, progress: bool = False) -> Counter:
    "Reads that many clips with the reader of training; counts what came of them, and raises what is no `VideoError`."
    contents = [write(folder / f"{i}.{recipe.ending}", recipe).read_bytes() for i, recipe in enumerate(RECIPES)]
    outcomes, started = Counter(), time.perf_counter()
    with ReaderProcess() as reader:
        for i in range(count):
            recipe, path = RECIPES[i % len(RECIPES)], folder / f"mutated.{RECIPES[i % len(RECIPES)].ending}"
            path.write_bytes(mutate(contents[i % len(RECIPES)], np.random.default_rng([12, i])))
            try:
                clip = reader.read(path, timeout=timeout, max_frames=8, fps=8.0, max_pixels=28 * 28 * 4)
                assert 1 <= len(clip.frames) <= 8 and (clip.timestamps.diff() > 0).all(), (i, clip.timestamps)
                outcomes["read"] += 1
            except VideoError as error:
                cause = error.cause
                assert error.path == str(path) and cause and "\n" not in cause, (i, str(error))
                outcomes["the process ended" if "reading process ended" in cause
                         else "took too long" if "took more than" in cause
                         else "too much memory" if "(limit" in cause else "refused"] += 1
                if "process ended" in cause or "took more" in cause or "(limit" in cause:
                    print(i, recipe.name, cause, flush=True)
            if progress and i % 2000 == 1999:
                print(f"{i + 1} clips, {time.perf_counter() - started:.0f} s: {dict(outcomes)}", flush=True)
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(dict(read_mutated(int(sys.argv[1]), Path(folder), progress=True)))
