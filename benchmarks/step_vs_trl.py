"""A whole training step: TRL's GRPOTrainer against our trainer, on the same text-only model, tokens, batch, KL and optimizer.

TRL does not train on video (trl_with_video.py), so both train a Qwen2. Ours is the language model inside a Qwen2.5-VL with the
same weights; its encoder is never called. Generation is left out on both sides: stored responses come back at once (TRL's
`rollout_func`, our `ReplayEngine`).
"""
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from harness import (EOS, PAD, Options, PeakMemory, check_equal, clock, make_policy, make_rollout, make_text_model, random_ids,
                     save, show, synchronize, use_attention)
from torch import Tensor

from deepvideo_r1.config import AugmentConfig, EngineConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import Prompt, Rollout, Sample
from deepvideo_r1.model.packing import LogpHead
from deepvideo_r1.model.batch import PolicyBatch
from deepvideo_r1.model.policy import PolicyModel, group_logps
from deepvideo_r1.model.processor import load_processor, write_tiny_processor
from deepvideo_r1.model.rollout import ReplayEngine
from deepvideo_r1.trainer import Trainer

LEARNING_RATE, KL, CLIP, BETAS, MAX_NORM = 1e-5, 0.04, 0.2, (0.9, 0.99), 1.0


@dataclass
class Settings(Options):
    "A training step against TRL's."
    repeats: int = 2  # number of times that each side is timed; the sides take turns
    prompt_length: int = 712  # P
    lengths: tuple[int, ...] = (128, 512)  # values of C, tokens of each response
    group_size: int = 8  # G
    prompts: int = 2  # B, number of groups in a step, one in each forward pass

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.prompt_length, self.lengths, self.group_size = 30, (6,), 4


# --- our side ---------------------------------------------------------------------------------------------------------

class EntropyHead(LogpHead):
    "A head that also computes the entropy of every token, as TRL does for its log."
    entropies: list[Tensor] = []

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *, entropy: bool = False, **options: Any):
        if targets is None or not hidden.requires_grad:  # the reference needs none
            return super().forward(hidden, targets, entropy=entropy, **options)
        logps, entropies = super().forward(hidden, targets, entropy=True, **options)
        self.entropies.append(entropies)
        return (logps, entropies) if entropy else logps


class RepeatedRows(PolicyModel):
    "A policy that shares nothing: each response has its own row with the whole prompt."

    def forward(self, batch: PolicyBatch, **options: Any):
        groups = batch.completion_ids.shape[1]
        again = lambda x, axis=0: x.repeat_interleave(groups, axis)
        rows = PolicyBatch(again(batch.prompt_ids), again(batch.prompt_mask), again(batch.prompt_positions, 1),
                           again(batch.next_position), batch.completion_ids.flatten(0, 1)[:, None],
                           batch.completion_mask.flatten(0, 1)[:, None])
        outputs = super().forward(rows, **options)
        grouped = lambda values: values[:, 0].unflatten(0, (-1, groups))
        return tuple(map(grouped, outputs)) if isinstance(outputs, tuple) else grouped(outputs)


class Stored(Trainer):
    "Our trainer with stored prompts: ids without words."
    prompts: dict[str, Prompt]

    def ask(self, sample: Sample, visuals: list, **options: Any) -> Prompt:
        return self.prompts[sample.id]


def score(group: Rollout) -> Rollout:
    return replace(group, rewards=torch.tensor(rewards(group.completion_ids.tolist())))


def replay(groups: list[Rollout]) -> ReplayEngine:
    "An engine that writes these responses to these prompts."
    stored = {tuple(group.prompt.prompt_ids.tolist()): group for group in groups}
    return ReplayEngine(lambda prompt, key: stored[tuple(prompt.prompt_ids.tolist())])


def rewards(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    "A reward that differs within a group."
    return [ids[0] % 7 / 7.0 for ids in completion_ids]


def our_trainer(policy: PolicyModel, groups: list[Rollout], settings: Settings, directory: Path) -> Stored:
    "Our trainer with the settings that TRL gets."
    steps = settings.repeats + 2
    train = TrainConfig(steps=steps, prompts_per_step=len(groups), inner_updates=1, prompts_per_forward=1,
                        learning_rate=LEARNING_RATE, warmup_steps=0, beta1=BETAS[0], beta2=BETAS[1], max_grad_norm=MAX_NORM)
    write_tiny_processor(directory / "processor", ["no word is read"])
    trainer = Stored(policy, load_processor(directory / "processor"), [group.sample for group in groups], directory, train=train,
                     rollout=RolloutConfig(group_size=settings.group_size), sampler=replay(groups), score=score,
                     engine=EngineConfig(check_every=steps),  # in the first step alone, which is not timed
                     objective=ObjectiveConfig("grpo", kl_coef=KL, clip_eps=CLIP, ddof=1, eps=1e-4),
                     augment=AugmentConfig(enabled=False), accelerator=Accelerator(cpu=settings.device == "cpu"))
    trainer.prompts, trainer.feed.visuals = {group.sample.id: group.prompt for group in groups}, lambda index: []
    return trainer


# --- TRL --------------------------------------------------------------------------------------------------------------

def write_checkpoint(model: torch.nn.Module, directory: Path) -> None:
    "Writes the model and a tokenizer with one word for each id: TRL reads both from a directory."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w7"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=f"w{PAD}", eos_token=f"w{EOS}").save_pretrained(directory)
    model.save_pretrained(directory)


def run_trl(checkpoint: Path, groups: list[Rollout], settings: Settings, meter: "Turns") -> tuple[list[dict], torch.nn.Module]:
    "Trains with TRL; `meter` is told of the start and the end of every step. Returns the log and the model."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    stored = {group.sample.id: group for group in groups}

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        answer: dict[str, list] = dict(prompt_ids=[], completion_ids=[], logprobs=None)
        seen: dict[str, int] = {}
        for name in prompts:  # every prompt is in the batch G times
            place = seen[name] = seen.get(name, -1) + 1
            answer["prompt_ids"].append(stored[name].prompt.prompt_ids.tolist())
            answer["completion_ids"].append(stored[name].completion_ids[place].tolist())
        return answer

    class Callback(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            meter.begin("trl")

        def on_step_end(self, *args, **kwargs):
            meter.end("trl")
            meter.others()

    config = GRPOConfig(
        output_dir=str(checkpoint.parent / "trl"), per_device_train_batch_size=settings.group_size,
        gradient_accumulation_steps=len(groups), num_generations=settings.group_size, max_steps=settings.repeats + 2,
        max_completion_length=groups[0].completion_ids.shape[1], beta=KL, epsilon=CLIP, loss_type="grpo", scale_rewards="group",
        use_bias_correction_kl=False,  # the default multiplies the KL by the ratio, which gives another gradient
        temperature=1.0, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=MAX_NORM, optim="adamw_torch", bf16=False,
        gradient_checkpointing=False, use_cpu=settings.device == "cpu", shuffle_dataset=False, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        model_init_kwargs=dict(dtype=settings.dtype, attn_implementation="sdpa"))
    trainer = GRPOTrainer(str(checkpoint), reward_funcs=rewards, args=config, rollout_func=rollout_func,
                          train_dataset=Dataset.from_dict({"prompt": list(stored)}), callbacks=[Callback()])
    log: list[dict] = []

    def keep(logs: dict[str, float], *args) -> None:  # TRL logs the entropy of each of the B forward passes
        log.append({**logs, "entropy": mean(trainer._metrics["train"]["entropy"][-len(groups):])})

    trainer.log = keep
    trainer.train()
    return log, trainer.model


# --- measuring --------------------------------------------------------------------------------------------------------

class Turns:
    "The sides take turns: the first step of each warms up, the second shows peak memory, the others are timed."

    def __init__(self, sides: dict[str, Callable[[], Any]], settings: Settings):
        self.sides, self.settings, self.done = sides, settings, {name: 0 for name in ("trl", *sides)}
        self.meter, self.results = PeakMemory(settings), {name: {} for name in self.done}
        self.rows: dict[str, list[tuple[float, float]]] = {name: [] for name in self.done}

    def begin(self, name: str) -> None:
        if self.done[name] == 1:
            self.meter.start()
        synchronize(self.settings)
        self.started = time.process_time(), time.perf_counter()

    def end(self, name: str) -> None:
        synchronize(self.settings)
        now = time.process_time(), time.perf_counter()
        if self.done[name] == 1:
            self.results[name]["peak_mib"] = self.meter.stop()
        elif self.done[name] > 1:
            self.rows[name].append((now[0] - self.started[0], now[1] - self.started[1]))
            self.results[name] |= {key: median(row[i] for row in self.rows[name]) for i, key in enumerate(("cpu_s", "wall_s"))}
        self.done[name] += 1

    def others(self) -> None:
        for name, run in self.sides.items():
            self.begin(name)
            run()
            self.end(name)


def measure(settings: Settings, n_tokens: int, directory: Path) -> dict:
    "Equality, peak memory and seconds of one length."
    text = make_text_model(settings)
    write_checkpoint(text, directory / "checkpoint")
    policies = {}
    for name, cls in (("packed", PolicyModel), ("repeated", RepeatedRows)):
        policies[name] = policy = make_policy(settings)
        policy.base.model.language_model.load_state_dict(text.model.state_dict())
        policy.base.lm_head.load_state_dict(text.lm_head.state_dict())
        policy.banned = policy.banned[:0]  # TRL scores with the whole vocabulary
        policy.__class__, policy.base.lm_head.__class__ = cls, EntropyHead
        use_attention(policy, True)
    groups = []
    for b in range(settings.prompts):
        prompt = Prompt(random_ids(policy, settings.prompt_length, seed=10 + b))
        group = make_rollout(policy, prompt, settings.group_size, n_tokens)
        groups.append(replace(group, sample=replace(group.sample, id=f"w{b + 8}")))
    case = dict(P=settings.prompt_length, C=n_tokens, G=settings.group_size, B=settings.prompts)
    with torch.no_grad():
        plain = plain_logps(text, groups[0])
        for policy in policies.values():
            case |= check_equal("log-probs of the two models", (group_logps(policy, groups[0]), plain), None, settings)
        groups = [replace(group, sampled_logps=plain_logps(text, group)) for group in groups]
    del text
    trainers = {name: our_trainer(policy, groups, settings, directory / name) for name, policy in policies.items()}
    logs: dict[str, list[dict]] = {name: [] for name in trainers}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            EntropyHead.entropies = []
            logs[name].append(trainers[name].step())
            logs[name][-1]["entropy"] = float(torch.cat(EntropyHead.entropies[:settings.prompts]).mean())
            trainers[name].learner.optimizer.zero_grad()  # so that gradients count in every step's peak, as TRL's do
        return run

    turns = Turns({name: step(name) for name in trainers}, settings)
    logs["trl"], trained = run_trl(directory / "checkpoint", groups, settings, turns)
    case["differences"] = compare_logs(logs, settings)
    with torch.no_grad():
        start, end = plain, plain_logps(trained, groups[0])
        case["logp_change"] = float((end - start).abs().max())
        case["logp_difference_after"] = float((group_logps(policies["packed"], groups[0]) - end).abs().max())
    case["steps"], case["sides"], key = settings.repeats + 2, turns.results, clock(settings)
    sides = case["sides"]
    case["speedup"] = sides["trl"][key] / sides["packed"][key]
    case["speedup_by_sharing"] = sides["repeated"][key] / sides["packed"][key]
    if sides["packed"]["peak_mib"]:
        case["memory_ratio"] = sides["packed"]["peak_mib"] / sides["trl"]["peak_mib"]
    return case


def plain_logps(model: torch.nn.Module, group: Rollout) -> Tensor:
    "(G, C) log-probs by the text model itself."
    ids = group.completion_ids.to(model.device)
    rows = torch.cat([group.prompt.prompt_ids.to(model.device).expand(len(ids), -1), ids], dim=1)
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), logits_to_keep=ids.shape[1] + 1).logits[:, :-1].float()
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def compare_logs(logs: dict[str, list[dict]], settings: Settings) -> dict[str, float]:
    "Largest relative difference of gradient norm and entropy between TRL and ours over all steps; stops where they differ."
    theirs = [row for row in logs["trl"] if "grad_norm" in row]
    assert len(theirs) == len(logs["packed"]) == settings.repeats + 2, "the sides ran different numbers of steps"
    differences = {}
    for name in ("grad_norm", "entropy"):
        pairs = [(a[name], b[name]) for side in ("packed", "repeated") for a, b in zip(logs[side], theirs)]
        differences[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        limit = 1e-4 if settings.dtype == "float32" else 0.1
        if not differences[name] <= limit:
            raise SystemExit(f"{name} differs from TRL's by {differences[name]:.2g} of it, allowed is {limit:g}: {pairs}")
    return differences


def main(settings: Settings) -> None:
    if find_spec("trl") is None:
        raise SystemExit("this benchmark needs TRL: .venv/bin/python -m pip install -c constraints.txt trl")
    warnings.filterwarnings("ignore")
    started, cases = time.perf_counter(), []
    for n_tokens in settings.lengths:
        directory = Path(tempfile.mkdtemp())
        try:
            cases.append(measure(settings, n_tokens, directory))
        finally:
            shutil.rmtree(directory)
        path = save("step_vs_trl", settings, cases)
        print(f"C={n_tokens}: {cases[-1]['speedup']:.2f}x", flush=True)
    table = []
    for case in cases:
        base, key = case["sides"]["trl"], clock(settings)
        table += [[case["P"], case["C"], case["G"], case["B"], name, row["cpu_s"], row["wall_s"], base[key] / row[key],
                   row["peak_mib"], row["peak_mib"] and row["peak_mib"] / base["peak_mib"]]
                  for name, row in case["sides"].items()]
    show("A training step without generation", ["P", "C", "G", "prompts", "side", "CPU s", "wall s", "faster", "peak MiB",
                                                "of TRL's"], table)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
