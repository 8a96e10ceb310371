"""What the tests share: tiny checkpoints that vLLM's kernels for CPUs take, prompts of all kinds, and the gap of a sampling."""
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from deepvideo_r1.config import EngineConfig
from deepvideo_r1.core import Clip, Prompt, Sample, make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.engine_check import EngineGap, engine_gap
from deepvideo_r1.model.policy import PolicyModel, load_policy
from deepvideo_r1.model.processor import Processor
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import Sampling, rollout_groups
from deepvideo_r1.model.tiny import make_tiny_checkpoint
from deepvideo_r1.model.vllm_engine import VllmEngine, start_vllm

SMALL = dict(max_length=1024, kv_cache_memory_bytes=64 << 20, block_size=32)  # blocks that a prompt of the toy fills
RATES = (1.0, 0.37, 2.9)  # how much slower than it is a video is said to be


class Bench(NamedTuple):
    "A policy, questions about it, and vLLM."
    path: Path
    policy: PolicyModel
    processor: Processor
    samples: list[Sample]
    prompts: list[Prompt]
    engine: VllmEngine

    @property
    def keys(self) -> list[tuple]:
        return [(0, "test", i) for i in range(len(self.prompts))]

    def sample(self, sampling: Sampling = Sampling(), *, engine=None, chosen=slice(None), group_size=4, max_tokens=12):
        "Rollouts of the prompts, from vLLM where no other engine is named."
        return rollout_groups(self.policy, self.processor, self.samples[chosen], self.prompts[chosen], self.keys[chosen],
                              group_size=group_size, max_tokens=max_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                              top_p=sampling.top_p, engine=engine or self.engine)

    def gap(self, sampling: Sampling = Sampling(), policy: PolicyModel | None = None, **settings) -> EngineGap:
        "How far what vLLM reports is from what a policy computes."
        return engine_gap(policy or self.policy, self.sample(sampling, **settings), sampling)


def slower(visuals, factor: float):
    return [(modality, replace(clip, timestamps=clip.timestamps * factor)) for modality, clip in visuals]


def make_prompts(world: Path, processor: Processor) -> tuple[list[Sample], list[Prompt]]:
    "Videos at three rates, an image, several visuals, and text alone."
    samples, asked = load_samples(world / "rl.jsonl")[:3], []
    for sample in samples[:2]:
        asked += [(sample, slower(load_visuals(sample, processor), rate)) for rate in RATES]
    first, second, third = (load_visuals(sample, processor) for sample in samples)
    image = [("image", Clip(first[0][1].frames[:1], first[0][1].timestamps[:1]))]
    asked += [(samples[0], image), (samples[0], image + first + image + slower(second, 2.0)), (samples[2], third), (samples[2], [])]
    return [sample for sample, _ in asked], [build_prompt(s, visuals, processor, template="think") for s, visuals in asked]


def make_bench(folder: Path, world: Path, *, family: str = "qwen2_5_vl", settings: EngineConfig | None = None, **of_policy) -> Bench:
    "A tiny checkpoint with heads of 96, its policy, and vLLM."
    path = folder / family
    if not path.exists():
        make_tiny_checkpoint(path, family=family, hidden_size=384, n_layers=2)
    policy, processor = load_policy(path, **of_policy), load_processor(path)
    samples, prompts = make_prompts(world, processor)
    settings = settings or EngineConfig(name="vllm", eager=True)
    return Bench(path, policy, processor, samples, prompts, start_vllm(path, policy, settings, **SMALL))


def shake(policy: PolicyModel, part: str, size: float = 0.3) -> None:
    "Changes the weights of one part of a policy, whole or sharded, by some of their own size."
    changed = [(name, weight) for name, weight in policy.named_parameters() if part in name]
    assert changed, part
    with torch.no_grad():
        for name, weight in changed:
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            spread = float(whole.std()) if whole.numel() > 1 else 0.0
            change = size * (spread or 1.0) * torch.randn(whole.shape, generator=make_generator(name, "shake"))
            weight += distribute_tensor(change, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else change
