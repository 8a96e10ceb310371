"""The share of a training step that is spent waiting for clips: read when the step asks for them, and read ahead.

The clips are films of --seconds seconds, and `ClipFeed` hands them out as in training. Sampling and update are stood in for: by a sleep, as a
process sleeps while a GPU works, or by products of matrices on one core. Run: python benchmarks/read_ahead.py
"""
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from harness import Options, save, show
from reading import write
from torch import Tensor

from deepvideo_r1.core import Prompt, Sample
from deepvideo_r1.data.guarded import end_idle_readers, read_video_safely
from deepvideo_r1.training.feed import ClipFeed


@dataclass
class Settings(Options):
    "How the feeds are compared."
    seconds: int = 20  # length of a clip
    height: int = 360  # height of a frame; the width is 16 / 9 of it
    frames: int = 16  # frames that are read
    clips: int = 24  # number of clips
    prompts_per_step: int = 8  # clips of a step
    steps: int = 6  # number of steps; the first one is left out of the medians
    work: float = 4.0  # seconds of a step beside the clips
    threads: int = 1  # number of CPU threads

    def __post_init__(self):
        if self.quick:
            self.seconds, self.height, self.clips, self.prompts_per_step, self.steps, self.work = 2, 72, 6, 2, 3, 0.2
        super().__post_init__()


def multiply(seconds: float) -> None:
    "Products of matrices, for that many seconds."
    matrix, end = torch.ones(512, 512), time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix @ matrix


WORK = {"sleep": time.sleep, "matmul": multiply}


def run(samples: list[Sample], work: str, workers: int, settings: Settings) -> tuple[dict[str, float], Tensor]:
    "Figures of a run, and a sum over every frame that it was given."
    def load(sample):
        return [("video", read_video_safely(sample.video, max_frames=settings.frames, max_pixels=252 * 252))]

    def ask(sample, visuals):
        return Prompt(visuals[0][1].frames.long().sum().view(1))

    feed = ClipFeed(samples, load, ask, prompts_per_step=settings.prompts_per_step, workers=workers, n_steps=settings.steps, kept=0)
    waits, totals, most, seen = [], [], 0, torch.zeros(1).long()
    for step in range(settings.steps):
        started = time.perf_counter()
        questions = feed.take(step)
        waits.append(time.perf_counter() - started)
        seen = 31 * seen + sum((1 + q.place) * q.prompt.prompt_ids for q in questions)
        WORK[work](settings.work)
        totals.append(time.perf_counter() - started)
        most = max(most, feed.ahead.n_bytes)
    feed.close()
    end_idle_readers(0)
    wait, total = median(waits[1:]), median(totals[1:])
    return dict(first_wait_s=waits[0], wait_s=wait, step_s=total, waiting_share=wait / total, held_mb=most / 1e6), seen


def main(settings: Settings) -> None:
    cases = []
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.mp4" for i in range(settings.clips)]
        for path in paths:
            write(path, settings, "libx264", {"g": "50", "preset": "veryfast"})
        samples = [Sample(id=path.stem, video=str(path), question="?", answer="1", kind="number") for path in paths]
        for work in WORK:
            figures = {workers: run(samples, work, workers, settings) for workers in (0, 1, 2)}
            assert len({int(seen) for _, seen in figures.values()}) == 1, "the feeds gave other frames"
            cases += [dict(work=work, workers=workers, **figure) for workers, (figure, _) in figures.items()]
    show(f"{settings.prompts_per_step} clips of {settings.seconds} s a step, {settings.work:g} s of other work",
         ["work", "workers", "first wait, s", "wait, s", "step, s", "waiting", "held, MB"],
         [[case["work"], str(case["workers"]), *(case[name] for name in ("first_wait_s", "wait_s", "step_s")),
           f"{case['waiting_share']:.0%}", case["held_mb"]] for case in cases])
    save("read_ahead", settings, cases)


if __name__ == "__main__":
    main(tyro.cli(Settings))
