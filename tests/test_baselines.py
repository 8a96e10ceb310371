"""The baselines against an independent NumPy rewrite: values, gradients, edge cases, padding."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import fillers, make_batch, numeric_gradient, oracle_average, oracle_exp, oracle_k3, run

from deepvideo_r1.baselines import NEEDS_REFERENCE, OBJECTIVES, SAMPLED_FROM_REFERENCE, reinforce_loss
from deepvideo_r1.grpo import LENGTH_NORMS, grpo_loss
from deepvideo_r1.reg_grpo import reg_grpo_loss

BASELINES = ["reinforce", "rloo", "rebel", "reward_regression", "dpo", "online_dpo"]
WITH_TEMPERATURE = ["rebel", "reward_regression", "dpo", "online_dpo"]
OWN_TERM = dict(reinforce="policy_loss", rloo="policy_loss", rebel="regression_loss",
                reward_regression="regression_loss", dpo="preference_loss", online_dpo="preference_loss")


# --- the oracle: one group at a time, float64, written from the formulas ---------------------------------------------


def oracle_group(name, logp, rho, rho_ref, rewards, temperature):
    """The first term of one group: lists over its responses of log pi_theta, of two log-ratios, and of rewards."""
    G = len(rewards)
    if name == "reinforce":
        return -sum(rewards[i] * logp[i] for i in range(G)) / G
    if name == "rloo":
        others = [sum(rewards[j] for j in range(G) if j != i) / (G - 1) for i in range(G)]
        return -sum((rewards[i] - others[i]) * logp[i] for i in range(G)) / G
    if name == "rebel":
        pairs = list(itertools.permutations(range(G), 2))
        errors = [temperature * (rho[i] - rho[j]) - (rewards[i] - rewards[j]) for i, j in pairs]
        return sum(error**2 for error in errors) / len(pairs)
    if name == "reward_regression":
        partition = sum(math.exp(reward / temperature) for reward in rewards) / G
        return sum((temperature * (rho[i] + math.log(partition)) - rewards[i]) ** 2 for i in range(G)) / G
    if max(rewards) - min(rewards) <= 1e-6:
        return 0.0
    best, worst = list(rewards).index(max(rewards)), list(rewards).index(min(rewards))
    margin = temperature * (rho_ref[best] - rho_ref[worst])
    return -math.log(1 / (1 + math.exp(-margin)))


def oracle(name, logps, old, ref, mask, rewards, *, kl_coef=0.0, temperature=1.0, length_norm="response",
           max_length=None):
    total, (B, G, _) = 0.0, mask.shape
    for b in range(B):
        sums = [[part[b, g][mask[b, g]].sum() for g in range(G)] for part in (logps, logps - old, logps - ref)]
        total += oracle_group(name, *sums, rewards[b], temperature) / B
    if kl_coef:
        kl = lambda b, g, t: oracle_k3(logps[b, g, t], ref[b, g, t])
        total += kl_coef * oracle_average(kl, mask, length_norm, max_length)
    return total


def knobs_of(name, **knobs):
    return {key: value for key, value in knobs.items() if key in inspect.signature(OBJECTIVES[name]).parameters}


def assert_agrees(name, batch, **knobs):
    logps, old, ref, mask, rewards = batch
    knobs = dict(kl_coef=0.0, temperature=1.0) | knobs
    loss, gradient, _ = run(OBJECTIVES[name], batch, **knobs_of(name, **knobs))
    function = lambda moved: oracle(name, moved, old, ref, mask, rewards, **knobs)
    assert loss == pytest.approx(function(logps), rel=1e-8, abs=1e-10)
    expected = numeric_gradient(function, logps, mask)
    assert np.linalg.norm(gradient - expected) <= 1e-6 * np.linalg.norm(expected) + 1e-8
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("B, G, T", [(1, 2, 3), (2, 4, 5), (3, 8, 4), (1, 16, 3)])
@pytest.mark.parametrize("name", BASELINES)
def test_agrees_with_numpy(name, B, G, T):
    for seed, length_norm in enumerate(LENGTH_NORMS):
        knobs = dict(kl_coef=(0.0, 0.1, 1.0)[seed], temperature=(1.0, 0.3, 2.0)[seed])
        assert_agrees(name, make_batch(seed, B, G, T), length_norm=length_norm, max_length=7, **knobs)


@pytest.mark.parametrize("name", BASELINES)
def test_the_first_update_agrees_too(name):
    _, old, ref, mask, rewards = make_batch(5, 2, 4, 4)
    assert_agrees(name, (old.copy(), old, ref, mask, rewards), kl_coef=0.5)
    assert_agrees(name, (old.copy(), old, old.copy(), mask, rewards), kl_coef=0.5)


@pytest.mark.parametrize("size", [30, -30])
@pytest.mark.parametrize("name", BASELINES)
def test_log_ratios_of_thirty_agree_with_numpy(name, size):
    logps, old, ref, mask, rewards = make_batch(6, 2, 4, 2, empty=False)
    logps[1, 0, 0], logps[1, 1, 0] = old[1, 0, 0] + size, ref[1, 1, 0] - size
    assert_agrees(name, (logps, old, ref, mask, rewards))


@pytest.mark.parametrize("name", BASELINES)
def test_metrics_agree_with_numpy(name):
    batch = logps, old, ref, mask, rewards = make_batch(12, 3, 8, 5)
    loss, _, metrics = run(OBJECTIVES[name], batch, kl_coef=0.3)
    temperature = knobs_of(name, temperature=0.1 if "dpo" in name else 1.0)
    kl = oracle_average(lambda b, g, t: oracle_k3(logps[b, g, t], ref[b, g, t]), mask, "response", None)
    rho = np.where(mask, logps - old, 0).sum(-1)
    spread = rewards.std(-1, keepdims=True)
    advantages = np.where(spread > 0, (rewards - rewards.mean(-1, keepdims=True)) / (spread + 1e-6), 0)
    expected = {
        "loss": loss, "kl": kl, "clip_fraction": 0, "vanishing_ratio": 1 / 3, "log_ratio_std": rho.std(-1).mean(),
        OWN_TERM[name]: oracle(name, *batch, **temperature),
        "ratio_mean": oracle_average(lambda b, g, t: oracle_exp(logps[b, g, t] - old[b, g, t]), mask, "response", None),
        "advantage_abs_mean": np.abs(advantages).mean(),
        "advantage_corr": np.sum([np.corrcoef(rho[b], rewards[b])[0, 1] for b in (1, 2)]) / 3,  # the first group vanishes
    }
    assert loss == pytest.approx(expected[OWN_TERM[name]] + 0.3 * kl)
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-8)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


# --- the dictionary --------------------------------------------------------------------------------------------------


def test_the_dictionary_has_eight_objectives_of_one_signature():
    assert list(OBJECTIVES) == ["grpo", "reg_grpo", *BASELINES]
    assert OBJECTIVES["grpo"] is grpo_loss and OBJECTIVES["reg_grpo"] is reg_grpo_loss
    for objective in OBJECTIVES.values():
        parameters = list(inspect.signature(objective).parameters.values())
        assert [p.name for p in parameters[:5]] == ["logps", "old_logps", "ref_logps", "completion_mask", "rewards"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[5:])
        assert "kl_coef" in {p.name for p in parameters}
    assert SAMPLED_FROM_REFERENCE == {"dpo"} and NEEDS_REFERENCE == {"dpo", "online_dpo"}


# --- edge cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
class TestEdges:
    def test_a_group_of_one_is_refused(self, name):
        with pytest.raises(ValueError, match="group_size >= 2"):
            run(OBJECTIVES[name], make_batch(0, 2, 1, 3))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_rewards_that_are_not_finite_are_refused(self, name, bad):
        batch = make_batch(0, 2, 4, 3)
        batch[-1][1, 2] = bad
        with pytest.raises(ValueError, match=r"must be finite.*\(1, 2\)"):
            run(OBJECTIVES[name], batch)

    def test_shapes_that_disagree_are_refused(self, name):
        logps, old, ref, mask, rewards = make_batch(0, 2, 4, 3)
        for batch in ((logps, old[..., :2], ref, mask, rewards), (logps, old, ref, mask[:, :2], rewards),
                      (logps, old, ref, mask, rewards[:, :2]), (logps[0], old[0], ref[0], mask[0], rewards)):
            with pytest.raises(ValueError, match="shape"):
                run(OBJECTIVES[name], batch)

    @pytest.mark.parametrize("kl_coef", [-0.1, math.nan])
    def test_a_coefficient_below_zero_is_refused(self, name, kl_coef):
        with pytest.raises(ValueError, match="kl_coef"):
            run(OBJECTIVES[name], make_batch(0, 1, 2, 3), kl_coef=kl_coef)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
    def test_a_temperature_that_is_not_above_zero_is_refused(self, name, temperature):
        if name in WITH_TEMPERATURE:
            with pytest.raises(ValueError, match="temperature"):
                run(OBJECTIVES[name], make_batch(0, 1, 2, 3), temperature=temperature)

    def test_no_reference(self, name):
        logps, old, _, mask, rewards = make_batch(0, 2, 4, 3)
        with pytest.raises(ValueError, match="set kl_coef=0"):
            run(OBJECTIVES[name], (logps, old, None, mask, rewards), kl_coef=0.1)
        if name in NEEDS_REFERENCE:
            with pytest.raises(ValueError, match="pass its log-probs"):
                run(OBJECTIVES[name], (logps, old, None, mask, rewards), kl_coef=0.0)
        else:
            _, gradient, metrics = run(OBJECTIVES[name], (logps, old, None, mask, rewards), kl_coef=0.0)
            with_reference = run(OBJECTIVES[name], (logps, old, old, mask, rewards), kl_coef=0.0)
            assert metrics["kl"] == 0
            np.testing.assert_array_equal(gradient, with_reference[1])

    def test_equal_rewards(self, name):
        logps, old, ref, mask, rewards = make_batch(1, 2, 4, 3)
        rewards[:] = 0.1
        _, gradient, metrics = run(OBJECTIVES[name], (logps, old, ref, mask, rewards), kl_coef=0.0)
        assert metrics["vanishing_ratio"] == 1
        if name in ("rloo", "dpo", "online_dpo"):
            assert (gradient == 0).all()
        elif name == "reinforce":
            np.testing.assert_allclose(gradient, -0.1 * mask / 8)
        else:  # equal rewards ask for equal log-ratios
            rho = np.where(mask, logps - old, 0).sum(-1)
            towards = rho - rho.mean(-1, keepdims=True) if name == "rebel" else rho
            np.testing.assert_array_equal(np.sign(gradient), mask * np.sign(towards)[..., None])
        _, gradient, _ = run(OBJECTIVES[name], (old, old, ref, mask, rewards), kl_coef=0.0)
        if name != "reinforce":
            np.testing.assert_allclose(gradient, 0, atol=1e-12)  # nothing at the first update
        rewards[:] = 0.0
        if name != "reward_regression":
            assert (run(OBJECTIVES[name], (old, old, ref, mask, rewards), kl_coef=0.0)[1] == 0).all()

    @pytest.mark.parametrize("length", [0, 1])
    def test_responses_of_no_or_one_token(self, name, length):
        logps, old, ref, mask, rewards = make_batch(3, 1, 4, 3)
        mask[:] = np.arange(3) < length
        rewards[:] = [0.5, 1.0, 1.5, 2.0]
        loss, gradient, metrics = run(OBJECTIVES[name], (logps, old, ref, mask, rewards))
        assert math.isfinite(loss) and all(torch.isfinite(value) for value in metrics.values())
        assert (gradient[..., length:] == 0).all()
        pushed = [0, 3] if "dpo" in name else [0, 1, 2, 3]
        assert (np.abs(gradient[:, pushed, :length]) > 0).all()

    def test_an_empty_response_has_no_gradient(self, name):
        logps, old, ref, mask, rewards = make_batch(4, 1, 4, 3, empty=False)
        mask[0, 2] = False
        loss, gradient, _ = run(OBJECTIVES[name], (logps, old, ref, mask, rewards))
        assert math.isfinite(loss) and np.isfinite(gradient).all() and (gradient[0, 2] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
    def test_extreme_log_ratios_stay_finite(self, name, size, dtype):
        old = torch.zeros(2, 4, 3, dtype=dtype)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[None, :, None]
        moves = ((old + size * signs, old), (old, old + size * signs), (old - size * signs, old + size * signs))
        for moved, ref in moves:
            logps = moved.clone().requires_grad_()
            rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2)
            loss, metrics = OBJECTIVES[name](logps, old, ref, torch.ones_like(old), rewards, kl_coef=0.1)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
            assert all(torch.isfinite(value) for value in metrics.values())

    def test_a_small_temperature_does_not_overflow(self, name):
        if name in WITH_TEMPERATURE:
            logps, old, ref, mask, rewards = (torch.as_tensor(part).float() for part in make_batch(6, 2, 4, 3))
            logps.requires_grad_()
            loss, _ = OBJECTIVES[name](logps, old, ref, mask, 100 * rewards, temperature=1e-3)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()

    def test_half_precision_is_widened(self, name):
        logps, old, ref, mask, rewards = (torch.as_tensor(part) for part in make_batch(7, 2, 4, 3))
        half = [part.to(torch.bfloat16) for part in (logps, old, ref)]
        loss, metrics = OBJECTIVES[name](*half, mask, rewards.to(torch.bfloat16))
        assert loss.dtype == torch.float32 and metrics["loss"].dtype == torch.float32

    def test_old_and_reference_get_no_gradient(self, name):
        logps, old, ref, mask, rewards = (torch.as_tensor(part) for part in make_batch(9, 2, 4, 3))
        logps.requires_grad_(), old.requires_grad_(), ref.requires_grad_()
        OBJECTIVES[name](logps, old, ref, mask, rewards)[0].backward()
        assert logps.grad.abs().sum() > 0 and old.grad is None and ref.grad is None

    @pytest.mark.parametrize("length_norm", ["response", "constant"])
    def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self, name, length_norm):
        batch = make_batch(11, 4, 4, 5)
        knobs = dict(length_norm=length_norm, max_length=5)
        whole, gradient, _ = run(OBJECTIVES[name], batch, **knobs)
        cuts = (slice(0, 2), slice(2, 4))
        halves = [run(OBJECTIVES[name], tuple(part[cut] for part in batch), **knobs) for cut in cuts]
        assert whole == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-12)
        np.testing.assert_allclose(gradient, np.concatenate([half[1] for half in halves]) / 2, rtol=1e-10)


def test_bad_length_norms_are_refused():
    for knobs, words in ((dict(length_norm="mean"), "length_norm"), (dict(length_norm="constant"), "max_length")):
        with pytest.raises(ValueError, match=words):
            run(reinforce_loss, make_batch(0, 1, 4, 3), **knobs)


# --- padding, over random shapes -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), B=st.integers(1, 3), G=st.integers(2, 16), T=st.integers(1, 6),
       extra=st.integers(0, 5), filler=fillers, name=st.sampled_from(BASELINES))
def test_padding_changes_nothing(seed, B, G, T, extra, filler, name):
    logps, old, ref, mask, rewards = make_batch(seed, B, G, T)
    loss, gradient, metrics = run(OBJECTIVES[name], (logps, old, ref, mask, rewards), kl_coef=0.1)

    longer = np.pad(mask, ((0, 0), (0, 0), (0, extra)))
    padded = [np.where(longer, np.pad(part, ((0, 0), (0, 0), (0, extra))), filler) for part in (logps, old, ref)]
    padded_loss, padded_gradient, padded_metrics = run(OBJECTIVES[name], (*padded, longer, rewards), kl_coef=0.1)

    assert padded_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(padded_gradient[..., :T], gradient, rtol=1e-10, atol=1e-14)
    assert (padded_gradient[~longer] == 0).all()
    for key in metrics:
        assert padded_metrics[key].item() == pytest.approx(metrics[key].item(), rel=1e-10, abs=1e-12)
