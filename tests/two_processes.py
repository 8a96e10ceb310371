"""Runs the trainer's cases under a launcher, or in one process, and writes what came of them.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py MODEL QUESTIONS OUT [sharded]

With `sharded` FSDP2 shares the weights out over the processes.
"""
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.experiment import _write_model as write_model
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.trainer import Trainer, fit

AUGMENT = AugmentConfig(enabled=True, min_groups=4, window=10, hint_as="prefix", hint_source="stored")
NO_LIMIT = dict(max_grad_norm=1e9)  # so that what is left in `.grad` is the gradient itself


@dataclass(frozen=True)
class Case:
    "One case: an objective with its settings."
    objective: str
    augment: AugmentConfig = AugmentConfig()
    train: dict = field(default_factory=dict)  # changes of the training settings
    bad: tuple = ()  # samples whose clip is bad
    policy: dict = field(default_factory=dict)  # changes of the policy's settings


CASES = {
    "grpo": Case("grpo", train=dict(prompts_per_forward=2, inner_updates=2)),
    "reg_grpo, adapters": Case("reg_grpo", policy=dict(lora_rank=4)),
    "grpo, adapters that were trained before": Case("grpo", train=dict(prompts_per_forward=2), policy=dict(lora_rank=4)),
    "reg_grpo, augmented": Case("reg_grpo", AUGMENT, dict(prompts_per_forward=4, steps=3)),
    "grpo, one group changed": Case("grpo", replace(AUGMENT, dead_zone=0.3, min_groups=2), dict(prompts_per_step=2, steps=8)),
    "grpo, both groups": Case("grpo", replace(AUGMENT, keep_first=True, dead_zone=0.4), dict(prompts_per_forward=2, steps=3)),
    "grpo, a bad clip": Case("grpo", replace(AUGMENT, window=6), dict(steps=3), tuple(range(3))),
    "grpo, averaged over tokens": Case("grpo", train=dict(prompts_per_forward=2), bad=(1,)),
    "reg_grpo, a rank without a group": Case("reg_grpo", train=dict(prompts_per_step=2, steps=6), bad=(1, 4, 8)),
    "grpo, gradient checkpointing": Case("grpo", train=dict(prompts_per_forward=2), policy=dict(gradient_checkpointing=True)),
    "reg_grpo, checkpointed adapters": Case("reg_grpo", policy=dict(gradient_checkpointing=True, lora_rank=4)),
    "dpo": Case("dpo", train=dict(prompts_per_forward=2)),
    "grpo, without truncated responses": Case("grpo", train=dict(prompts_per_forward=2, drop_truncated=True)),
}
IN_BFLOAT16 = {"all weights": "grpo, averaged over tokens", "adapters": "reg_grpo, adapters", "checkpointed": "grpo, gradient checkpointing"}


def sharding_accelerator() -> Accelerator:
    "FSDP2 on CPUs: accelerate offers it for GPUs, and a hidden state of it decides."
    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True))


def make_trainer(case: str, model: Path, questions: Path, directory: Path, sharded: bool = False, dtype: str = "float32") -> Trainer:
    settings_of_case = CASES[case]
    name, augment, train, bad = settings_of_case.objective, settings_of_case.augment, settings_of_case.train, settings_of_case.bad
    samples = [replace(s, video=f"{s.video}.gone") if i in bad else s for i, s in enumerate(load_samples(questions))]
    settings = dict(steps=2, prompts_per_step=6, learning_rate=1e-3, warmup_steps=2, save_every=2, max_bad_share=0.9)
    policy = load_policy(model, dtype=dtype, **settings_of_case.policy)
    for weight_name, weight in policy.named_parameters():
        if "before" in case and "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.01, generator=make_generator(weight_name))
    return Trainer(policy, load_processor(model), samples, directory, augment=augment,
                   train=TrainConfig(**settings | NO_LIMIT | train), prompt=PromptConfig("plain"),
                   rollout=RolloutConfig(3, max_tokens=24), objective=ObjectiveConfig(name, kl_coef=0.1, length_norm="token" if "tokens" in case else "response"),
                   accelerator=sharding_accelerator() if sharded else Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    "The tensor as one, wherever its slices are."
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in trainer.policy.named_parameters()}


def run_case(case: str, model: Path, questions: Path, directory: Path, export: bool = False, **arrangement) -> dict:
    "Metrics, first gradient, first responses, last weights and the buffer of one case, as this process sees them."
    trainer, responses = make_trainer(case, model, questions, directory, **arrangement), {}
    roll_out = trainer.roll_out

    def noted(samples, prompts, stream, *others):
        groups = roll_out(samples, prompts, stream, *others)
        responses.update({(stream, group.sample.id): group.texts for group in groups})
        return groups

    trainer.roll_out = noted
    rows = [trainer.step()]
    gradients = {name: whole(p.grad) for name, p in trainer.policy.named_parameters() if p.grad is not None}
    while trainer.state.next_step < trainer.config.train.steps:
        rows.append(trainer.step())
    if export:
        write_model(trainer, directory / "model")
    return {"rows": rows, "gradients": gradients, "responses": responses, "buffer": trainer.state.buffer.state_dict(),
            "weights": weights_of(trainer), "bad": trainer.state.seen.bad,
            "processes": trainer.accelerator.num_processes,
            "is_ddp": isinstance(trainer.learner.model, DistributedDataParallel),
            "types": {name: str(p.dtype) for name, p in trainer.policy.named_parameters()},
            "trained": {name for name, p in trainer.policy.named_parameters() if p.requires_grad},
            "units": sum(isinstance(module, FSDPModule) for module in trainer.policy.modules())}


def run_to(steps: int, model: Path, questions: Path, directory: Path, sharded: bool = False) -> dict:
    "A run to a step, from its newest checkpoint where there is one."
    trainer = make_trainer("reg_grpo, augmented", model, questions, directory, sharded)
    trainer.config = replace(trainer.config, train=replace(trainer.config.train, steps=steps))
    rows = [repeatable(row) for row in fit(trainer)]
    write_model(trainer, directory / "model")
    return {"rows": rows, "weights": weights_of(trainer), "buffer": trainer.state.buffer.state_dict()}


def run_twice(model: Path, questions: Path, directory: Path, sharded: bool) -> dict:
    "A run that stops at a checkpoint and continues in a new trainer, and the same run in one go."
    run_to(2, model, questions, directory / "parts", sharded)
    return {"whole": run_to(4, model, questions, directory / "whole", sharded),
            "parts": run_to(4, model, questions, directory / "parts", sharded)}


def main(model: Path, questions: Path, directory: Path, sharded: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = Accelerator(cpu=True).process_index
    found = {case: run_case(case, model, questions, directory / case, sharded=sharded) for case in CASES}
    found["bfloat16"] = {name: run_case(case, model, questions, directory / name, sharded=sharded, dtype="bfloat16")
                         for name, case in IN_BFLOAT16.items()}
    found["untied"] = run_case("grpo", model.parent / "untied", questions, directory / "untied", sharded=sharded)
    found["exported adapters"] = run_case("reg_grpo, adapters", model, questions, directory / "exported", sharded=sharded,
                                          export=True)
    found["resumed"] = run_twice(model, questions, directory, sharded)
    torch.save(found, directory / f"found-{rank}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sharded="sharded" in sys.argv[4:])
