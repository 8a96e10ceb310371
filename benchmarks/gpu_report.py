"""One report for the day a GPU is there: equality, update time, sampling speed and memory at the shapes of the 3B and the 7B.

It ends within eight minutes on one GPU of 80 GB, downloads nothing, and writes JSON after every section: a section that fails or runs
out of its time is noted with its error, and the next one begins. Updates go through `make_learner` and `update_policy`, sampling through
`complete`, so that what is measured is what trains. Run: python benchmarks/gpu_report.py
"""
import gc
import itertools
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from flops import minimum_flops
from harness import (IMAGE, SIZES, VIDEO, Options, gradients, make_prompt, make_rollout, random_weights, relative_difference, save,
                     show, synchronize, use_attention, vl_config)
from peft import LoraConfig
from repeated_vs_packed import repeated_logps
from rollout_vs_generate import generated
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from deepvideo_r1.config import ObjectiveConfig, PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from deepvideo_r1.model.adapter_files import LORA_TARGETS
from deepvideo_r1.model.adapters import add_adapter
from deepvideo_r1.model.kernels import available_kernels, check_kernels
from deepvideo_r1.model.policy import PolicyModel, group_logps, set_up
from deepvideo_r1.model.rollout import complete
from deepvideo_r1.training.moments import ModelScale
from deepvideo_r1.training.plan import GPUS, Gpu, find_gpu, make_plan
from deepvideo_r1.training.scale import MemoryMeter
from deepvideo_r1.training.update import make_learner, update_policy


@dataclass
class Settings(Options):
    "What one GPU does, and whether it does it right."
    device: str = "cuda"  # device: cuda, or cpu to try the script
    sizes: tuple[str, ...] = ("3b", "7b")  # shapes: 3b, 7b
    prompt_tokens: int = 800  # P: 16 frames of 252 x 252, and 152 words
    tokens: int = 256  # C: tokens of a response in an update
    group_size: int = 8  # G
    layers: int = 4  # layers of the models whose passes are compared
    rows: tuple[int, ...] = (8, 64, 256)  # responses that are written side by side
    sampled: int = 48  # tokens that are sampled of each response
    caches: tuple[str, ...] = ("growing", "graph")  # ways in which the loop keeps keys and values
    groups: int = 2  # groups of an update
    sections: tuple[str, ...] = ()  # sections to run; empty: all
    out_of: float = 450.0  # seconds for everything; sections that would start later are left out

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.device, self.sizes, self.layers, self.out_of = "cpu", ("quick",), 2, 120.0
            self.prompt_tokens, self.tokens, self.group_size, self.rows, self.sampled = 30, 6, 4, (4, 8), 6
            self.caches = ("growing", "static")


SECTIONS = {"kernels": 120.0, "sampling": 80.0, "update with adapters": 80.0, "update of all weights": 80.0, "packed": 90.0}  # seconds


# --- models -----------------------------------------------------------------------------------------------------------

def make_model(settings: Settings, size: str, policy: PolicyConfig, layers: int | None = None) -> PolicyModel:
    "A policy with random weights, made on the device, as training has it."
    name = size if layers is None else f"{size}, {layers} layers"
    text, vision = SIZES[size]
    SIZES[name] = text if layers is None else (*text[:2], layers, *text[3:]), vision
    options = replace(settings, quick=False, size=name, dtype=policy.dtype)
    hf = random_weights(Qwen2_5_VLForConditionalGeneration, vl_config(name), options)
    set_up(hf, gradient_checkpointing=policy.gradient_checkpointing)
    if policy.lora_rank:
        hf = add_adapter(hf, LoraConfig(r=policy.lora_rank, lora_alpha=policy.lora_alpha, target_modules=LORA_TARGETS))
    return PolicyModel(hf, pad_ids=(VIDEO, IMAGE), banned_ids=(VIDEO, IMAGE), attention=settings.attention).to(settings.device)


def prompt_of(settings: Settings, policy: PolicyModel):
    "A prompt about a video, of the settings' length."
    small = dict(side=2, words=10) if settings.quick else dict(side=9, words=152)
    return make_prompt(policy, settings.prompt_tokens, **small)


def gpu_of(settings: Settings) -> Gpu:
    "The card in the planner's table, with the memory that it really has; speeds are 0 for a card that is not in it."
    if settings.device == "cpu":
        return find_gpu("24")
    name, memory = torch.cuda.get_device_name().lower(), torch.cuda.get_device_properties(0).total_memory
    known = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] in name]
    speeds = min(known, key=lambda gpu: abs(gpu.memory - memory)) if known else Gpu(name, memory)
    return speeds._replace(memory=memory, flops=settings.peak_tflops * 1e12 if settings.peak_tflops else speeds.flops)


# --- measuring --------------------------------------------------------------------------------------------------------

class Peak:
    "Bytes at the fullest moment of a `with` block, beside what was there before: torch's allocator on a GPU, `MemoryMeter` on a CPU."

    def __init__(self, settings: Settings, known: list[Tensor]):
        self.meter = MemoryMeter(known) if settings.device == "cpu" else None
        self.before = self.rise = sum(tensor.numel() * tensor.element_size() for tensor in known)

    def __enter__(self):
        if self.meter:
            self.meter.__enter__()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        if self.meter:
            self.meter.__exit__(*error)
            self.rise = self.meter.now.peak
        else:
            torch.cuda.synchronize()
            self.rise = torch.cuda.max_memory_allocated() - self.before


def seconds_of(run: Callable[[], Any], settings: Settings) -> float:
    synchronize(settings)
    started = time.perf_counter()
    run()
    synchronize(settings)
    return time.perf_counter() - started


def against_plan(measured: float, planned: float) -> dict[str, float]:
    return dict(measured_gb=measured / 1e9, planned_gb=planned / 1e9, of_plan=measured / planned)


def free(settings: Settings) -> None:
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()


# --- sections ---------------------------------------------------------------------------------------------------------

def kernels(settings: Settings) -> Iterator[dict]:
    "Attention kernels at the heads of each size: error against everything repeated in float64, and time of a pass."
    dtypes = (torch.float32,) if settings.quick else (torch.bfloat16, torch.float32)
    small = dict(checked=(20, 2, 6), timed=(30, 2, 6), repeats=1) if settings.quick else dict(
        timed=(settings.prompt_tokens, settings.group_size, settings.tokens))
    for dtype, padded, size in itertools.product(dtypes, (False, True), settings.sizes):
        hidden, _, _, heads, kv_heads, _, _ = SIZES[size][0]
        for check in check_kernels(settings.device, dtype, n_heads=heads, n_kv_heads=kv_heads, head_dim=hidden // heads,
                                   padded=padded, **small):
            yield dict(case=f"{size}, {str(dtype)[6:]}{', padded' if padded else ''}", kernel=check.kernel, error=check.error,
                       milliseconds=None if check.seconds is None else 1e3 * check.seconds, reason=check.reason)


def packed(settings: Settings) -> Iterator[dict]:
    "The packed row against repeated rows: log-probs and gradients, for every kernel, on models of few layers."
    for size in settings.sizes:
        for dtype in ("float32",) if settings.quick else ("bfloat16", "float32"):
            policy = make_model(settings, size, PolicyConfig(dtype), settings.layers)
            rollout = make_rollout(policy, prompt_of(settings, policy), settings.group_size, settings.tokens)
            weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(0)).to(settings.device)

            def run(logps: Callable[[], Tensor], shared: bool) -> tuple[Tensor, dict[str, Tensor], float]:
                use_attention(policy, shared)
                policy.zero_grad()
                values: list[Tensor] = []
                seconds = seconds_of(lambda: (values.append(logps()), (values[0] * weights).sum().backward()), settings)
                return values[0].detach(), gradients(policy), seconds

            right, expected, _ = run(lambda: repeated_logps(policy, rollout, vision_once=True), False)
            for kernel in available_kernels(settings.device, getattr(torch, dtype)):
                policy.attention = kernel
                run(lambda: group_logps(policy, rollout), True)  # compiles
                logps, grads, seconds = run(lambda: group_logps(policy, rollout), True)
                gap = (logps - right).abs()
                yield dict(case=f"{size}, {settings.layers} layers, {dtype}", kernel=kernel, logp_difference=float(gap.max()),
                           mean_logp_difference=float(gap.mean()), gradient_difference=relative_difference(grads, expected),
                           milliseconds=1e3 * seconds)
                del grads
            del policy, expected
            free(settings)


def time_token(run: Callable[[int], Any], settings: Settings) -> tuple[float, float]:
    "Seconds of a token, and of what comes before the first: reading the prompts, and recording a graph."
    few = settings.sampled // 3
    long, short = (seconds_of(lambda: run(n_tokens), settings) for n_tokens in (settings.sampled, few))
    token = (long - short) / (settings.sampled - few)
    return token, short - few * token


def sampling(settings: Settings) -> Iterator[dict]:
    "Tokens per second of `complete` with each cache, and of `generate` for one prompt; memory beside that of the plan."
    dtype, gpu = "float32" if settings.quick else "bfloat16", gpu_of(settings)
    for size in settings.sizes:
        policy = make_model(settings, size, PolicyConfig(dtype))
        prompt, scale = prompt_of(settings, policy), ModelScale(policy.base.config)
        features = policy.encode(prompt.patches.to(settings.device), prompt.grid_thw.to(settings.device))
        for rows in settings.rows:
            n_prompts = max(1, rows // settings.group_size)
            uniforms = torch.rand(n_prompts, settings.group_size, settings.sampled, dtype=torch.float64)
            plan = plan_of(settings, PolicyConfig(dtype), scale, gpu, batch_rows=rows, prompts=n_prompts,
                           tokens=settings.sampled)
            moments = scale.sampling(PolicyConfig(dtype), plan.work)
            planned = dict(planned_milliseconds=None if plan.times is None else 1e3 * plan.times.token)
            first = None
            for cache in settings.caches:
                run = lambda n_tokens: complete(policy, [prompt] * n_prompts, uniforms[..., :n_tokens], stop_ids=[-1],
                                                visual_features=[features] * n_prompts, cache=cache)
                run(2)  # loads kernels
                with Peak(settings, [*policy.parameters(), *policy.buffers(), features]) as peak:
                    done = run(settings.sampled)
                first = first or done
                token, before = time_token(run, settings)
                yield dict(case=f"{size}, {rows} rows", cache=cache, tokens_per_second=rows / token,
                           milliseconds_per_token=1e3 * token, **planned, seconds_before=before,
                           equal_ids=(done.ids == first.ids).float().mean().item(),
                           logp_difference=(done.logps - first.logps)[..., 0].abs().max().item(),
                           **against_plan(peak.rise, max(moments[name].peak for name in ("prefill", "decode"))))
            if n_prompts == 1:
                run = lambda n_tokens: generated(policy, prompt, rows, n_tokens)
                run(2)
                token, before = time_token(run, settings)
                use_attention(policy, True)
                yield dict(case=f"{size}, {rows} rows", cache="generate", tokens_per_second=rows / token,
                           milliseconds_per_token=1e3 * token, seconds_before=before)
        del policy
        free(settings)


def plan_of(settings: Settings, policy: PolicyConfig, scale: ModelScale, gpu: Gpu, *, batch_rows: int, prompts: int, tokens: int):
    "The plan of what is measured here."
    run = RunConfig("random", "none", policy=policy, objective=ObjectiveConfig("grpo", kl_coef=0.04),
                    rollout=RolloutConfig(settings.group_size, tokens, batch_rows=batch_rows),
                    train=TrainConfig(prompts_per_step=prompts))
    return make_plan(run, gpu, scale=scale, prompt_tokens=settings.prompt_tokens)


def update(settings: Settings, lora_rank: int) -> Iterator[dict]:
    "Seconds of an update, the share of the GPU's peak, and memory beside that of the plan."
    size, gpu = settings.sizes[0], gpu_of(settings)
    dtype = "float32" if settings.quick else "bfloat16"
    config = PolicyConfig(dtype, lora_rank=lora_rank, lora_alpha=lora_rank or 32, gradient_checkpointing=True)
    policy = make_model(settings, size, config)
    plan = plan_of(settings, config, ModelScale(policy.base.config), gpu, batch_rows=settings.group_size,
                   prompts=settings.groups, tokens=settings.tokens)
    objective, train = plan.config.objective, plan.config.train
    learner = make_learner(policy, Accelerator(cpu=settings.device == "cpu"), objective, train)

    # groups of random responses, scored at random; the encoder's output is kept, as in training
    prompt = prompt_of(settings, policy)
    with torch.no_grad():
        features = policy.encode(prompt.patches.to(settings.device), prompt.grid_thw.to(settings.device))
    groups = [replace(make_rollout(policy, prompt, settings.group_size, settings.tokens), visual_features=features,
                      rewards=torch.rand(settings.group_size)) for _ in range(settings.groups)]
    run = lambda step: update_policy(learner, groups, groups[0], objective=objective, train=train, max_tokens=settings.tokens,
                                     step=step)
    run(0)  # makes AdamW's states
    reference = [] if learner.reference.frozen is None else learner.reference.frozen.parameters()
    states = [x for state in learner.optimizer.state.values() for x in state.values()]
    resident = [*policy.parameters(), *policy.buffers(), *reference, *states]
    with Peak(settings, resident) as peak:
        run(1)
    seconds = seconds_of(lambda: run(2), settings)
    parts = minimum_flops(policy.base, settings.prompt_tokens, settings.tokens, settings.group_size)
    work = settings.groups * sum(parts.values()) * 4 / 3  # forward, backward, and the reference's forward
    if lora_rank:
        work -= settings.groups * (parts["linear"] + parts["head"]) / 3  # frozen weights have no gradient of their own
    moments = ("loss", "layers", "embeddings", "optimizer")
    fullest = max(sum(plan.phases[name].values()) for name in moments)
    yield dict(case=f"{size}, {f'LoRA {lora_rank}' if lora_rank else 'all weights'}", seconds=seconds,
               seconds_per_group=seconds / settings.groups, kernel=policy.attention_kernel(policy.get_input_embeddings().weight),
               planned_seconds=None if plan.times is None else plan.times.update,
               utilisation=work / seconds / gpu.flops if gpu.flops else None, **against_plan(peak.before + peak.rise, fullest))


WORK: dict[str, Callable[[Settings], Iterator[dict]]] = {
    "kernels": kernels, "packed": packed, "sampling": sampling,
    "update with adapters": lambda settings: update(settings, 8 if settings.quick else 64),
    "update of all weights": lambda settings: update(settings, 0)}


# --- the report -------------------------------------------------------------------------------------------------------

@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    "Raises `TimeoutError` within a `with` block that lasts longer, at the next step of Python."
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), 2.0)  # again, where something takes the error for its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(name: str, settings: Settings, seconds: float) -> tuple[list[dict], dict[str, Any]]:
    "The cases of a section, as many as its time allows, and how it ended."
    cases, error, started = [], None, time.perf_counter()
    try:
        with time_limit(seconds):
            for case in WORK[name](settings):
                cases.append({"section": name, **case})
    except (Exception, SystemExit) as problem:
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        traceback.print_exc()
    free(settings)
    return cases, dict(seconds=time.perf_counter() - started, limit=seconds, error=error)


def main(settings: Settings) -> Path:
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --quick tries the script on a CPU")
    started, cases, sections = time.perf_counter(), [], {}
    for name, seconds in SECTIONS.items():
        if settings.sections and name not in settings.sections:
            continue
        left = settings.out_of - (time.perf_counter() - started)
        if left < 5:
            sections[name] = dict(seconds=0.0, limit=0.0, error="not begun: the time for everything is over")
            continue
        found, sections[name] = run_section(name, settings, min(seconds, left))
        cases += found
        path = save("gpu_report", settings, cases, sections=sections, gpu=gpu_of(settings).name, cuda=torch.version.cuda)
        columns = list(dict.fromkeys(key for case in found for key in case if key != "section"))
        show(f"{name}, {sections[name]['seconds']:.0f} s{': ' + str(sections[name]['error']) if sections[name]['error'] else ''}",
             [column.replace("_", " ") for column in columns], [[case.get(column) for column in columns] for case in found])
    path = save("gpu_report", settings, cases, sections=sections, gpu=gpu_of(settings).name, cuda=torch.version.cuda)
    print(path, f"{time.perf_counter() - started:.0f} s")
    return path


if __name__ == "__main__":
    main(tyro.cli(Settings))
