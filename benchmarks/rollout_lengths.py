"""Groups whose responses end at many lengths: transformers' `generate`, a loop in which all rows stay, and our rollout."""
import time
from dataclasses import dataclass

import torch
import tyro
from harness import PAD, VIDEO, Options, clock, make_policy, make_prompt, peak_memory, save, show, time_sides, use_attention
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from deepvideo_r1.core import Prompt, make_generator
from deepvideo_r1.model.batch import make_batch
from deepvideo_r1.model.packing import causal_prompt_mask
from deepvideo_r1.model.policy import PolicyModel
from deepvideo_r1.model.rollout import complete, sample_tokens


@dataclass
class Settings(Options):
    "Our rollout against generate, and against a loop that copies the prompt and lets no row go."
    prompt_lengths: tuple[int, ...] = (712,)  # values of P; 712 tokens hold 16 frames of 252 x 252
    prompts: tuple[int, ...] = (1, 4)  # prompts whose groups are sampled together
    group_size: int = 8  # G
    median: int = 96  # median length of the responses in tokens
    spread: float = 0.8  # standard deviation of the logarithm of the lengths
    longest: int = 512  # longest response in tokens

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.prompt_lengths, self.prompts, self.median, self.longest = (30,), (1, 2), 5, 12


def stop_id(policy: PolicyModel) -> int:
    "The last id: the inverse of the cumulative distribution gives it for a uniform number next to 1."
    return policy.get_input_embeddings().weight.shape[0] - 1


def draw_lengths(n_prompts: int, options: Settings) -> Tensor:
    "(B, G) lengths from a log-normal distribution: most short, some long."
    normal = torch.randn(n_prompts, options.group_size, generator=make_generator("lengths"))
    return (options.median * (options.spread * normal).exp()).round().long().clamp(2, options.longest)


def make_uniforms(lengths: Tensor) -> Tensor:
    "(B, G, longest) random numbers with which each response ends at its length."
    uniforms = 0.99 * torch.rand(*lengths.shape, int(lengths.max()), generator=make_generator("uniforms"), dtype=torch.float64)
    return uniforms.scatter(-1, lengths[..., None] - 1, 1.0 - 2**-53)


class DrawnByUniforms(LogitsProcessor):
    "Leaves the one token that our sampler draws, so that generate writes the same responses."

    def __init__(self, policy: PolicyModel, uniforms: Tensor):
        self.policy, self.uniforms, self.t = policy, uniforms.flatten(0, 1).to(policy.device), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, _ = sample_tokens(scores, self.uniforms[:, self.t], banned=self.policy.banned)
        self.t += 1
        return torch.full_like(scores, float("-inf")).scatter(-1, ids[:, None], 0.0)


@torch.no_grad()
def generated(policy: PolicyModel, prompt: Prompt, uniforms: Tensor) -> Tensor:
    "(B, G, T) ids by transformers, 0 after the end."
    use_attention(policy, False)
    n_prompts, group_size, n_tokens = uniforms.shape
    ids = prompt.prompt_ids.expand(n_prompts, -1).to(policy.device)
    out = policy.base.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == VIDEO).int() * 2,
        pixel_values_videos=prompt.patches.repeat(n_prompts, 1).to(policy.device, policy.base.dtype),
        video_grid_thw=prompt.grid_thw.repeat(n_prompts, 1).to(policy.device), max_new_tokens=n_tokens,
        second_per_grid_ts=torch.tensor(prompt.seconds_per_grid * n_prompts, dtype=torch.float64),
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group_size,
        eos_token_id=stop_id(policy), pad_token_id=PAD,
        logits_processor=LogitsProcessorList([DrawnByUniforms(policy, uniforms)]))
    return out[:, ids.shape[1]:].view(n_prompts, group_size, -1)


@torch.no_grad()
def all_rows_stay(policy: PolicyModel, prompt: Prompt, uniforms: Tensor) -> Tensor:
    "(B, G, T) ids by a loop with transformers' cache: a copy of the prompt for each row, and no row leaves before the end."
    use_attention(policy, True)
    n_prompts, group_size, n_tokens = uniforms.shape
    batch = make_batch(policy, [prompt] * n_prompts).to(policy.device)
    model, cache = policy.base.model.language_model, DynamicCache(config=policy.base.config.text_config)
    hidden = model(inputs_embeds=policy.embed_prompts(batch), position_ids=batch.prompt_positions, past_key_values=cache,
                   attention_mask={"full_attention": causal_prompt_mask(batch.prompt_mask)}).last_hidden_state[:, -1]
    cache.batch_repeat_interleave(group_size)
    hidden, visible, position = (x.repeat_interleave(group_size, 0)
                                 for x in (hidden, batch.prompt_mask, batch.next_position))
    draws, written = uniforms.flatten(0, 1).to(policy.device), []
    alive = torch.ones(len(draws), dtype=torch.bool, device=policy.device)
    for t in range(n_tokens):
        ids, logps = sample_tokens(policy.base.lm_head(hidden), draws[:, t], banned=policy.banned)
        written.append((ids * alive, logps * alive))
        alive = alive & (ids != stop_id(policy))
        if not alive.any():
            break
        visible = torch.cat([visible, visible.new_ones(len(visible), 1)], dim=1)
        hidden = model(inputs_embeds=policy.get_input_embeddings()(ids * alive)[:, None], past_key_values=cache,
                       position_ids=(position + t).expand(3, -1)[..., None],
                       attention_mask={"full_attention": visible[:, None, None]}).last_hidden_state[:, -1]
    return torch.stack([ids for ids, _ in written], -1).view(n_prompts, group_size, -1).cpu()


def rolled_out(policy: PolicyModel, prompt: Prompt, uniforms: Tensor) -> Tensor:
    "(B, G, T) ids by our rollout."
    use_attention(policy, True)
    return complete(policy, [prompt] * len(uniforms), uniforms, stop_ids=[stop_id(policy)]).ids


LEAST_EQUAL = 0.9  # a draw at the edge of two tokens may fall either way in float32, and then all that follows differs
SIDES = {"generate": generated, "rows stay": all_rows_stay, "rollout": rolled_out}


def measure(policy: PolicyModel, prompt: Prompt, n_prompts: int, options: Settings) -> dict:
    "Equality, peak memory and seconds of one case."
    lengths = draw_lengths(n_prompts, options)
    uniforms = make_uniforms(lengths)
    case = dict(P=len(prompt.prompt_ids), C=int(lengths.max()), G=options.group_size, prompts=n_prompts,
                tokens=int(lengths.sum()), rows_times_steps=int(lengths.max()) * lengths.numel(),
                sides={name: {} for name in SIDES})
    runs = {name: lambda run=run: run(policy, prompt, uniforms) for name, run in SIDES.items()}

    # the same responses, each of its length
    wanted = runs["rollout"]()
    ends = (wanted == stop_id(policy)).int().argmax(-1) + 1
    if not torch.equal(ends, lengths):
        raise SystemExit(f"{n_prompts} prompts: the responses have other lengths than were drawn: nothing was timed")
    for name, run in runs.items():
        equal = (run().cpu() == wanted).all(-1).float().mean().item()
        case["sides"][name]["equal_responses"] = equal
        if equal < LEAST_EQUAL:
            raise SystemExit(f"{n_prompts} prompts, {name}: {equal:.1%} of the responses are equal: nothing was timed")

    for name, run in runs.items():
        case["sides"][name]["peak_mib"] = peak_memory(run, options)
    time_sides(case, runs, options, peer="generate", ours="rollout")
    key = clock(options)
    case["speedup_over_rows_stay"] = case["sides"]["rows stay"][key] / case["sides"]["rollout"][key]
    return case


def main(settings: Settings) -> None:
    started = time.perf_counter()
    policy, cases = make_policy(settings), []
    small = dict(side=2, words=10) if settings.quick else {}
    for length in settings.prompt_lengths:
        for n_prompts in settings.prompts:
            cases.append(measure(policy, make_prompt(policy, length, **small), n_prompts, settings))
            path = save("rollout_lengths", settings, cases)
            print(f"P={length}, {n_prompts} prompts: {cases[-1]['speedup']:.2f}x generate, "
                  f"{cases[-1]['speedup_over_rows_stay']:.2f}x the loop in which all rows stay", flush=True)
    key = clock(settings)
    table = [[case["P"], case["prompts"], f"{case['tokens']} / {case['rows_times_steps']}", name, row["cpu_s"], row["wall_s"],
              row[key] / case["sides"]["rollout"][key], row["peak_mib"], row["equal_responses"]]
             for case in cases for name, row in case["sides"].items()]
    show("Groups of 8 responses of many lengths", ["P", "prompts", "tokens / rows x steps", "side", "CPU s", "wall s",
                                                   "times ours", "peak MiB", "equal"], table)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
