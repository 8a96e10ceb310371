"""G responses to one video prompt: transformers' `generate(num_return_sequences=G)` against our rollout."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from harness import (PAD, VIDEO, Options, check_equal, clock, make_policy, make_prompt, peak_memory, save, show, time_sides,
                     use_attention)
from torch import Tensor

from deepvideo_r1.core import Prompt, make_generator
from deepvideo_r1.model.policy import PolicyModel
from deepvideo_r1.model.rollout import Completions, Sampling, complete


@dataclass
class Settings(Options):
    "Our rollout against transformers' generate."
    prompt_lengths: tuple[int, ...] = (712, 1400)  # values of P; 712 tokens hold 16 frames of 252 x 252
    lengths: tuple[int, ...] = (48, 128)  # tokens of each response
    groups: tuple[int, ...] = (4, 8, 16)  # values of G
    every: bool = False  # all combinations; without it G = 8, and every G for the first P and length

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.prompt_lengths, self.lengths, self.groups = (30,), (5,), (4,)

    def cases(self) -> list[tuple[int, int, int]]:
        "(P, C, G) of each case."
        first = self.prompt_lengths[0], self.lengths[0]
        combinations = [(p, c, g) for p in self.prompt_lengths for c in self.lengths for g in self.groups]
        return [case for case in combinations if self.every or case[2] == 8 or case[:2] == first]


def generated(policy: PolicyModel, prompt: Prompt, groups: int, n_tokens: int) -> Tensor:
    "(G, C) ids by transformers: temperature 1, no top-k or top-p, placeholders never drawn, no stop id."
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=groups)
    return _generate(policy, prompt, n_tokens, **sampling)[:, len(prompt.prompt_ids):]


def _generate(policy: PolicyModel, prompt: Prompt, n_tokens: int, **sampling: Any) -> Any:
    use_attention(policy, False)
    ids = prompt.prompt_ids[None].to(policy.device)
    with torch.no_grad():
        return policy.base.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == VIDEO).int() * 2,
            pixel_values_videos=prompt.patches.to(policy.device, policy.base.dtype),
            video_grid_thw=prompt.grid_thw.to(policy.device), max_new_tokens=n_tokens, min_new_tokens=n_tokens,
            second_per_grid_ts=torch.tensor(prompt.seconds_per_grid, dtype=torch.float64),
            suppress_tokens=policy.banned.tolist(), eos_token_id=None, pad_token_id=PAD, **sampling)


def rolled_out(policy: PolicyModel, prompt: Prompt, groups: int, n_tokens: int) -> Tensor:
    "(G, C) ids by our rollout with the same settings; the rollout computes log-probs as well."
    return _complete(policy, prompt, groups, n_tokens, 1.0).ids[0]


def _complete(policy: PolicyModel, prompt: Prompt, groups: int, n_tokens: int, temperature: float) -> Completions:
    use_attention(policy, True)
    uniforms = torch.rand(1, groups, n_tokens, generator=make_generator("uniforms"), dtype=torch.float64)
    return complete(policy, [prompt], uniforms, Sampling(temperature=temperature), stop_ids=[-1])


def check_greedy(policy: PolicyModel, prompt: Prompt, groups: int, n_tokens: int, options: Options) -> dict[str, float]:
    "Share of equal greedy tokens, and the largest difference of their log-probs; in float32 it stops unless all are equal."
    theirs = _generate(policy, prompt, n_tokens, do_sample=False, return_dict_in_generate=True, output_scores=True)
    ours = _complete(policy, prompt, groups, n_tokens, 0.0)
    ids = theirs.sequences[:, len(prompt.prompt_ids):].cpu()
    equal = (ours.ids[0] == ids).float().mean().item()
    if options.dtype == "bfloat16":  # a near tie may fall either way, and then all later tokens differ
        return dict(greedy_equal=equal)
    if equal < 1:
        raise SystemExit(f"P={len(prompt.prompt_ids)}: {equal:.1%} of the greedy tokens are equal: nothing was timed")
    logps = torch.stack(theirs.scores, 1).float().log_softmax(-1).cpu().gather(-1, ids[..., None])[..., 0]
    return dict(greedy_equal=equal, **check_equal("greedy", (ours.logps[0], logps.expand(groups, -1)), None, options))


def measure(policy: PolicyModel, prompt: Prompt, groups: int, n_tokens: int, options: Options) -> dict:
    "Equality, runs of the encoder, peak memory and seconds of one case."
    runs: dict[str, Callable[..., Tensor]] = {"generate": generated, "rollout": rolled_out}
    case = dict(P=len(prompt.prompt_ids), C=n_tokens, G=groups, sides={name: {} for name in runs})
    case |= check_greedy(policy, prompt, groups, n_tokens, options)
    sides = {name: lambda run=run: run(policy, prompt, groups, n_tokens) for name, run in runs.items()}
    patches: list[int] = []
    hook = policy.base.model.visual.register_forward_hook(lambda module, args, kwargs, output: patches.append(
        len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])), with_kwargs=True)
    for name, run in sides.items():
        patches.clear()
        shapes: list[torch.Size] = []
        case["sides"][name]["peak_mib"] = peak_memory(lambda: shapes.append(run().shape), options)
        case["sides"][name]["videos_encoded"] = sum(patches) / len(prompt.patches)
        assert shapes == [(groups, n_tokens)], f"{name} returned {shapes}"
    hook.remove()
    time_sides(case, sides, options, peer="generate", ours="rollout")
    return case


def main(settings: Settings) -> None:
    started = time.perf_counter()
    policy, cases = make_policy(settings), []
    small = dict(side=2, words=10) if settings.quick else {}
    for length, n_tokens, groups in settings.cases():
        cases.append(measure(policy, make_prompt(policy, length, **small), groups, n_tokens, settings))
        path = save("rollout_vs_generate", settings, cases)
        print(f"P={length} C={n_tokens} G={groups}: {cases[-1]['speedup']:.2f}x", flush=True)
    table = [[case["P"], case["C"], case["G"], name, row["cpu_s"], row["wall_s"],
              case["sides"]["generate"][clock(settings)] / row[clock(settings)], row["peak_mib"], row["videos_encoded"],
              case["greedy_equal"], case.get("logp_difference")] for case in cases for name, row in case["sides"].items()]
    show("G sampled responses to one video prompt", ["P", "tokens", "G", "side", "CPU s", "wall s", "faster", "peak MiB",
                                                    "videos encoded", "greedy equal", "logp diff"], table)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
