"""What each side of video_step_vs_peers.py counts and times; it needs no package but torch, for the processes of the peers."""
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory import PeakMemory
from torch import Tensor, nn

LEARNING_RATE, KL, CLIP, BETAS, MAX_NORM, FPS = 1e-5, 0.04, 0.2, (0.9, 0.99), 1.0, 2.0


@dataclass
class Case:
    "One case; every process reads it from `case.json` in its folder, beside the model, the clip and the rows."
    P: int  # tokens of the prompt, on every side
    C: int  # tokens of every response
    G: int  # responses to each prompt
    B: int  # prompts of a step, one in each forward pass
    frames: int  # frames of the clip that are read, two for each second
    side: int  # tokens along a side of a frame
    rounds: int  # timed steps of each side; two more come before them
    threads: int
    suppressed: list[int]  # ids that no side draws, so that every response has C tokens
    pad_ids: dict[str, int]  # ids of the placeholders of image and video
    top_p: float = 1.0  # Video-R1 has 0.95 in its code
    device: str = "cpu"  # for `PeakMemory`

    @classmethod
    def read(cls, folder: Path) -> "Case":
        return cls(**json.loads((folder / "case.json").read_text()))

    def write(self, folder: Path) -> None:
        (folder / "case.json").write_text(json.dumps(asdict(self)))


def reward(text: str) -> float:
    "A reward that differs within a group."
    return len(text) % 7 / 7.0


def filled(question: str, count: Callable[[str], int], length: int) -> str:
    "The question with as many letters behind it as make the prompt `length` tokens: one letter is one token."
    missing = length - count(question)
    if missing < 0:
        raise SystemExit(f"the shortest prompt has {count(question)} tokens, {length} are asked for: raise P")
    text = question + "x" * missing
    assert count(text) == length, f"{missing} letters made {count(text) - count(question)} tokens"
    return text


# --- counting ---------------------------------------------------------------------------------------------------------

def count_model(encoder: nn.Module, language_model: nn.Module, counts: Counter, prompt_length: int) -> None:
    "Counts videos that the encoder reads, prompts that the language model reads in full, and passes for single tokens."

    def encoder_runs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        counts["videos_encoded"] += len(grid)

    def language_model_runs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if isinstance(x, Tensor)]
        rows, width = given[0].shape[:2]
        counts["prompts_read" if width >= prompt_length else "decoding_passes"] += rows if width >= prompt_length else 1

    encoder.register_forward_pre_hook(encoder_runs, with_kwargs=True)
    language_model.register_forward_pre_hook(language_model_runs, with_kwargs=True)


def count_decoded(counts: Counter) -> None:
    "Counts the files that decord opens."
    import decord

    opened = decord.VideoReader.__init__

    def counted(self, *args: Any, **kwargs: Any) -> None:
        counts["files_decoded"] += 1
        opened(self, *args, **kwargs)

    decord.VideoReader.__init__ = counted


def keep_gradients(accelerator: Any, model: nn.Module, kept: dict[str, Tensor]) -> None:
    "Fills `kept` with the gradients of the next update, as they are before they are scaled down."
    clip = accelerator.clip_grad_norm_

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.update({name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None})
        accelerator.clip_grad_norm_ = clip
        return clip(*args, **kwargs)

    accelerator.clip_grad_norm_ = keep


# --- timing -----------------------------------------------------------------------------------------------------------

class Meter:
    "The steps of one side: the first warms up, the second shows peak memory, the others are timed."

    def __init__(self, counts: Counter, case: Case):
        self.counts, self.memory, self.done, self.generation = counts, PeakMemory(case), 0, 0.0
        self.result: dict[str, Any] = {"cpu_s": [], "wall_s": [], "generation_s": []}

    def begin(self) -> None:
        gc.collect()
        self.counts.clear()
        self.generation = 0.0
        if self.done == 1:
            self.memory.start()
        self.started = time.process_time(), time.perf_counter()

    def end(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self.done == 1:
            self.result["peak_mib"] = self.memory.stop()
        elif self.done > 1:
            for name, value in zip(("cpu_s", "wall_s"), (now[0] - self.started[0], now[1] - self.started[1])):
                self.result[name].append(value)
            self.result["generation_s"].append(self.generation)
        self.result["counts"] = dict(self.counts)
        self.done += 1

    def generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        "The same function; its CPU seconds count as generation."

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.generation += time.process_time() - started

        return run
