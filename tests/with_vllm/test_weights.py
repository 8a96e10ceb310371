"""An update arrives in vLLM with its adapters merged, and only with everything that it needs."""
import pytest
import torch
from bench import make_bench, shake

import deepvideo_r1.model.vllm_engine as vllm_engine
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.support.interrupts import TrainingError

BOUND = 1e-4


@pytest.fixture(scope="module")
def bench(world, tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("models"), world)


def adapted(bench, *, rank: int = 4, **settings):
    "A policy of the same checkpoint whose new adapter has an effect."
    policy = load_policy(bench.path, lora_rank=rank, **settings)
    shake(policy, "lora_B", 0.05)
    return policy


def test_adapters_arrive_merged_and_leave_the_policy_as_it_was(bench):
    policy = adapted(bench)
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    assert bench.gap(policy=policy).mean > 0.01
    bench.engine.load_weights(policy)
    assert bench.gap(policy=policy).largest < BOUND
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    bench.engine.load_weights(bench.policy)
    assert bench.gap().largest < BOUND


def test_a_head_that_shares_its_weights_has_to_be_sent(bench, monkeypatch):
    walk = vllm_engine.policy_weights
    monkeypatch.setattr(vllm_engine, "policy_weights", lambda *args, **settings: (
        pair for pair in walk(*args, **settings) if pair[0] != "lm_head.weight"))
    with pytest.raises(TrainingError, match=r"no values for 1 of its parameters \(language_model.lm_head.weight\)"):
        bench.engine.load_weights(bench.policy)
    monkeypatch.undo()
    bench.engine.load_weights(bench.policy)
    assert bench.gap().largest < BOUND


def test_pages_of_old_weights_are_thrown_away(bench, monkeypatch):
    "Without it, prompts that were seen before are read from old keys and values."
    bench.gap()
    shake(bench.policy, "layers.0.self_attn")
    with monkeypatch.context() as patched:
        patched.setattr(bench.engine.llm, "reset_prefix_cache", lambda: True)
        bench.engine.load_weights(bench.policy)
    assert bench.gap().mean > 1e-3
    bench.engine.load_weights(bench.policy)
    assert bench.gap().largest < BOUND


def test_old_outputs_of_the_encoder_are_thrown_away(bench, monkeypatch):
    "Without it vLLM looks for an output that its worker no longer has. This breaks the engine: the last test."
    bench.gap()
    shake(bench.policy, "visual")
    with monkeypatch.context() as patched:
        patched.setattr(bench.engine.llm.llm_engine, "reset_encoder_cache", lambda: None)
        bench.engine.load_weights(bench.policy)
    with pytest.raises(Exception, match="(?i)encoder cache"):
        bench.gap()
