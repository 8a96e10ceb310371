"""Adapters that are swapped, and float32 weights of a policy that computes in bfloat16: engines with settings of their own.

One engine at a time: the end of one ends vLLM's process groups for all of this process.
"""
from bench import make_bench, shake

from deepvideo_r1.config import EngineConfig
from deepvideo_r1.model.precision import hold_masters

BOUND = 1e-4


def test_adapters_are_swapped(tmp_path, world):
    settings = EngineConfig(name="vllm", adapter="adapter", eager=True)
    bench = make_bench(tmp_path, world, settings=settings, lora_rank=12)
    assert bench.gap().largest < BOUND  # a new adapter has no effect
    for _ in range(2):
        shake(bench.policy, "lora_B", 0.05)
        assert bench.gap().mean > 0.01
        bench.engine.load_weights(bench.policy)
        assert bench.gap().largest < BOUND


def test_float32_weights_of_a_bfloat16_policy(tmp_path, world):
    "The gap is that of rounding in another order, and the bound of the settings is above it."
    bench = make_bench(tmp_path, world, dtype="bfloat16")
    hold_masters(bench.policy)
    shake(bench.policy, "layers")
    stale = bench.gap()
    bench.engine.load_weights(bench.policy)
    gap = bench.gap()
    print(f"bfloat16: mean {gap.mean:.4f}, largest {gap.largest:.3f} nats; stale {stale.mean:.3f}")
    assert 0 < gap.mean < EngineConfig().max_gap < stale.mean
