"""Every kernel of the packed attention against the usual way, and the choice among them."""
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepvideo_r1.model.kernels as kernels
import deepvideo_r1.model.policy as policy_module
from deepvideo_r1.core import make_generator
from deepvideo_r1.model.kernels import KernelCheck, available_kernels, check_kernels, fastest_kernel, repeated_attention
from deepvideo_r1.model.packing import KERNELS, shared_prefix_attention, shared_prefix_layout
from deepvideo_r1.model.policy import group_logps, load_policy
from test_policy import VISUALS, check_equal_gradients, checkpoints, gradients, make_rollout, tiny_qwen2_vl  # noqa: F401 (fixtures)

HEADS = dict(n_heads=4, n_kv_heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def measured_anew():
    fastest_kernel.cache_clear()
    yield
    fastest_kernel.cache_clear()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 40), groups=st.integers(1, 5), n_tokens=st.integers(1, 20), shared=st.sampled_from([1, 2, 4]),
       padding=st.lists(st.integers(0, 39), min_size=1, max_size=3), kernel=st.sampled_from(KERNELS), seed=st.integers(0, 99))
def test_every_kernel_computes_what_repeated_rows_compute(width, groups, n_tokens, shared, padding, kernel, seed):
    rows, length, generator = len(padding), width + groups * n_tokens, make_generator(seed)
    query = torch.randn(rows, 4, length, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, rows, 4 // shared, length, 8, generator=generator, dtype=torch.float64)
    real = torch.arange(width) >= torch.tensor(padding).clamp(max=width - 1)[:, None]
    expected = repeated_attention(query, key, value, real, groups)
    layout = shared_prefix_layout(real, groups, n_tokens, kernel)
    found, _ = shared_prefix_attention(nn.Module(), query, key, value, layout, scaling=8**-0.5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_flash_needs_no_mask_where_nothing_is_padded():
    real = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    assert shared_prefix_layout(real[:1], 2, 3, "flash").kernel == "flash"
    assert shared_prefix_layout(real, 2, 3, "flash").kernel == "split"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_a_model_with_every_kernel(checkpoints, family, kernel, monkeypatch):  # noqa: F811
    monkeypatch.setattr(policy_module, "available_kernels", lambda *_: KERNELS)
    rollout = make_rollout(checkpoints[family], VISUALS["video and image"])
    split, other = load_policy(checkpoints[family], attention="split"), load_policy(checkpoints[family], attention=kernel)
    expected = group_logps(split, rollout)
    if kernel == "flex":  # no backward pass on a CPU
        with torch.no_grad():
            return torch.testing.assert_close(group_logps(other, rollout), expected, atol=2e-5, rtol=0)
    found = group_logps(other, rollout)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    check_equal_gradients(gradients(other.hf, found), gradients(split.hf, expected))


def test_a_cpu_has_nothing_to_choose_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "check_kernels", lambda *a, **k: pytest.fail("measured"))
    assert fastest_kernel(torch.device("cpu"), torch.bfloat16, 4, 2, 16) == "split"


def test_of_those_that_agree_the_fastest_is_chosen_once(monkeypatch, caplog):
    calls = []

    def checks(*_, **how):
        calls.append(how["kernels"])
        return [KernelCheck("split", 1e-3, 0.2), KernelCheck("flash", 1e-3, 0.1), KernelCheck("flex", None, None, "no compiler")]

    monkeypatch.setattr(kernels, "check_kernels", checks)
    with caplog.at_level(logging.INFO, "deepvideo_r1.model.kernels"):
        found = {fastest_kernel(torch.device("cuda"), torch.bfloat16, 28, 4, 128) for _ in range(3)}
    assert found == {"flash"} and calls == [KERNELS] and "flex: no compiler" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
    fastest_kernel(torch.device("cuda"), torch.bfloat16, 28, 4, 128, padded=True)
    assert calls[1:] == [("split", "flex")]


def test_a_kernel_that_breaks_or_computes_something_else_is_left_out(monkeypatch):
    real = kernels.shared_prefix_attention

    def broken(module, query, key, value, layout, **how):
        if layout.kernel == "flex":
            raise RuntimeError("no such instruction\nmore lines")
        out, _ = real(module, query, key, value, layout, **how)
        return (out * 1.1 if layout.kernel == "flash" else out), None

    monkeypatch.setattr(kernels, "shared_prefix_attention", broken)
    split, flash, flex = check_kernels("cpu", torch.float32, **HEADS, kernels=KERNELS, timed=(20, 2, 4), repeats=1)
    assert not split.reason and split.seconds > 0
    assert "relative error is 0.1" in flash.reason and flash.seconds is None
    assert flex.reason == "RuntimeError: no such instruction" and flex.error is None


def test_a_kernel_that_cannot_be_trained_with_is_refused(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["words"])
    for kernel in ("flash", "flex"):
        with pytest.raises(ValueError, match=f"'{kernel}', which does not run forward and backward on cpu .* allowed there are auto, split"):
            group_logps(load_policy(tiny_model, attention=kernel), rollout)
    with pytest.raises(ValueError, match="attention is 'sdpa', allowed are auto, split, flash, flex"):
        load_policy(tiny_model, attention="sdpa")


def test_where_gradients_are_off_kernels_are_compared_all_the_same():
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            check, = check_kernels("cpu", torch.float32, **HEADS, timed=(20, 2, 4), repeats=1)
        assert not check.reason and check.error < 1e-5


def test_numbers_that_are_none_pass_nothing(monkeypatch):
    real = kernels.shared_prefix_attention

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    monkeypatch.setattr(kernels, "shared_prefix_attention", lambda module, query, *rest, **how: real(module, NanGradient.apply(query), *rest, **how))
    check, = check_kernels("cpu", torch.float32, **HEADS, timed=(20, 2, 4), repeats=1)
    assert "nan" in check.reason


@pytest.mark.parametrize("kernel", ["split", "flash"])
def test_under_autocast_queries_and_values_differ_in_precision(tiny_model, kernel, monkeypatch):
    monkeypatch.setattr(policy_module, "available_kernels", lambda *_: KERNELS)
    rollout = make_rollout(tiny_model, VISUALS["a video"])
    expected = group_logps(load_policy(tiny_model), rollout)
    with torch.autocast("cpu", torch.bfloat16):
        found = group_logps(load_policy(tiny_model, attention=kernel), rollout)
    found.sum().backward()
    assert 0 < (found - expected).abs().max() < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [dict(n_heads=28, n_kv_heads=4, head_dim=128), dict(n_heads=16, n_kv_heads=2, head_dim=128), HEADS])
def test_on_a_gpu_every_kernel_agrees_and_one_is_chosen(dtype, heads):
    checks = check_kernels("cuda", dtype, **heads)
    assert [c.kernel for c in checks] == list(available_kernels("cuda", dtype))
    assert not [c for c in checks if c.reason]
    assert fastest_kernel(torch.device("cuda"), dtype, *heads.values()) in KERNELS


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_gives_the_model_the_same_numbers(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["video and image"])
    expected = group_logps(load_policy(tiny_model), rollout)
    for kernel in ("auto", *available_kernels("cuda", torch.float32)):
        found = group_logps(load_policy(tiny_model, attention=kernel).to("cuda"), rollout)
        torch.testing.assert_close(found.cpu(), expected, atol=2e-5, rtol=0)
