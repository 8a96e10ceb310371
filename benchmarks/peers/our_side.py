"""Our trainer on the clip of a case: a step that is counted and timed, and the check against what a peer has computed."""
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from harness import Options, check_equal
from peers.measuring import BETAS, CLIP, FPS, KL, LEARNING_RATE, MAX_NORM, Case, Meter, count_model, filled, keep_gradients, reward
from torch import Tensor

import deepvideo_r1.data.visuals as reading
from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import Prompt, Rollout, Sample
from deepvideo_r1.data.clip_cache import visuals_loader
from deepvideo_r1.model.asking import prompt_for
from deepvideo_r1.model.policy import PolicyModel, group_logps, load_policy
from deepvideo_r1.model.processor import load_processor
from deepvideo_r1.model.rollout import ReplayEngine
from deepvideo_r1.trainer import Trainer

QUESTION = "what colour is the ball ?"


class Handed(Trainer):
    "Our trainer, which can be handed groups: their prompts, an engine that plays back the responses, and their rewards."
    given: list[Rollout] | None = None

    def hand(self, groups: list[Rollout] | None) -> None:
        "The next step is about these groups, in the order of its questions; None: about its own again."
        self.given, self.places = groups, {}
        self.sampler = None if groups is None else ReplayEngine(lambda prompt, key: self.group_of(key[-1]))

    def roll_out(self, *args: Any, **options: Any) -> list[Rollout]:
        groups = super().roll_out(*args, **options)
        given = lambda group: replace(group, rewards=self.group_of(group.sample.id).rewards)
        return groups if self.given is None else list(map(given, groups))

    def group_of(self, name: str) -> Rollout:
        return self.given[self.places.setdefault(name, len(self.places))]

    def ask(self, sample: Sample, visuals: list, **changes: Any) -> Prompt:
        return super().ask(sample, visuals, **changes) if self.given is None else self.group_of(sample.id).prompt


@contextmanager
def at_positions(policy: PolicyModel, groups: list[dict[str, Any]]) -> Iterator[None]:
    "Within a `with` block the policy puts each prompt of a peer where the peer has put it."
    key, own = lambda ids: tuple(ids.tolist()), policy.positions
    places = {key(group["prompt_ids"]): (group["positions"], int(group["next"])) for group in groups}
    policy.positions = lambda prompt: places.get(key(prompt.prompt_ids)) or own(prompt)
    try:
        yield
    finally:
        del policy.positions


class OurSide:
    """Our trainer with the settings that the peers get.

    Within its `with` block clips are read in this process, so that their seconds count, and not in one of their own.
    """

    def __init__(self, case: Case, folder: Path):
        self.case, self.counts, self.read_safely = case, Counter(), reading.read_video_safely
        self.meter = Meter(self.counts, case)
        policy, processor = load_policy(folder / "model"), load_processor(folder / "model")
        policy.banned = torch.tensor(case.suppressed)
        prompt = PromptConfig(template="plain", max_frames=case.frames, fps=FPS, max_pixels=(case.side * processor.factor)**2)

        # a new sample for every prompt of every step, whose clip is decoded anew, with a prompt of P tokens
        steps = case.rounds + 3  # the check, and two steps before the timed ones
        sample = Sample(id="s", video=str(folder / "clip.mp4"), question=QUESTION, answer="w", kind="text")
        visuals = visuals_loader(prompt)(sample, processor)
        count = lambda text: len(prompt_for(policy, processor, replace(sample, question=text), visuals, template="plain",
                                            max_tokens=case.C).prompt_ids)
        sample = replace(sample, question=filled(QUESTION, count, case.P))
        self.trainer = Handed(
            policy, processor, [replace(sample, id=f"s{i}") for i in range(steps * case.B)], folder / "ours", prompt=prompt,
            train=TrainConfig(steps=steps, prompts_per_step=case.B, inner_updates=1, prompts_per_forward=1, warmup_steps=0,
                              learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], max_grad_norm=MAX_NORM, workers=0),
            rollout=RolloutConfig(group_size=case.G, max_tokens=case.C, top_p=case.top_p),
            objective=ObjectiveConfig("grpo", kl_coef=KL, clip_eps=CLIP, ddof=1, eps=1e-4), augment=AugmentConfig(enabled=False),
            score=lambda group: replace(group, rewards=torch.tensor([reward(text) for text in group.texts])),
            accelerator=Accelerator(cpu=True))

        # what is counted
        for model in (self.trainer.policy, self.trainer.learner.reference.frozen):
            count_model(model.base.model.visual, model.base.model.language_model, self.counts, case.P)
        self.trainer.roll_out = self.meter.generating(self.trainer.roll_out)

    def __enter__(self) -> "OurSide":
        def read_here(path: str, *, read: Callable[..., Any], timeout: float, **settings: Any) -> Any:
            self.counts["files_decoded"] += 1
            return read(path, **settings)

        reading.read_video_safely = read_here
        return self

    def __exit__(self, *error: Any) -> None:
        reading.read_video_safely = self.read_safely

    def step(self) -> None:
        "One training step, counted and timed."
        self.meter.begin()
        metrics = self.trainer.step()
        self.trainer.learner.optimizer.zero_grad()  # as the peers do after each step: gradients count in every peak
        self.meter.end()
        assert metrics["tokens"] == self.case.B * self.case.G * self.case.C, f"{metrics['tokens']} tokens were sampled"

    def check(self, name: str, groups: list[dict[str, Any]], gradients: dict[str, Tensor]) -> dict[str, float]:
        """Trains on a peer's first groups: log-probs and gradients must be the peer's; raises `SystemExit` otherwise.

        A group has `prompt_ids`, `patches`, `grid`, `seconds`, `positions` (3, P), `next` (position of the first response
        token), `ids` (G, C), `logps` (G, C) and `rewards`. Both sides score over the whole vocabulary here.
        """
        policy, trainer = self.trainer.policy, self.trainer
        both, banned = (policy, trainer.learner.reference.frozen), policy.banned
        for model in both:
            model.banned = banned[:0]
        rollouts = [as_rollout(group, sample) for group, sample in zip(groups, trainer.samples)]
        trainer.hand(rollouts)
        config = trainer.config  # the given log-probs are over the whole vocabulary: so is the comparison with an engine
        trainer.config = replace(config, rollout=replace(config.rollout, top_p=1.0))
        theirs = torch.stack([group["logps"] for group in groups])
        score = lambda: torch.stack([group_logps(policy, group) for group in rollouts])
        with torch.no_grad():
            own_positions = float((score() - theirs).abs().max())
        kept: dict[str, Tensor] = {}
        keep_gradients(trainer.learner.accelerator, policy.base, kept)
        with at_positions(policy, groups):
            with torch.no_grad():
                logps = score()
            trainer.step()
        found = check_equal(f"{name} and ours", (logps, theirs), (kept, gradients), Options(threads=self.case.threads))
        trainer.hand(None)
        trainer.config = config
        for model in both:
            model.banned = banned
        trainer.learner.optimizer.zero_grad()
        return found | {"logp_difference_own_positions": own_positions}


def as_rollout(group: dict[str, Any], sample: Sample) -> Rollout:
    "A peer's group as our record."
    prompt = Prompt(group["prompt_ids"], group["patches"], group["grid"], ("video",), (float(group["seconds"]),))
    return Rollout(sample, prompt, group["ids"], torch.ones_like(group["ids"], dtype=torch.bool), group["logps"],
                   rewards=group["rewards"])
