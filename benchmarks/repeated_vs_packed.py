"""Log-probs of a group, forward and backward: G whole rows through transformers against one packed row."""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import tyro
from flops import counter, minimum_flops
from harness import (Options, check_equal, clean_heap, clock, gradients, interleaved, make_policy, make_prompt, make_rollout,
                     peak_memory, save, show, use_attention)
from rich.progress import track
from torch import Tensor

from deepvideo_r1.core import Rollout
from deepvideo_r1.model.policy import PolicyModel, group_logps

SIDES = ("repeated", "vision_once", "packed")


@dataclass
class Settings(Options):
    "Repeated rows against the packed row."
    repeats: int = 2  # number of times that each side is timed; the sides take turns
    prompt_lengths: tuple[int, ...] = (712, 1400)  # values of P; 712 tokens hold 16 frames of 252 x 252
    lengths: tuple[int, ...] = (128, 512)  # values of C, tokens of each response
    groups: tuple[int, ...] = (4, 8, 16)  # values of G
    every: bool = False  # all combinations; without it the long prompt has G = 8 alone

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.prompt_lengths, self.lengths, self.groups = (30,), (6,), (4,)

    def cases(self) -> list[tuple[int, int, int]]:
        "(P, C, G) of each case."
        combinations = [(p, c, g) for p in self.prompt_lengths for c in self.lengths for g in self.groups]
        return [case for case in combinations if self.every or case[0] == self.prompt_lengths[0] or case[2] == 8]


def repeated_logps(policy: PolicyModel, rollout: Rollout, *, vision_once: bool = False) -> Tensor:
    """(G, C) log-probs by transformers' own forward of G whole rows, as trainers compute them.

    Every row holds prompt, video and response, and the encoder runs for each of them; with `vision_once` it runs once. Logits
    are computed for the responses alone. Both sides score the distribution without placeholders.
    """
    prompt, ids = rollout.prompt, rollout.completion_ids.to(policy.device)
    groups, n_tokens = ids.shape
    where, following = policy.positions(prompt)
    after = following + torch.arange(n_tokens)
    positions = torch.cat([where, after.expand(3, -1)], dim=1)[:, None].expand(-1, groups, -1).to(policy.device)
    rows = torch.cat([prompt.prompt_ids.to(policy.device).expand(groups, -1), ids], dim=1)
    inputs = dict(input_ids=rows)
    if prompt.patches is not None:
        patches, grid = prompt.patches.to(policy.device, policy.base.dtype), prompt.grid_thw.to(policy.device)
        if vision_once:
            embeds = policy.get_input_embeddings()(rows)
            features = policy.encode(patches, grid).to(embeds.dtype)
            pads = torch.isin(rows, torch.tensor(policy.pad_ids, device=rows.device))
            inputs = dict(inputs_embeds=embeds.masked_scatter(pads[..., None], features.repeat(groups, 1)))
        else:
            inputs |= dict(pixel_values_videos=patches.repeat(groups, 1), video_grid_thw=grid.repeat(groups, 1))
    logits = policy.base(**inputs, position_ids=positions, attention_mask=torch.ones_like(rows), use_cache=False,
                         logits_to_keep=n_tokens + 1).logits[:, :-1].float().index_fill(-1, policy.banned, float("-inf"))
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def make_sides(policy: PolicyModel, rollout: Rollout) -> dict[str, Callable[[], Tensor]]:
    "Forward and backward of each side, on the same weights; each returns its log-probs."
    weights = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(0)).to(policy.device)

    def side(logps: Callable[[], Tensor], packed: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            use_attention(policy, packed)
            policy.zero_grad(set_to_none=False)
            values = logps()
            (values * weights).sum().backward()
            return values.detach()
        return run

    return {"repeated": side(lambda: repeated_logps(policy, rollout), False),
            "vision_once": side(lambda: repeated_logps(policy, rollout, vision_once=True), False),
            "packed": side(lambda: group_logps(policy, rollout), True)}


@contextmanager
def split_attention(policy: PolicyModel) -> Iterator[None]:
    "A context in which the policy uses the kernel whose FLOPs the counter knows."
    chosen, policy.attention = policy.attention, "split"
    try:
        yield
    finally:
        policy.attention = chosen


def inspect(policy: PolicyModel, rollout: Rollout, sides: dict[str, Callable[[], Tensor]], options: Options) -> dict:
    "Equality, FLOPs and peak memory of one case."
    groups, n_tokens = rollout.completion_ids.shape
    parts = minimum_flops(policy.base, len(rollout.prompt.prompt_ids), n_tokens, groups, rollout.prompt.grid_thw)
    case = dict(P=len(rollout.prompt.prompt_ids), C=n_tokens, G=groups, minimum_gflop=sum(parts.values()) / 1e9,
                vision_share=parts["vision"] / sum(parts.values()), sides={name: {} for name in sides})
    first = None
    for name, run in sides.items():
        logps: list[Tensor] = []
        with (count := counter()), split_attention(policy):
            run()
        case["sides"][name]["peak_mib"] = peak_memory(lambda: logps.append(run()), options)
        case["sides"][name] |= dict(gflop=count.get_total_flops() / 1e9,
                                    of_minimum=count.get_total_flops() / sum(parts.values()))
        grads = gradients(policy)
        if first is None:
            first = logps[0], grads
        else:
            case["sides"][name] |= check_equal(f"{name}, P={case['P']}", (logps[0], first[0]), (grads, first[1]), options)
    return case


def measure(policy: PolicyModel, rollouts: list[Rollout], options: Options, names: tuple[str, ...] = SIDES) -> Iterator[dict]:
    "Yields all cases: equality, FLOPs and peak memory are found for all of them first, then the seconds of each."
    runs = [{name: run for name, run in make_sides(policy, rollout).items() if name in names} for rollout in rollouts]
    with clean_heap(options):
        cases = [inspect(policy, rollout, sides, options)
                 for rollout, sides in track(list(zip(rollouts, runs)), "memory and FLOPs", transient=True)]
    for case, sides in zip(cases, runs):
        for name, seconds in interleaved(sides, options).items():
            case["sides"][name] |= seconds
            if options.peak_tflops:
                case["sides"][name]["utilisation"] = case["minimum_gflop"] / 1e3 / seconds["wall_s"] / options.peak_tflops
        case["speedup"] = case["sides"]["repeated"][clock(options)] / case["sides"]["packed"][clock(options)]
        print(f"P={case['P']} C={case['C']} G={case['G']}: {case['speedup']:.2f}x", flush=True)
        yield case


def main(settings: Settings) -> None:
    started = time.perf_counter()
    policy = make_policy(settings)
    for run in make_sides(policy, make_rollout(policy, make_prompt(policy, 30, side=2, words=10), 2, 4)).values():
        run()  # loads libraries and makes the gradients
    cases, side = [], 2 if settings.quick else 9
    rollouts = [make_rollout(policy, make_prompt(policy, length, side=side, words=10 if settings.quick else 64), groups, n_tokens)
                for length, n_tokens, groups in settings.cases()]
    for case in measure(policy, rollouts, settings):
        rows, key = case["sides"], clock(settings)
        case["speedup_over_vision_once"] = rows["vision_once"][key] / rows["packed"][key]
        if rows["packed"]["peak_mib"]:
            case["memory_ratio"] = rows["packed"]["peak_mib"] / rows["repeated"]["peak_mib"]
        cases.append(case)
        kernel = policy.attention_kernel(policy.get_input_embeddings().weight)
        path = save("repeated_vs_packed", settings, cases, weights=sum(p.numel() for p in policy.parameters()), attention_kernel=kernel)
    columns = ["P", "C", "G", "side", "CPU s", "wall s", "faster", "GFLOP", "of minimum", "peak MiB", "of repeated", "logp diff",
               "grad diff"] + ["utilisation"] * bool(settings.peak_tflops)
    table = []
    for case in cases:
        base = case["sides"]["repeated"]
        for name, row in case["sides"].items():
            table.append([case["P"], case["C"], case["G"], name, row["cpu_s"], row["wall_s"],
                          base[clock(settings)] / row[clock(settings)], row["gflop"], row["of_minimum"], row["peak_mib"],
                          row["peak_mib"] and row["peak_mib"] / base["peak_mib"], row.get("logp_difference"),
                          row.get("gradient_difference")] + [row.get("utilisation")] * bool(settings.peak_tflops))
    show("Log-probs of a group, forward and backward", columns, table)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
