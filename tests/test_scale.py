"""The memory plan against real models: bytes of small ones on the CPU, and figures that were worked out by hand before."""
import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from deepvideo_r1.config import (
    ObjectiveConfig, PlanConfig, PolicyConfig, PromptConfig, RolloutConfig, RunConfig, TrainConfig, paper_3b, paper_7b,
    small_1gpu)
from deepvideo_r1.core import Prompt, Rollout, Sample
from deepvideo_r1.model.adapter_files import LORA_TARGETS
from deepvideo_r1.model.adapters import add_adapter
from deepvideo_r1.model.families import model_class
from deepvideo_r1.model.policy import PolicyModel, rollout_batch, set_up
from deepvideo_r1.model.rollout import complete
from deepvideo_r1.training.moments import ModelScale
from deepvideo_r1.training.plan import PHASES, Arrangement, find_gpu, make_plan
from deepvideo_r1.training.scale import BASES, MemoryMeter, base_config, count_weights, weightless_policy
from deepvideo_r1.training.update import make_learner, update_policy
from deepvideo_r1.training.verdict import improve, plan_command, plan_lines, plan_rows, too_large, verdict

torch.set_num_threads(1)
SHAPES = {  # base whose family it has; hidden, MLP, layers, heads, key heads, vocabulary, tied
    "small": ("Qwen/Qwen2.5-VL-3B-Instruct", (96, 192, 3, 4, 2, 700, True)),
    "wide": ("Qwen/Qwen2.5-VL-7B-Instruct", (192, 512, 5, 6, 3, 3000, False)),
    "one layer": ("Qwen/Qwen2-VL-2B-Instruct", (96, 256, 1, 4, 4, 900, True)),
    "stepwise": ("Qwen/Qwen3-VL-8B-Instruct", (96, 192, 3, 4, 2, 700, False))}
SETTINGS = [PolicyConfig(), PolicyConfig("bfloat16"), PolicyConfig("bfloat16", gradient_checkpointing=True),
            PolicyConfig("bfloat16", lora_rank=8, gradient_checkpointing=True)]


def small_config(shape: str):
    "A config of the family, with an encoder of two small blocks."
    base, (hidden, mlp, layers, heads, kv_heads, words, tied) = SHAPES[shape]
    half = hidden // heads // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config = base_config(
        base, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=words, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}, head_dim=hidden // heads)
    vision = config.vision_config
    vision.deepstack_visual_indexes = [0, 1]
    vision.depth, vision.num_heads, vision.fullatt_block_indexes = 2, 2, [1]
    vision.embed_dim, vision.intermediate_size, vision.mlp_ratio = 64, 128, 2
    if config.model_type != "qwen2_vl":
        vision.hidden_size = 64
    config.image_token_id, config.video_token_id = 1, 2
    return config


def real_policy(config, settings: PolicyConfig) -> PolicyModel:
    "The same model with random weights, as `load_policy` sets it up."
    hf = model_class(config.model_type)._from_config(copy.deepcopy(config), dtype=getattr(torch, settings.dtype))
    set_up(hf, gradient_checkpointing=settings.gradient_checkpointing)
    if settings.lora_rank:
        hf = add_adapter(hf, LoraConfig(r=settings.lora_rank, target_modules=LORA_TARGETS))
    return PolicyModel(hf, pad_ids=(2, 1), banned_ids=(1, 2)).eval()


def small_run(settings: PolicyConfig, prompts_per_forward: int = 1) -> RunConfig:
    return RunConfig("m", "d", policy=settings, prompt=PromptConfig(max_frames=8, max_pixels=(4 * 28) ** 2),
                     rollout=RolloutConfig(group_size=4, max_tokens=24, batch_rows=8),
                     objective=ObjectiveConfig("reg_grpo"),
                     train=TrainConfig(prompts_per_step=2, prompts_per_forward=prompts_per_forward))


def a_prompt(plan) -> Prompt:
    "A prompt of the size that is planned, with a video."
    work = plan.work
    steps = (work.prompt_tokens - work.text_tokens) // work.side**2
    ids = torch.randint(10, 600, (work.prompt_tokens,))
    ids[1 : 1 + steps * work.side**2] = 2
    side = plan.scale.config.vision_config.patch_size
    return Prompt(ids, torch.randn(steps * work.side**2 * 4, 6 * side**2), torch.tensor([[steps, work.side * 2, work.side * 2]]),
                  ("video",), (1.0,))


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(run, weights) -> int:
    "Bytes that autograd saves for the backward pass, each memory once, without weights."
    known = {p.untyped_storage()._cdata for p in weights}
    saved, kept = {}, []

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        saved.update({storage._cdata: storage.nbytes()} if storage._cdata not in known else {})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def allocated_peak(run, path) -> int:
    "Most bytes that torch's allocator had given out at once, as its profiler says: not the instrument of the plan."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return max(itertools.accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


def check_close(planned: float, measured: float, what: str, tolerance: float = 0.15) -> None:
    assert abs(planned / measured - 1) <= tolerance, f"{what}: planned {planned:.4g}, measured {measured:.4g}"


CASES = {"float32": ("small", SETTINGS[0], 1), "bfloat16": ("wide", SETTINGS[1], 1),
         "checkpointing": ("wide", SETTINGS[2], 1), "adapters": ("small", SETTINGS[3], 1),
         "two prompts": ("small", SETTINGS[2], 2), "stepwise": ("stepwise", SETTINGS[2], 1)}
SLOW = {"one layer": ("one layer", SETTINGS[1], 1), "one layer, checkpointing": ("one layer", SETTINGS[2], 2),
        "wide, float32": ("wide", SETTINGS[0], 2), "wide, adapters": ("wide", SETTINGS[3], 1),
        "adapters, float32": ("one layer", PolicyConfig(lora_rank=4), 1)}


@pytest.mark.parametrize("shape, settings, per_forward", [
    *(pytest.param(*case, id=name) for name, case in CASES.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items())])
def test_a_real_small_model_needs_what_is_planned(shape, settings, per_forward, tmp_path):
    config, run = small_config(shape), small_run(settings, per_forward)
    plan = make_plan(run, find_gpu("24"), scale=ModelScale(config))
    policy = real_policy(config, settings)
    learner, work = make_learner(policy, Accelerator(cpu=True), run.objective, run.train), plan.work
    prompt, caches = a_prompt(plan), []

    # sampling, with encoder, prompts, cache and logits
    hook = policy.base.model.language_model.register_forward_hook(lambda module, args, kwargs, out: caches.append(
        kwargs["layout"].nbytes), with_kwargs=True)
    uniforms = torch.rand(work.prompts_sampled, work.group_size, work.max_tokens, dtype=torch.float64)
    with (meter := MemoryMeter([*policy.parameters(), *policy.buffers()])), learner.sampling():
        done = complete(policy, [prompt] * work.prompts_sampled, uniforms, stop_ids=[-1])
    hook.remove()
    meter.mark("rollout")
    check_close(plan.scale.sampling(settings, work)["decode"].kept, caches[-1], "KV cache", 0.001)
    rollout = plan.phases["rollout"]
    planned = sum(rollout[part] for part in ("weights for sampling", "KV cache", "temporary"))
    check_close(planned, meter.moments["rollout"].peak, "rollout")

    # one update, and what is there after it
    groups = [Rollout(Sample(id=f"s{b}", question="q", answer="a"), prompt, done.ids[b], done.mask[b], done.logps[b],
                      rewards=torch.rand(work.group_size), visual_features=done.visual_features[b])
              for b in range(work.prompts_sampled)]
    update_policy(learner, groups, groups[0], objective=run.objective, train=run.train, max_tokens=work.max_tokens)
    trained = [p for p in policy.parameters() if p.requires_grad]
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    reference = [] if learner.reference.frozen is None else list(learner.reference.frozen.parameters())
    states = [x for state in learner.optimizer.state.values() for key, x in state.items() if key != "step"]
    measured = {"float32 weights": trained, "frozen weights": frozen, "reference": reference, "AdamW states": states}
    for part, tensors in measured.items():
        assert plan.phases["optimizer"][part] == size(tensors), part
    with learner.sampling():
        assert all(p.grad is None for p in trained)

    # a pass as the second of an update finds it
    policy.train()
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    assert plan.phases["optimizer"]["gradients"] == size(p.grad for p in trained)
    batch = rollout_batch(policy, groups[: work.prompts_scored])
    measured = allocated_peak(lambda: learner.model(batch).sum().backward(), tmp_path / "trace.json")
    parts = ("saved activations", "cast weights", "logits chunk", "temporary")
    fullest = max(sum(plan.phases[name].get(part, 0) for part in parts) for name in ("loss", "layers", "embeddings"))
    check_close(fullest, measured, "update")
    saved = plan.phases["loss"]["saved activations"] + plan.phases["loss"]["cast weights"]
    with (meter := MemoryMeter([*policy.parameters(), *policy.buffers()])):
        logps = learner.model(batch)
    meter.mark("forward")
    check_close(saved, meter.moments["forward"].kept, "kept for the backward pass")
    if not settings.gradient_checkpointing:  # which keeps masks and positions where autograd does not list them
        check_close(saved, saved_bytes(lambda: learner.model(batch), policy.parameters()), "saved activations")
    assert logps.requires_grad


def test_a_chunk_of_logits_needs_what_is_planned():
    config = small_config("wide")
    scale, run = ModelScale(config), small_run(SETTINGS[0])
    work = make_plan(run, find_gpu("24"), scale=scale).work
    head = real_policy(config, SETTINGS[0]).base.lm_head.requires_grad_(False)
    hidden = torch.randn(work.group_size * work.max_tokens, head.in_features, requires_grad=True)
    targets = torch.zeros(len(hidden), dtype=torch.long)
    with (meter := MemoryMeter([*head.parameters(), hidden])):
        head(hidden, targets).sum().backward()
    meter.mark("head")
    check_close(scale.logits(SETTINGS[0], work), meter.moments["head"].peak, "logits chunk", 0.02)


def test_adamw_takes_the_square_roots_of_all_second_moments_together():
    weights = [torch.nn.Parameter(torch.randn(300, 40)) for _ in range(5)]
    optimizer = torch.optim.AdamW(weights, foreach=True)  # what it does on a GPU
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    with (meter := MemoryMeter([*weights, *states, *(w.grad for w in weights)])):
        optimizer.step()
    meter.mark("step")
    check_close(meter.moments["step"].peak, size(weights), "temporaries of AdamW", 0.02)


@pytest.mark.parametrize("name, all_weights, encoder", [
    ("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600, 665_271_296), ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616, 675_759_104),
    ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976, 668_684_288),
    ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, 676_550_144),
    ("Qwen/Qwen2.5-VL-32B-Instruct", 33_452_718_336, 688_841_984),
    ("Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344, 704_573_696),
    ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032, None), ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808, None),
    ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, None), ("Qwen/Qwen3-VL-30B-A3B-Instruct", 31_070_754_032, None)])
def test_the_base_models_have_the_weights_of_the_published_files(name, all_weights, encoder):
    counts = count_weights(weightless_policy(base_config(name), fake=False))
    assert (counts.trained + counts.frozen, counts.frozen) == (all_weights, encoder or counts.frozen)
    assert name in BASES


# --- figures worked out by hand, in 10^9 bytes, for prompts of 800 tokens and 8 responses of 256 ----------------------


@pytest.fixture(scope="module")
def seven() -> ModelScale:
    return ModelScale(base_config("Qwen/Qwen2.5-VL-7B-Instruct"))


def billions(parts: dict[str, int], *names: str) -> float:
    return sum(parts[name] for name in names) / 1e9


def total(parts: dict[str, int]) -> float:
    return sum(parts.values()) / 1e9


def kept_billions(plan, per_token: int) -> float:
    "Keys and values: each prompt once, and room for each response."
    work = plan.work
    return per_token * (work.prompts_sampled * work.prompt_tokens + work.rows * work.max_tokens) / 1e9


def test_the_7b_sharded_over_eight(seven):
    run = replace(paper_7b(data="d"), train=TrainConfig(prompts_per_step=16))
    plan = make_plan(run, find_gpu("h100"), Arrangement(8, sharded=True), scale=seven)
    parts = plan.phases["loss"]
    for names, expected in ((("frozen weights", "float32 weights"), 4.0), (("reference",), 2.1), (("gradients",), 3.8),
                            (("AdamW states",), 7.6)):
        check_close(billions(parts, *names), expected, str(names), 0.03)
    check_close(max(total(plan.phases[name]) for name in ("loss", "layers", "embeddings")), 24, "update")
    rollout = plan.phases["rollout"]
    check_close(billions(rollout, "weights for sampling"), 16.6, "gathered", 0.02)
    check_close(billions(rollout, "KV cache"), kept_billions(plan, 57_344), "KV cache", 0.001)
    check_close(total(rollout), 32, "rollout")
    assert plan.fits
    check_close(plan.disk["checkpoints"] / 1e9 / 2, 93, "checkpoint")


def test_the_3b_sharded_over_four():
    plan = make_plan(paper_3b(data="d"), find_gpu("a100"), Arrangement(4, sharded=True))
    parts = plan.phases["loss"]
    for names, expected in ((("frozen weights", "float32 weights"), 3.4), (("reference",), 1.9), (("gradients",), 3.1),
                            (("AdamW states",), 6.2)):
        check_close(billions(parts, *names), expected, str(names), 0.03)
    check_close(max(total(plan.phases[name]) for name in ("loss", "layers", "embeddings")), 19, "update")


def test_adapters_of_the_7b_on_one_card(seven):
    run = replace(small_1gpu(data="d"), model="Qwen/Qwen2.5-VL-7B-Instruct")
    plan = make_plan(run, find_gpu("h100"), scale=seven)
    rollout, loss = plan.phases["rollout"], plan.phases["loss"]
    read = 57_344 * 8 * plan.work.prompt_tokens / 1e9  # the fullest moment of sampling is that of reading the prompts
    for parts, name, expected in ((loss, "frozen weights", 16.6), (loss, "float32 weights", 0.64),
                                  (loss, "AdamW states", 1.3), (rollout, "KV cache", read)):
        check_close(billions(parts, name), expected, name, 0.03)
    assert loss["reference"] == 0
    check_close(plan.peak[1] / 1e9, 26 - 3.9 + read, "sum")  # there all moments are added up, with a prompt for each row
    assert plan.disk["checkpoints"] / 1e9 < 5


def test_keys_and_values_of_a_token(seven):
    three = ModelScale(base_config("Qwen/Qwen2.5-VL-3B-Instruct"))
    for scale, per_token in ((seven, 57_344), (three, 36_864)):
        work = make_plan(paper_7b(data="d"), find_gpu("h100"), scale=scale).work
        kept = scale.sampling(PolicyConfig("bfloat16"), work)["decode"].kept
        assert kept == per_token * (work.prompts_sampled * work.prompt_tokens + work.rows * work.max_tokens)


def test_sampling_speed_is_that_of_the_public_figures(seven):
    rates = {}
    for rows in (8, 64):
        run = replace(paper_7b(data="d"), rollout=RolloutConfig(batch_rows=rows, cache="growing"))
        plan = make_plan(run, find_gpu("a100"), scale=seven)
        kernels = seven.sampling(run.policy, plan.work)["decode"].kernels
        rates[rows] = plan.work.rows / plan.times.token * kernels / 1240  # as many as a token takes in transformers
    check_close(rates[8], 300, "tokens per second at 8 rows")
    check_close(rates[64], 2500, "tokens per second at 64 rows")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_names_the_recipe(seven):
    run = paper_7b(data="d")
    plan = make_plan(run, find_gpu("h100"), Arrangement(8), scale=seven)
    names, better = improve(plan)
    assert names == ["FSDP2 (recipes/8gpu_fsdp2.yaml)"] and better.fits and not plan.fits
    line = verdict(plan)
    assert "\n" not in line and "does not fit" in line and "recipes/8gpu_fsdp2.yaml" in line
    assert too_large(run, n_processes=8, sharded=False, gpu_bytes=80 * 2**30) is not None
    assert too_large(run, n_processes=8, sharded=True, gpu_bytes=80 * 2**30) is None


def test_harmless_changes_come_first(seven):
    run = replace(small_1gpu(data="d"), policy=PolicyConfig("bfloat16", lora_rank=64))
    plan = make_plan(run, find_gpu("32"), scale=seven)
    names, better = improve(plan)
    assert names[0] == "policy.gradient_checkpointing" and better.fits
    assert better.config.policy.lora_rank == 64 and better.arrangement == plan.arrangement


def test_where_nothing_harmless_is_enough_cards_and_adapters_are_offered(seven):
    line = verdict(make_plan(paper_7b(data="d"), find_gpu("a100"), scale=seven))
    assert "GPUs with FSDP2 (recipes/" in line and "LoRA (policy.lora_rank 64)" in line


@pytest.mark.slow
def test_more_of_anything_never_needs_less(seven):
    def peak(arrangement=Arrangement(), **changes):
        run = paper_7b(data="d")
        for name, values in changes.items():
            run = replace(run, **{name: replace(getattr(run, name), **values)})
        return make_plan(run, find_gpu("h100"), arrangement, scale=seven).phases

    plain = peak()
    for changes, phase in ((dict(rollout=dict(max_tokens=512)), "rollout"), (dict(rollout=dict(max_tokens=512)), "layers"),
                           (dict(train=dict(prompts_per_forward=2)), "layers"), (dict(prompt=dict(max_frames=64)), "rollout"),
                           (dict(policy=dict(gradient_checkpointing=False)), "loss")):
        assert total(peak(**changes)[phase]) > total(plain[phase]), changes
    assert total(peak(Arrangement(2))["loss"]) > total(plain["loss"]) > total(peak(Arrangement(2, True))["loss"])
    assert set(plain) == set(PHASES)


def test_no_kl_no_reference(seven):
    run = replace(paper_7b(data="d"), objective=ObjectiveConfig("grpo", kl_coef=0.0))
    assert make_plan(run, find_gpu("h100"), scale=seven).phases["loss"]["reference"] == 0


def test_a_directory_and_an_adapter_are_planned_as_they_are(tiny_model, tmp_path):
    run = replace(small_run(PolicyConfig()), model=str(tiny_model))
    whole = make_plan(run, find_gpu("24"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": str(tiny_model), "r": 4, "peft_type": "LORA", "target_modules": LORA_TARGETS}))
    adapted = make_plan(replace(run, model=str(tmp_path)), find_gpu("24"))
    assert adapted.config.policy.lora_rank == 4
    assert adapted.phases["loss"]["float32 weights"] < whole.phases["loss"]["float32 weights"]
    with pytest.raises(ValueError, match="no such directory"):
        make_plan(replace(run, model="nowhere"), find_gpu("24"))


def test_what_is_not_said_is_ddp_where_it_fits(seven, tiny_model):
    assert plan_command(PlanConfig(str(tiny_model), gpu="24", gpus=2)).arrangement == Arrangement(2)
    run = paper_7b(data="d")
    plan = plan_command(PlanConfig(run.model, gpus=8, policy=run.policy, train=run.train))
    assert plan.arrangement == Arrangement(8, sharded=True)
    rows, lines = plan_rows(plan), plan_lines(plan)
    assert rows[0] == ["GB on each GPU", *PHASES] and rows[-1][0] == "sum"
    assert "an estimate whose constants are of one H200" in lines[2] and lines[-1] == verdict(plan)


@pytest.mark.parametrize("gpu", ["h900", "-3", "0", "nan", "inf", ""])
def test_a_card_that_is_not_known(gpu):
    with pytest.raises(ValueError, match="allowed are a100-40"):
        find_gpu(gpu)
