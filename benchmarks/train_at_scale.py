"""A training run with weights of the size of the 3B or the 7B, through the same call as the toy: seconds, memory, and the plan beside them.

The weights are random and the clips are drawn here, so nothing is downloaded; what is learnt means nothing, and what it costs does.
"""
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import tyro
from gpu_report import against_plan, gpu_of
from harness import SIZES, Options, random_weights, save, show, vl_config
from transformers import Qwen2_5_VLForConditionalGeneration

from deepvideo_r1.config import AugmentConfig, RunConfig, small_1gpu
from deepvideo_r1.experiment import run_training
from deepvideo_r1.model.processor import write_tiny_processor
from deepvideo_r1.model.tiny import tiny_texts
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.training.moments import ModelScale
from deepvideo_r1.training.plan import make_plan


@dataclass
class Settings(Options):
    "A few steps of training at the size of a real model."
    size: Literal["quick", "tiny", "3b", "7b"] = "7b"  # size of the model
    device: str = "cuda"  # device: cuda, or cpu to try the script
    steps: int = 3  # training steps; the first also loads kernels
    prompts: int = 4  # questions of a step
    tokens: int = 256  # longest response
    caches: tuple[str, ...] = ("growing", "graph")  # a run for each
    folder: Path = Path("runs/train_at_scale")  # checkpoint (15 GB for the 7B), clips and runs; removed at the end

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.device, self.steps, self.prompts, self.tokens, self.caches = "cpu", 2, 2, 6, ("growing", "static")


def write_checkpoint(folder: Path, settings: Settings) -> Path:
    "Random weights of the chosen size beside the toy's tokenizer, in Hugging Face layout."
    pixels = 28 * 28 if settings.quick else 252 * 252
    tokenizer = write_tiny_processor(folder, tiny_texts(), max_pixels=pixels)
    config, vocabulary = vl_config(settings.size), tokenizer.get_vocab()
    for name, token in dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
                            vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>").items():
        setattr(config, name, vocabulary[token])
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.eos_token_id, config.text_config.pad_token_id = vocabulary["<|im_end|>"], tokenizer.pad_token_id
    options = replace(settings, quick=False, dtype="float32" if settings.quick else "bfloat16")
    model = random_weights(Qwen2_5_VLForConditionalGeneration, config, options)
    model.generation_config.eos_token_id = vocabulary["<|im_end|>"]
    model.save_pretrained(folder, max_shard_size="5GB")
    return folder


def write_clip(path: Path, seed: int, *, side: int, frames: int) -> None:
    "A square that moves over a gradient, as an H.264 file of two frames a second."
    rng, grid = np.random.default_rng(seed), np.linspace(0, 255, side)
    picture = np.stack(np.broadcast_arrays(grid[:, None], grid[None], np.full((side, side), rng.uniform(0, 255))), -1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=2)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            frame, left = picture.copy(), int((side - 40) * t / frames)
            frame[left : left + 40, left : left + 40] = rng.uniform(0, 255, 3)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())


def write_questions(folder: Path, settings: Settings) -> Path:
    "A JSONL file of questions with a clip each."
    rows = []
    for i in range(2 * settings.prompts):
        write_clip(folder / f"{i}.mp4", i, side=56 if settings.quick else 252, frames=16)
        rows.append(dict(id=str(i), video=f"{i}.mp4", question="how many squares red ?", kind="number", answer=str(i % 4)))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


def run_config(model: Path, data: Path, out: Path, settings: Settings, cache: str) -> RunConfig:
    "The preset for one GPU, with adapters, as `deepvideo-r1 train --preset small_1gpu` has it."
    config = small_1gpu(str(model), str(data))
    rank = 4 if settings.quick else config.policy.lora_rank
    prompt = replace(config.prompt, template="plain", max_frames=16, max_pixels=28 * 28 if settings.quick else 252 * 252)
    return replace(
        config, out=str(out), prompt=prompt, augment=AugmentConfig(enabled=False),
        policy=replace(config.policy, lora_rank=rank, dtype="float32" if settings.quick else "bfloat16"),
        rollout=replace(config.rollout, max_tokens=settings.tokens, cache=cache, batch_rows=None),
        train=replace(config.train, steps=settings.steps, prompts_per_step=settings.prompts))


def measure(config: RunConfig, settings: Settings, scale: ModelScale) -> dict:
    "Seconds and memory of a run, beside the plan's."
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run_training(config)
    whole = time.perf_counter() - started
    rows = read_jsonl(Path(config.out) / "metrics.jsonl")
    later = rows[1:] or rows
    peak = math.nan if settings.device == "cpu" else torch.cuda.max_memory_allocated()
    plan = make_plan(config, gpu_of(settings), scale=scale, prompt_tokens=800)
    mean = lambda name: sum(row[name] for row in later) / len(later)
    phases = {name: mean(f"seconds_{name}") for name in ("clips", "sampling", "reference", "update")}
    return dict(case=f"{settings.size}, {config.rollout.cache}", seconds_in_all=whole, seconds_first=rows[0]["seconds"],
                seconds_per_step=mean("seconds"), **phases, mean_response=mean("completion_length"), sampler_gap=mean("sampler_gap"),
                planned_seconds=plan.times and plan.times.step,
                **against_plan(peak, max(sum(parts.values()) for parts in plan.phases.values())))


def main(settings: Settings) -> None:
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --quick tries the script on a CPU")
    shutil.rmtree(settings.folder, ignore_errors=True)
    (settings.folder / "model").mkdir(parents=True)
    started = time.perf_counter()
    model, data = write_checkpoint(settings.folder / "model", settings), write_questions(settings.folder, settings)
    print(f"checkpoint and clips: {time.perf_counter() - started:.0f} s", flush=True)
    cases = []
    for cache in settings.caches:
        config = run_config(model, data, settings.folder / cache, settings, cache)
        cases.append(measure(config, settings, ModelScale(vl_config(settings.size))))
        path = save("train_at_scale", settings, cases)
        print(cases[-1], flush=True)
    show(f"{SIZES[settings.size][0][2]} layers, adapters, {settings.prompts} groups of 8 a step", list(cases[0]),
         [list(case.values()) for case in cases])
    shutil.rmtree(settings.folder)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
