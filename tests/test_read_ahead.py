"""Clips that are read ahead: the same bits and the same failures as without, within their memory, and no wait without an end."""
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_clips import film
from test_trainer import figures, make_trainer, same, weights  # noqa: F401
from test_video import hang, moving_square, write_video

from deepvideo_r1.config import PromptConfig
from deepvideo_r1.core import Clip, Prompt, QuestionError, Sample
from deepvideo_r1.data import guarded, read_ahead
from deepvideo_r1.data.clip_cache import visuals_loader
from deepvideo_r1.data.guarded import ReaderProcess, end_idle_readers, read_video_safely
from deepvideo_r1.data.read_ahead import ReadAhead
from deepvideo_r1.data.video import VideoError, read_video
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.support.interrupts import Stopped, TrainingError, stop_flag
from deepvideo_r1.trainer import fit
from deepvideo_r1.training import feed as feed_module
from deepvideo_r1.training.feed import AHEAD_STEPS, ClipFeed, step_indices

N_BYTES = 3 * 28 * 28 + 4  # of a clip that `small` returns


def small(index: int) -> list:
    return [("video", Clip(torch.full((1, 3, 28, 28), index % 256, dtype=torch.uint8), torch.zeros(1)))]


def samples_of(n: int) -> list[Sample]:
    return [Sample(id=f"q{i}", video=f"{i}", question="?", answer="1", kind="number") for i in range(n)]


def ask(sample, visuals) -> Prompt:
    "A prompt that depends on every frame."
    if sample.id.split("#")[0] == "q6":
        raise QuestionError(f"sample {sample.id}: the prompt is too long")
    return Prompt(torch.cat([clip.frames.flatten().long() for _, clip in visuals]) if visuals else torch.zeros(1).long())


def wait_until(is_reached, seconds: float = 20) -> None:
    deadline = time.perf_counter() + seconds
    while not is_reached():
        assert time.perf_counter() < deadline, "it never came"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def feeds():
    "Makes feeds that are closed at the end."
    made = []

    def make(load, n=8, **settings) -> ClipFeed:
        made.append(ClipFeed(samples_of(n), load, ask, **dict(prompts_per_step=4, max_bad_share=1.0) | settings))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


# --- the same as without ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Sample]:
    "Eight questions: six films, of which one is damaged, a pipe, and a file that is missing."
    folder = tmp_path_factory.mktemp("films")
    for i in range(6):
        write_video(folder / f"{i}.mp4", np.roll(moving_square(), 3 * i, 0))
    (folder / "3.mp4").write_bytes((folder / "3.mp4").read_bytes()[:400])
    os.mkfifo(folder / "6.mp4")
    return [Sample(id=f"film{i}", video=str(folder / f"{i}.mp4"), question="?", answer="1", kind="number") for i in range(8)]


def everything(feed: ClipFeed, n_steps: int) -> tuple:
    questions = [question for step in range(n_steps) for question in feed.take(step)]
    frames = [clip.frames.numpy().tobytes() + clip.timestamps.numpy().tobytes() for q in questions for _, clip in q.visuals]
    return ([(q.place, q.sample) for q in questions], frames, [q.prompt.prompt_ids.tolist() for q in questions],
            feed.seen.state_dict())


@pytest.mark.parametrize("is_cached", [False, True])
def test_frames_prompts_and_bad_clips_are_the_same_for_any_number_of_workers(films, tiny_model, tmp_path, is_cached):
    processor, outcomes = load_processor(tiny_model), []
    for workers, ahead_bytes in ((0, 10**9), (1, 10**9), (2, 50_000), (4, 10**9)):
        load = visuals_loader(PromptConfig(max_frames=4, cache_dir=str(tmp_path / "clips") if is_cached else None))
        feed = ClipFeed(films, lambda sample: load(sample, processor, timeout=20.0), ask, prompts_per_step=3, max_bad_share=1.0,
                        workers=workers, ahead_bytes=ahead_bytes)
        feed.ahead._allowed = max(1, workers)  # all at once
        outcomes.append(everything(feed, 6))
        feed.close()
    places, frames, _, seen = outcomes[0]
    assert len(seen["bad_clips"]) == 3 and len(frames) > 5 and len(places) == len(frames)
    assert "not a regular file" in seen["bad_clips"]["6"] and "no such file" in seen["bad_clips"]["7"]
    assert all(outcome == outcomes[0] for outcome in outcomes[1:])


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_gives_what_the_loader_gives(seed):
    draw, reads = random.Random(seed), []

    def load(index):
        reads.append(index)
        time.sleep(draw.random() / 500)
        if index % 5 == 3:
            raise VideoError(str(index), "bad")
        return small(index)

    bound = draw.choice([1, 3, 10, 1000]) * N_BYTES
    ahead = ReadAhead(load, workers=draw.randrange(5), max_bytes=bound, kept=draw.choice([0, 2, 64]))
    for _ in range(60):
        action = draw.random()
        if action < 0.2:
            ahead.plan([draw.randrange(12) for _ in range(draw.randrange(15))])
        elif action < 0.23:
            ahead.close()
        else:
            index = draw.randrange(12)
            if index % 5 == 3:
                with pytest.raises(VideoError, match=f"{index}: bad"):
                    ahead.take(index)
            else:
                assert ahead.take(index)[0][1].frames.unique().tolist() == [index]
        ahead._allowed = max(1, ahead.workers)
        assert ahead.n_bytes <= bound + N_BYTES  # one clip for which a step was waiting
    ahead.close()
    assert set(reads) <= set(range(12)) and not ahead._threads


# --- the order, and what is held ----------------------------------------------------------------------------------


def test_clips_are_read_in_the_order_of_the_run_and_not_beyond_its_end(feeds):
    reads = []
    feed = feeds(lambda sample: reads.append(int(sample.video)) or small(int(sample.video)), n=40, workers=1, n_steps=5)
    feed.take(0)
    order = [index for step in range(5) for index in step_indices(40, step, 4, 0)]
    wait_until(lambda: len(reads) == len(order))
    time.sleep(0.1)
    assert reads == order
    for step in range(1, 5):
        feed.take(step)
    assert reads == order  # and each of them once


def test_processes_read_their_own_share(feeds):
    reads = []
    feed = feeds(lambda sample: reads.append(int(sample.video)) or small(int(sample.video)), n=400, workers=1, rank=1, n_processes=2)
    feed.take(3)
    mine = [index for step in range(3, 4 + AHEAD_STEPS) for index in step_indices(400, step, 4, 0)[1::2]]
    wait_until(lambda: len(reads) == len(mine))
    time.sleep(0.1)
    assert reads == mine


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_stays_within_its_bound(workers):
    most, ahead = [], None

    def load(index):
        most.append(ahead.n_bytes + len(ahead._reading) * N_BYTES)
        return small(index)

    ahead = ReadAhead(load, workers=workers, max_bytes=5 * N_BYTES)
    ahead._allowed = workers
    ahead.plan(range(40))
    for index in range(40):
        if index % 7 == 0:
            wait_until(lambda: not ahead._threads)  # as far ahead as it may
            assert len(set(range(index, 40)) & ahead._outcomes.keys()) == 5 or index > 35
        ahead.take(index)
        most.append(ahead.n_bytes)
    assert max(most) <= 5 * N_BYTES and most.count(max(most)) > 5
    ahead.close()
    assert ahead.n_bytes == 0


def test_a_clip_that_is_larger_than_the_bound_is_read_when_it_is_asked_for(feeds):
    feed, reads = None, []

    def load(sample):
        reads.append(int(sample.video))
        return small(int(sample.video))

    feed = feeds(load, n=12, workers=2, ahead_bytes=10)
    for step in range(3):
        assert len(feed.take(step)) >= 3
    assert reads == [index for step in range(3) for index in step_indices(12, step, 4, 0)] and feed.ahead.n_bytes <= N_BYTES


def test_one_process_is_enough_for_small_clips_and_a_wait_starts_another():
    ahead = ReadAhead(lambda index: small(index), workers=4)
    for start in range(0, 60, 10):
        ahead.plan(range(start, start + 20))
        for index in range(start, start + 10):
            ahead.take(index)
    assert ahead._allowed == 1

    at_once, active = [], set()

    def slow(index):
        active.add(index)
        at_once.append(len(active))
        time.sleep(0.3)
        active.discard(index)
        return small(index)

    ahead = ReadAhead(slow, workers=2)
    ahead.plan(range(8))
    for index in range(8):
        ahead.take(index)
    assert at_once[0] == 1 and max(at_once) == 2
    ahead.close()


def test_nothing_is_left_of_a_reader_that_is_given_up():
    class Loader:
        def __call__(self, index):
            return small(index)

    loader = Loader()
    ahead, gone = ReadAhead(loader, workers=3), weakref.ref(loader)
    ahead.plan(range(20))
    ahead.take(0)
    wait_until(lambda: not ahead._threads)
    del ahead, loader
    gc.collect()
    assert gone() is None


# --- clips that hang, and processes that die ----------------------------------------------------------------------


FAULTS = {2: (time.sleep, 600, "reading took more than 1.5 seconds and was cut off"),  # functions that need no import
          4: (signal.raise_signal, 9, r"the reading process ended with code -9 \(SIGKILL\)"),
          5: (bytearray, 10**11, r"MemoryError .*\(limit 4 GB\)")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_costs_its_clip_and_no_other(feeds, tmp_path, workers):
    write_video(tmp_path / "good.mp4", moving_square())

    def load(sample):
        read, argument, _ = FAULTS.get(int(sample.video), (read_video, tmp_path / "good.mp4", ""))
        return [("video", read_video_safely(argument, timeout=1.5, read=read))]

    feed = feeds(load, workers=workers)
    feed.ahead._allowed = max(1, workers)
    started = time.perf_counter()
    taken = {question.sample.id for step in range(2) for question in feed.take(step)}
    assert taken == {"q0", "q1", "q3", "q7"}  # all but the faults and the one that cannot be asked
    assert feed.seen.bad.keys() == FAULTS.keys() and feed.seen.unaskable.keys() == {6}
    for index, (_, argument, words) in FAULTS.items():
        assert re.match(rf"{argument}: {words}", feed.seen.bad[index])
    assert time.perf_counter() - started < 25
    pids = [reader.process.pid for reader in guarded._readers_of(os.getpid()).idle if reader.process]
    feed.close()
    assert sum(is_running(pid) for pid in pids) <= 1  # one stays for the next reads


def test_too_many_bad_clips_stop_the_run_as_without(feeds):
    def load(sample):
        raise VideoError(sample.video, "no such file")

    messages = []
    for workers in (0, 2):
        with pytest.raises(TrainingError, match="step 0: 4 of 4 clips cannot be read") as caught:
            feeds(load, n=4, max_bad_share=0.1, workers=workers).take(0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_another_error_of_the_loader_is_raised_in_its_step(feeds):
    def load(sample):
        raise KeyError("a fault of the loader")

    for workers in (0, 2):
        with pytest.raises(KeyError, match="a fault of the loader"):
            feeds(load, workers=workers).take(0)


# --- signals, and the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_clip(feeds, monkeypatch, workers, number):
    monkeypatch.setattr(read_ahead, "_PATIENCE", 1.0)
    feed = feeds(lambda sample: [("video", read_video_safely("hangs.mp4", read=hang, timeout=300))], workers=workers)
    started = time.perf_counter()
    with stop_flag(), pytest.raises(Stopped, match="stopped in step 0, while it waited for its clips") as caught:
        threading.Timer(2.0, os.kill, (os.getpid(), number)).start()
        feed.take(0)
    feed.close()
    assert caught.value.number == number and 2 < time.perf_counter() - started < 30
    assert not feed.seen.indices and not feed.seen.bad


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_flag_an_interrupt_ends_the_wait_at_once(feeds, workers):
    feed = feeds(lambda sample: [("video", read_video_safely("hangs.mp4", read=hang, timeout=300))], workers=workers)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        feed.take(0)
    assert time.perf_counter() - started < 30


def test_a_signal_lets_a_short_wait_end(feeds):
    feed = feeds(lambda sample: time.sleep(0.05) or small(int(sample.video)), workers=1)
    with stop_flag() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(feed.take(0)) >= 3 and asked()  # the step is done, and the run is saved after it


def test_a_process_stops_with_the_others(feeds, monkeypatch):
    monkeypatch.setattr(feed_module, "gather_object", lambda own: [*own, ({}, {}, signal.SIGTERM)])
    feed = feeds(lambda sample: small(int(sample.video)), workers=1, n_processes=2)
    with pytest.raises(Stopped) as caught:
        feed.take(0)
    assert caught.value.number == signal.SIGTERM and not feed.seen.indices


def test_workers_ignore_what_reaches_a_whole_job(tmp_path):
    write_video(tmp_path / "good.mp4", moving_square())
    with ReaderProcess() as reader:
        reader.read(tmp_path / "good.mp4")
        pid = reader.process.pid
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        time.sleep(0.2)
        assert len(reader.read(tmp_path / "good.mp4").frames) > 0 and reader.process.pid == pid


HANGING = """
import ctypes, time

def hang(path):
    time.sleep(600)

def hang_with_the_lock_of_python(path):
    ctypes.PyDLL(None).sleep(600)
"""
LEFT = """
import os, signal, sys, time
import hanging
from deepvideo_r1.data.guarded import _readers_of, read_video_safely
from deepvideo_r1.data.read_ahead import ReadAhead
read, timeout, end = getattr(hanging, sys.argv[1]), float(sys.argv[2]), sys.argv[3]
ahead = ReadAhead(lambda index: [("video", read_video_safely("hangs.mp4", read=read, timeout=timeout))], workers=3)
ahead._allowed = 3
ahead.plan(range(8))
busy = _readers_of(os.getpid()).busy
while len(busy) < 3 or not all(reader.process and reader._n_reads for reader in busy):
    time.sleep(0.05)
time.sleep(0.3)  # they have begun to read
print(*[reader.process.pid for reader in busy], flush=True)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(0)  # without closing it
"""


@pytest.mark.parametrize("read, timeout, end, seconds", [
    ("hang", 300, "kill", 3), ("hang", 300, "exit", 3), ("hang_with_the_lock_of_python", 1, "kill", 10)])
def test_no_worker_outlives_its_parent(tmp_path, read, timeout, end, seconds):
    (tmp_path / "hanging.py").write_text(HANGING)
    process = subprocess.run([sys.executable, "-c", LEFT, read, str(timeout), end], capture_output=True, text=True, timeout=120,
                             stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    pids = [int(pid) for pid in process.stdout.split()]
    assert len(pids) == 3 and process.returncode == (-9 if end == "kill" else 0), process.stderr
    wait_until(lambda: not any(map(is_running, pids)), seconds)
    assert process.stderr == ""


# --- large frames -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux")
@pytest.mark.parametrize("n_frames", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_memory_of_worker_and_parent_stays_small_for_large_frames(tmp_path, n_frames):
    path = film(tmp_path / "large.mp4", 3840, 2160, n_frames)
    write_video(tmp_path / "small.mp4", moving_square())

    def read(index):
        name = tmp_path / ("large.mp4" if index else "small.mp4")
        return [("video", read_video_safely(name, max_frames=64, fps=1000.0, max_pixels=252 * 252))]

    def megabytes(pid, name) -> float:
        return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1000

    end_idle_readers(0)
    ahead = ReadAhead(read, workers=1)
    ahead.take(0)
    pids = [os.getpid(), guarded._readers_of(os.getpid()).idle[0].process.pid]
    before = [megabytes(pid, "VmRSS") for pid in pids]
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest is set back
    ahead.plan([1])
    (_, clip), = ahead.take(1)
    above = [megabytes(pid, "VmHWM") - start - clip.frames.nbytes / 1e6 for pid, start in zip(pids, before)]
    ahead.close()
    assert len(clip.frames) == n_frames and path.stat().st_size > 0
    assert max(above) < 400, above

# --- the trainer --------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_and_without_reading_ahead(make_trainer, tmp_path):
    runs = [make_trainer(tmp_path / f"{workers}", workers=workers) for workers in (0, 3)]
    assert figures(fit(runs[0])) == figures(fit(runs[1])) and same(weights(runs[0]), weights(runs[1]))
    assert runs[1].feed.ahead._outcomes == {}  # closed at the end


@pytest.mark.parametrize("train", [dict(workers=0), dict(workers=2, ahead_gb=1e-9)])
def test_a_run_that_waits_for_a_clip_is_saved_at_a_signal_and_continues(make_trainer, tmp_path, monkeypatch, train):
    whole = fit(make_trainer(tmp_path / "whole", **train))

    def hang_from_now_on(row):
        if row["step"] == 1:
            monkeypatch.setattr("deepvideo_r1.data.visuals.read_video", hang)
            threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    started = time.perf_counter()
    with pytest.raises(Stopped, match="stopped after 2 steps; the same command continues") as caught:
        fit(make_trainer(tmp_path / "parts", **train), on_step=hang_from_now_on)
    assert caught.value.number == signal.SIGTERM and time.perf_counter() - started < 20
    monkeypatch.undo()
    assert figures(fit(make_trainer(tmp_path / "parts", **train))) == figures(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_hang_are_bad_clips_of_the_run(make_trainer, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("deepvideo_r1.data.visuals.read_video", hang)
    trainer = make_trainer(tmp_path, workers=workers, clip_timeout=0.5)
    with pytest.raises(TrainingError, match="reading took more than 0.5 seconds and was cut off"):
        fit(trainer)
    assert len(trainer.feed.seen.bad) == 4
