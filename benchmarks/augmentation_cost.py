"""What difficulty-aware augmentation costs: responses sampled, videos encoded and seconds of a training step, on the toy."""
import functools
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from harness import Options, clock, save, show, timed
from transformers.utils.logging import disable_progress_bar

from deepvideo_r1.config import AugmentConfig
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.toy.cold_start import cold_start
from deepvideo_r1.toy.config import ColdStartConfig, ToyConfig, WorldConfig
from deepvideo_r1.trainer import Trainer

WARM_UP = 2  # steps that are not counted: the buffer fills, files are decoded


@dataclass
class Settings(Options):
    "A step without augmentation, with it, and with parts of it, all from the toy's cold start."
    steps: int = 12  # number of steps that are counted
    cache: Path = Path("runs/toy/cache")  # folder of worlds and cold starts, made when missing

    def toy(self) -> ToyConfig:
        if not self.quick:
            return ToyConfig()
        return ToyConfig(world=WorldConfig(sft_videos=16, rl_videos=16, eval_videos=4),
                         cold_start=ColdStartConfig(vision_steps=1, sft_steps=1, sft_batch=4, vision_batch=4, hidden_size=48, n_layers=1))


def variants(augment: AugmentConfig) -> dict[str, AugmentConfig]:
    "What is compared: each variant samples second groups in another way."
    on = replace(augment, enabled=True)
    return {"no augmentation": replace(augment, enabled=False), "second draw": replace(on, redraw_only=True),
            "noise alone": replace(on, hint_scale=0.0), "stored hints alone": replace(on, noise_scale=0.0),
            "augmentation, stored hints": on, "augmentation, sampled hints": replace(on, hint_source="sampled"),
            "vanishing groups only": replace(on, second_group="vanishing")}


def count_videos(trainer: Trainer) -> list[int]:
    "Every call of the encoder adds its number of videos to the list."
    encode, counted = trainer.policy.encode, []
    trainer.policy.encode = lambda patches, grid: (counted.append(len(grid)), encode(patches, grid))[1]
    return counted


def main(settings: Settings) -> None:
    disable_progress_bar()
    toy = settings.toy()
    steps = 2 if settings.quick else settings.steps
    world, model, _ = cold_start(toy, settings.cache)
    samples, processor = load_samples(world / "rl.jsonl"), load_processor(model)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: Trainer(load_policy(model), processor, samples, folder, train=toy.train, prompt=toy.prompt, rollout=toy.rollout,
                                  objective=toy.reg_grpo, augment=augment, accelerator=Accelerator(cpu=True))
                    for name, augment in variants(toy.augment).items()}
        for trainer in trainers.values():  # every clip stays in memory: reading files is not measured
            trainer.feed.visuals = functools.cache(trainer.feed.visuals)
        counters = {name: count_videos(trainer) for name, trainer in trainers.items()}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for step in range(WARM_UP + steps):
            for name, trainer in trainers.items():  # in turns
                counters[name].clear()
                metrics: list[dict[str, float]] = []
                before = trainer.state.responses
                seconds = timed(lambda: metrics.append(trainer.step()), settings)
                row = metrics[0] | seconds | {"new_responses": trainer.state.responses - before, "videos": sum(counters[name])}
                if step >= WARM_UP:
                    rows[name].append(row)
    cases, plain = [], None
    for name, step_rows in rows.items():
        mean = lambda key: statistics.fmean(row[key] for row in step_rows)
        case: dict[str, Any] = {"variant": name, "responses": mean("new_responses"), "videos_encoded": mean("videos"),
                                "vanishing": mean("vanishing_final"), "no_trace": mean("no_trace_groups"),
                                "cpu_s": statistics.median(row["cpu"] for row in step_rows), "wall_s": statistics.median(row["wall"] for row in step_rows)}
        plain = plain or case
        cases.append(case | {"response_ratio": case["responses"] / plain["responses"], "time_ratio": case[clock(settings)] / plain[clock(settings)]})
    show(f"one step of the toy: {toy.train.prompts_per_step} groups of {toy.rollout.group_size}, {toy.train.inner_updates} inner updates",
         ["variant", "responses", "x", "videos encoded", f"{clock(settings)[:-2]} seconds", "x", "vanishing, trained", "hard, without trace"],
         [[c["variant"], c["responses"], c["response_ratio"], c["videos_encoded"], c[clock(settings)], c["time_ratio"], c["vanishing"], c["no_trace"]] for c in cases])
    print(save("augmentation_cost", settings, cases))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Settings))
