"""Runs the trainer's cases under a launcher, or in one process, and writes what came of them.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py MODEL QUESTIONS OUT
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.trainer import Trainer, fit

AUGMENT = AugmentConfig(enabled=True, min_groups=4, window=10, hint_as="prefix", hint_source="stored")
NO_LIMIT = dict(max_grad_norm=1e9)  # so that what is left in `.grad` is the gradient itself
CASES = {  # objective, augmentation, changes of the training settings, samples whose clip is bad, rank of adapters
    "grpo": ("grpo", AugmentConfig(), dict(prompts_per_forward=2, inner_updates=2), (), 0),
    "reg_grpo, adapters": ("reg_grpo", AugmentConfig(), dict(prompts_per_forward=1), (), 4),
    "grpo, adapters that were trained before": ("grpo", AugmentConfig(), dict(prompts_per_forward=2), (), 4),
    "reg_grpo, augmented": ("reg_grpo", AUGMENT, dict(prompts_per_forward=4, steps=3), (), 0),
    "grpo, both groups": ("grpo", replace(AUGMENT, keep_first=True, dead_zone=0.4),
                          dict(prompts_per_forward=2, steps=3), (), 0),
    "grpo, a bad clip": ("grpo", replace(AUGMENT, window=6), dict(prompts_per_forward=1, steps=3), range(3), 0),
    "grpo, averaged over tokens": ("grpo", AugmentConfig(), dict(prompts_per_forward=2), (1,), 0),
    "reg_grpo, a rank without a group": ("reg_grpo", AugmentConfig(), dict(prompts_per_step=2, steps=6), (1, 4, 8), 0),
}


def make_trainer(case: str, model: Path, questions: Path, directory: Path) -> Trainer:
    name, augment, train, bad, lora_rank = CASES[case]
    samples = [replace(s, video=f"{s.video}.gone") if i in bad else s for i, s in enumerate(load_samples(questions))]
    settings = dict(steps=2, prompts_per_step=6, learning_rate=1e-3, warmup_steps=2, save_every=2, max_bad_share=0.9)
    policy = load_policy(model, lora_rank=lora_rank)
    for weight_name, weight in policy.named_parameters():
        if "before" in case and "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.01, generator=make_generator(weight_name))
    return Trainer(policy, load_processor(model), samples, directory, augment=augment,
                   train=TrainConfig(**settings | NO_LIMIT | train), prompt=PromptConfig("plain"),
                   rollout=RolloutConfig(3, max_tokens=24), objective=ObjectiveConfig(name, kl_coef=0.1, length_norm="token" if "tokens" in case else "response"),
                   accelerator=Accelerator(cpu=True))


def run_case(case: str, model: Path, questions: Path, directory: Path) -> dict:
    "Metrics, first gradient, first responses, last weights and the buffer of one case, as this process sees them."
    trainer, responses = make_trainer(case, model, questions, directory), {}
    roll_out = trainer.roll_out

    def noted(samples, prompts, stream, *others):
        groups = roll_out(samples, prompts, stream, *others)
        responses.update({(stream, group.sample.id): group.texts for group in groups})
        return groups

    trainer.roll_out = noted
    rows = [trainer.step()]
    gradients = {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}
    while trainer.state.next_step < trainer.config.train.steps:
        rows.append(trainer.step())
    return {"rows": rows, "gradients": gradients, "responses": responses, "buffer": trainer.state.buffer.state_dict(),
            "weights": {name: p.detach() for name, p in trainer.policy.named_parameters()}, "bad": trainer.state.seen.bad,
            "processes": trainer.accelerator.num_processes,
            "is_ddp": isinstance(trainer.learner.model, DistributedDataParallel)}


def run_twice(model: Path, questions: Path, directory: Path) -> dict:
    "A run that stops at a checkpoint and continues in new trainers, and the same run in one go."
    found = {}
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            trainer = make_trainer("reg_grpo, augmented", model, questions, directory / name)
            trainer.config = replace(trainer.config, train=replace(trainer.config.train, steps=steps))
            rows = fit(trainer)
        found[name] = {"rows": rows, "weights": {n: p.detach() for n, p in trainer.policy.named_parameters()},
                       "buffer": trainer.state.buffer.state_dict()}
    return found


def main(model: Path, questions: Path, directory: Path) -> None:
    torch.set_num_threads(1)
    rank = Accelerator(cpu=True).process_index
    found = {case: run_case(case, model, questions, directory / case) for case in CASES}
    found["resumed"] = run_twice(model, questions, directory)
    torch.save(found, directory / f"found-{rank}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
