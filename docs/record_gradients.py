"""Gradients of single steps at the toy's cold starts where success is rare: `python docs/record_gradients.py CACHE`.

CACHE holds worlds and cold starts; what is missing there is made. Writes `docs/recorded/gradients.json`: for each cold
start and arm the alignment with the gradient of the expected reward, squared signal and noise, and the share of groups
that have an advantage.
"""
import json
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deepvideo_r1.config import ObjectiveConfig, RunConfig
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.toy.cold_start import cold_start
from deepvideo_r1.toy.config import arm_config, rare_success
from deepvideo_r1.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
COLD_STARTS, N_STEPS, N_SKIPPED = (2, 3, 4, 5), 32, 8
ARMS = {  # name -> arm of the toy, and what else is changed in `augment`
    "grpo": ("grpo", {}),
    "grpo_redraw": ("grpo_redraw", {}),
    "grpo_hint": ("grpo_hint", {}),
    "grpo_hint_wrong": ("grpo_hint", {"hint_wrong_share": 1.0}),
    "grpo_da": ("grpo_da", {}),
}


def step_gradients(settings: RunConfig) -> tuple[Tensor, float]:
    "(S, P) gradients of the steps of a policy that stays as it is, and the mean share of groups with an advantage."
    train = replace(settings.train, steps=N_STEPS, inner_updates=1, learning_rate=1e-30, max_grad_norm=1e30)
    kept, shares = [], []
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(load_policy(settings.model), load_processor(settings.model), load_samples(settings.data),
                          directory, train=train, prompt=settings.prompt, rollout=settings.rollout,
                          objective=settings.objective, augment=settings.augment)
        optimizer = trainer.learner.optimizer.optimizer

        def keep(*_):
            weights = [weight for settings in optimizer.param_groups for weight in settings["params"]]
            kept.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))

        optimizer.register_step_pre_hook(keep)
        with closing(trainer.feed):
            for _ in range(N_STEPS):
                shares.append(1 - trainer.step()["vanishing_final"])
    return torch.stack(kept[N_SKIPPED:]).double(), sum(shares[N_SKIPPED:]) / (N_STEPS - N_SKIPPED)


def describe(gradients: Tensor, direction: Tensor) -> dict[str, float]:
    "Alignment of single steps; squared norm of the mean gradient and total variance of a step's, both without bias."
    n_steps = len(gradients)
    whole = float(gradients.pow(2).sum(1).mean())
    signal = (float(gradients.sum(0).pow(2).sum()) / n_steps - whole) / (n_steps - 1)  # mean product of two steps
    cosines = torch.nn.functional.cosine_similarity(gradients, direction[None])
    return {"alignment": float(cosines.mean()), "signal": signal, "noise": whole - signal}


if __name__ == "__main__":
    cache, found = Path(sys.argv[1]), []
    for cold in COLD_STARTS:
        toy = rare_success()
        toy = replace(toy, cold_start=replace(toy.cold_start, seed=cold))
        world, checkpoint, _ = cold_start(toy, cache)

        # The gradient of the expected reward: large groups, other draws, prompts as they are.
        plain = arm_config(toy, "grpo", 100, checkpoint, world / "rl.jsonl", "")
        gradients, _ = step_gradients(replace(plain, objective=ObjectiveConfig("rloo", kl_coef=0.0),
                                              rollout=replace(plain.rollout, group_size=32)))
        direction = gradients.mean(0)
        for name, (arm, changes) in ARMS.items():
            settings = arm_config(toy, arm, 0, checkpoint, world / "rl.jsonl", "")
            settings = replace(settings, augment=replace(settings.augment, **changes))
            gradients, share = step_gradients(settings)
            found.append({"cold_start": cold, "arm": name, "with_advantage": share, **describe(gradients, direction)})
            print(found[-1], flush=True)
    rounded = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in found]
    path = ROOT / "docs" / "recorded" / "gradients.json"
    path.write_text(json.dumps(rounded, indent=1) + "\n")
