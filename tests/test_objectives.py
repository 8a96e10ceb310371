"""GRPO and Reg-GRPO against an independent NumPy rewrite: values, gradients, edge cases, padding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1.advantage import group_advantages, is_vanishing
from deepvideo_r1.grpo import LENGTH_NORMS, LOG_RATIO_LIMIT, bounded_exp, grpo_loss, kl_k3
from deepvideo_r1.reg_grpo import predicted_advantages, reg_grpo_loss

OBJECTIVES = {"grpo": grpo_loss, "reg_grpo": reg_grpo_loss}


# --- the oracle: loops over prompts, responses and tokens, float64, written from the equations -----------------------


def oracle_advantages(rewards, ddof=0, eps=1e-6):
    result = np.zeros_like(rewards)
    for b, group in enumerate(rewards):
        if group.max() - group.min() > 1e-6:
            result[b] = (group - group.mean()) / (group.std(ddof=ddof) + eps)
    return result


def oracle_exp(x):
    return math.exp(x) if x <= LOG_RATIO_LIMIT else math.exp(LOG_RATIO_LIMIT) * (1 + x - LOG_RATIO_LIMIT)


def oracle_k3(logp, ref):
    return oracle_exp(ref - logp) - 1 - (ref - logp)


def oracle_average(tokens, mask, length_norm, max_length):
    """`tokens(b, g, t)` averaged over real tokens."""
    B, G, T = mask.shape
    total, count, responses = 0.0, 0, 0.0
    for b in range(B):
        for g in range(G):
            real = [t for t in range(T) if mask[b, g, t]]
            subtotal = sum(tokens(b, g, t) for t in real)
            total, count = total + subtotal, count + len(real)
            responses += subtotal / {"response": max(len(real), 1), "constant": max_length, "token": 1}[length_norm]
    return total / max(count, 1) if length_norm == "token" else responses / (B * G)


def oracle_grpo(logps, old, ref, mask, rewards, *, kl_coef, clip_eps, ddof, length_norm, max_length):
    advantages = oracle_advantages(rewards, ddof)

    def token(b, g, t):
        ratio, advantage = oracle_exp(logps[b, g, t] - old[b, g, t]), advantages[b, g]
        gain = ratio * advantage
        if clip_eps is not None:
            gain = min(gain, min(max(ratio, 1 - clip_eps), 1 + clip_eps) * advantage)
        return -gain + (kl_coef * oracle_k3(logps[b, g, t], ref[b, g, t]) if kl_coef else 0.0)

    return oracle_average(token, mask, length_norm, max_length)


def oracle_reg_grpo(logps, old, ref, mask, rewards, *, kl_coef, sigma_floor, ddof, length_norm, max_length):
    advantages, (B, G, _) = oracle_advantages(rewards, ddof), mask.shape
    loss = 0.0
    for b in range(B):
        if rewards[b].max() - rewards[b].min() <= 1e-6:
            continue
        rho = np.array([sum((logps - old)[b, g][mask[b, g]]) for g in range(G)])
        predicted = (rho - rho.mean()) / math.sqrt(rho.var(ddof=ddof) + sigma_floor**2)
        loss += ((advantages[b] - predicted) ** 2).sum() / (B * G)
    if kl_coef:
        kl = lambda b, g, t: oracle_k3(logps[b, g, t], ref[b, g, t])
        loss += kl_coef * oracle_average(kl, mask, length_norm, max_length)
    return loss


def numeric_gradient(function, logps, mask, step=1e-5):
    """Central differences of fourth order at every real token; zero on padding by definition."""
    gradient = np.zeros_like(logps)
    for index in zip(*np.nonzero(mask)):
        values = []
        for offset in (-2, -1, 1, 2):
            moved = logps.copy()
            moved[index] += offset * step
            values.append(function(moved))
        gradient[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return gradient


# --- random groups ---------------------------------------------------------------------------------------------------


def make_batch(seed, B, G, T, *, spread=0.3, empty=True):
    """NumPy float64 log-probs, ragged masks (some rows empty or of one token), and rewards with ties."""
    rng = np.random.default_rng(seed)
    old = -rng.uniform(0.1, 3.0, (B, G, T))
    logps, ref = old + spread * rng.normal(size=(B, G, T)), old + spread * rng.normal(size=(B, G, T))
    lengths = rng.integers(0 if empty else 1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    rewards = rng.choice([0.0, 1.0, 1.5, 2.0], size=(B, G))
    if B > 1:
        rewards[0] = 1.0  # a vanishing group
    return logps, old, ref, mask, rewards


def run(objective, batch, **knobs):
    """Loss, gradient and metrics of one of ours."""
    logps, old, ref, mask, rewards = (None if part is None else torch.as_tensor(part) for part in batch)
    logps = logps.clone().requires_grad_()
    loss, metrics = objective(logps, old, ref, mask, rewards, **knobs)
    return loss.item(), torch.autograd.grad(loss, logps)[0].numpy(), metrics


def assert_agrees(name, batch, **knobs):
    loss, gradient, _ = run(OBJECTIVES[name], batch, **knobs)
    oracle = {"grpo": oracle_grpo, "reg_grpo": oracle_reg_grpo}[name]
    logps, old, ref, mask, rewards = batch
    function = lambda moved: oracle(moved, old, ref, mask, rewards, **knobs)
    assert loss == pytest.approx(function(logps), rel=1e-6, abs=1e-12)
    expected = numeric_gradient(function, logps, mask)
    assert np.linalg.norm(gradient - expected) <= 1e-6 * np.linalg.norm(expected) + 1e-9
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
@pytest.mark.parametrize("clip_eps", [0.2, None])
@pytest.mark.parametrize("B, G, T", [(1, 2, 3), (2, 4, 5), (3, 8, 4), (1, 16, 3)])
def test_grpo_agrees_with_numpy(B, G, T, clip_eps, length_norm):
    for seed in range(3):
        knobs = dict(kl_coef=(0.0, 0.04, 1.0)[seed], clip_eps=clip_eps, ddof=seed % 2)
        assert_agrees("grpo", make_batch(seed, B, G, T), length_norm=length_norm, max_length=7, **knobs)


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
@pytest.mark.parametrize("sigma_floor", [0.05, 1.0])
@pytest.mark.parametrize("B, G, T", [(1, 2, 3), (2, 4, 5), (3, 8, 4), (1, 16, 3)])
def test_reg_grpo_agrees_with_numpy(B, G, T, sigma_floor, length_norm):
    for seed in range(3):
        knobs = dict(kl_coef=(0.0, 0.1, 1.0)[seed], sigma_floor=sigma_floor, ddof=seed % 2)
        assert_agrees("reg_grpo", make_batch(seed, B, G, T), length_norm=length_norm, max_length=7, **knobs)


def test_the_first_update_agrees_too():
    logps, old, ref, mask, rewards = make_batch(5, 2, 4, 4)
    for name, knobs in {"grpo": dict(clip_eps=0.2), "reg_grpo": dict(sigma_floor=1.0)}.items():
        knobs |= dict(kl_coef=0.5, ddof=0, length_norm="response", max_length=None)
        assert_agrees(name, (old.copy(), old, ref, mask, rewards), **knobs)


@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_agree_with_numpy(ddof):
    for seed in range(20):
        rewards = np.random.default_rng(seed).choice([0.0, 0.3, 1.0, 2.0], size=(6, 2 + seed % 15))
        ours = group_advantages(torch.from_numpy(rewards), ddof=ddof).numpy()
        np.testing.assert_allclose(ours, oracle_advantages(rewards, ddof), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_agree_with_numpy(name):
    batch = logps, old, ref, mask, rewards = make_batch(12, 3, 8, 5)
    loss, _, metrics = run(OBJECTIVES[name], batch, kl_coef=0.3)
    advantages, ratio = oracle_advantages(rewards), np.exp(logps - old)
    expected = dict(
        loss=loss,
        kl=oracle_average(lambda b, g, t: oracle_k3(logps[b, g, t], ref[b, g, t]), mask, "response", None),
        ratio_mean=oracle_average(lambda b, g, t: ratio[b, g, t], mask, "response", None),
        advantage_abs_mean=np.abs(advantages).mean(),
        vanishing_ratio=1 / 3,
    )
    if name == "grpo":
        gain = np.broadcast_to(advantages[..., None], ratio.shape)
        dead = (gain > 0) & (ratio > 1.2) | (gain < 0) & (ratio < 0.8)
        expected |= dict(clip_fraction=oracle_average(lambda b, g, t: dead[b, g, t], mask, "response", None), policy_loss=loss - 0.3 * expected["kl"])
    else:
        rho = np.where(mask, logps - old, 0).sum(-1)
        corr = [np.corrcoef(rho[b], advantages[b])[0, 1] for b in (1, 2)]
        expected |= dict(clip_fraction=0, log_ratio_std=rho.std(-1).mean(), advantage_corr=np.sum(corr) / 3,  # the first group vanishes and counts as 0
                        
                         regression_loss=loss - 0.3 * expected["kl"])
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-9)


# --- edge cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
class TestEdges:
    def test_a_group_of_one_is_refused(self, objective):
        with pytest.raises(ValueError, match="group_size >= 2"):
            run(objective, make_batch(0, 2, 1, 3))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_rewards_that_are_not_finite_are_refused(self, objective, bad):
        batch = make_batch(0, 2, 4, 3)
        batch[-1][1, 2] = bad
        with pytest.raises(ValueError, match=r"must be finite.*\(1, 2\)"):
            run(objective, batch)

    def test_shapes_that_disagree_are_refused(self, objective):
        logps, old, ref, mask, rewards = make_batch(0, 2, 4, 3)
        for batch in (
            (logps, old[..., :2], ref, mask, rewards),
            (logps, old, ref[:1], mask, rewards),
            (logps, old, ref, mask[:, :2], rewards),
            (logps, old, ref, mask, rewards[:, :2]),
            (logps[0], old[0], ref[0], mask[0], rewards),
        ):
            with pytest.raises(ValueError, match="shape"):
                run(objective, batch)

    @pytest.mark.parametrize("kl_coef", [-0.1, math.nan])
    def test_a_coefficient_below_zero_is_refused(self, objective, kl_coef):
        with pytest.raises(ValueError, match="kl_coef"):
            run(objective, make_batch(0, 1, 2, 3), kl_coef=kl_coef)

    def test_no_reference_without_a_kl_term(self, objective):
        logps, old, _, mask, rewards = make_batch(0, 2, 4, 3)
        with pytest.raises(ValueError, match="set kl_coef=0"):
            run(objective, (logps, old, None, mask, rewards), kl_coef=0.1)
        loss, gradient, metrics = run(objective, (logps, old, None, mask, rewards), kl_coef=0.0)
        assert math.isfinite(loss) and np.isfinite(gradient).all() and metrics["kl"] == 0
        with_reference = run(objective, (logps, old, old, mask, rewards), kl_coef=0.0)
        np.testing.assert_array_equal(gradient, with_reference[1])

    def test_equal_rewards_leave_only_the_kl(self, objective):
        logps, old, ref, mask, rewards = make_batch(1, 2, 4, 3)
        rewards[:] = 0.1
        loss, gradient, metrics = run(objective, (logps, old, ref, mask, rewards), kl_coef=0.0)
        assert loss == 0 and (gradient == 0).all() and metrics["vanishing_ratio"] == 1
        loss, gradient, metrics = run(objective, (logps, old, ref, mask, rewards), kl_coef=0.5)
        assert loss == pytest.approx(0.5 * metrics["kl"].item()) and np.abs(gradient).sum() > 0

    def test_a_vanishing_group_adds_nothing_beside_another(self, objective):
        batch = make_batch(2, 2, 4, 3)
        _, gradient, metrics = run(objective, batch, kl_coef=0.0)
        assert (gradient[0] == 0).all() and np.abs(gradient[1]).sum() > 0 and metrics["vanishing_ratio"] == 0.5
        alone = run(objective, tuple(part[1:] for part in batch), kl_coef=0.0)
        np.testing.assert_allclose(gradient[1:], alone[1] / 2, rtol=1e-12)

    @pytest.mark.parametrize("length", [0, 1])
    def test_responses_of_no_or_one_token(self, objective, length):
        logps, old, ref, mask, rewards = make_batch(3, 1, 4, 3)
        mask[:] = np.arange(3) < length
        loss, gradient, metrics = run(objective, (logps, old, ref, mask, rewards))
        assert math.isfinite(loss) and np.isfinite(gradient).all()
        assert all(torch.isfinite(value) for value in metrics.values())
        assert (gradient[..., length:] == 0).all() and (np.abs(gradient[..., :length]) > 0).all()

    def test_an_empty_response_has_no_gradient(self, objective):
        logps, old, ref, mask, rewards = make_batch(4, 1, 4, 3, empty=False)
        mask[0, 2] = False
        loss, gradient, _ = run(objective, (logps, old, ref, mask, rewards))
        assert math.isfinite(loss) and np.isfinite(gradient).all() and (gradient[0, 2] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
    def test_extreme_log_ratios_stay_finite(self, objective, size, dtype):
        old = torch.zeros(2, 4, 3, dtype=dtype)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[None, :, None]
        for logps, ref in ((old + size * signs, old), (old, old + size * signs), (old - size * signs,
            old + size * signs)):
            logps = logps.clone().requires_grad_()
            rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2)
            loss, metrics = objective(logps, old, ref, torch.ones_like(old), rewards)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(logps.grad).all() and torch.isfinite(logps.grad.norm())
            assert all(torch.isfinite(value) for value in metrics.values())

    def test_log_ratios_of_thirty_agree_with_numpy(self, objective):
        logps, old, ref, mask, rewards = make_batch(6, 1, 4, 2, empty=False)
        logps[0, 0, 0], logps[0, 1, 0] = old[0, 0, 0] + 30, old[0, 1, 0] - 30
        ref[0, 1, 0] = logps[0, 1, 0] + 30 - 1e-3  # just below the limit, where the formula is exact
        name, knobs = ("grpo", dict(clip_eps=None)) if objective is grpo_loss else ("reg_grpo", dict(sigma_floor=1.0))
        knobs |= dict(ddof=0, length_norm="response", max_length=None)
        oracle = oracle_grpo if name == "grpo" else oracle_reg_grpo
        loss, _, _ = run(objective, (logps, old, ref, mask, rewards), kl_coef=0.04, **knobs)
        assert loss == pytest.approx(oracle(logps, old, ref, mask, rewards, kl_coef=0.04, **knobs), rel=1e-6)

    def test_half_precision_is_widened(self, objective):
        logps, old, ref, mask, rewards = (torch.as_tensor(part) for part in make_batch(7, 2, 4, 3))
        half = [part.to(torch.bfloat16) for part in (logps, old, ref)]
        loss, metrics = objective(*half, mask, rewards.to(torch.bfloat16))
        assert loss.dtype == torch.float32 and metrics["loss"].dtype == torch.float32

    def test_masks_may_be_bool_integer_or_float(self, objective):
        logps, old, ref, mask, rewards = make_batch(8, 2, 4, 3)
        masks = [mask.astype(dtype) for dtype in (bool, np.int64, np.float32)]
        assert len({run(objective, (logps, old, ref, mask, rewards))[0] for mask in masks}) == 1

    def test_old_and_reference_get_no_gradient(self, objective):
        logps, old, ref, mask, rewards = (torch.as_tensor(part) for part in make_batch(9, 2, 4, 3))
        logps.requires_grad_(), old.requires_grad_(), ref.requires_grad_()
        objective(logps, old, ref, mask, rewards)[0].backward()
        assert logps.grad.abs().sum() > 0 and old.grad is None and ref.grad is None

    def test_metrics_are_detached_scalars(self, objective):
        _, _, metrics = run(objective, make_batch(10, 2, 4, 3))
        names = {"loss", "kl", "clip_fraction", "ratio_mean", "advantage_abs_mean", "vanishing_ratio"}
        own = {"policy_loss"} if objective is grpo_loss else {"regression_loss", "log_ratio_std", "advantage_corr"}
        assert set(metrics) == names | own
        assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())

    @pytest.mark.parametrize("length_norm", ["response", "constant"])
    def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self, objective, length_norm):
        batch = make_batch(11, 4, 4, 5)
        knobs = dict(length_norm=length_norm, max_length=5)
        whole, gradient, _ = run(objective, batch, **knobs)
        halves = [run(objective, tuple(part[cut] for part in batch), **knobs) for cut in (slice(0, 2), slice(2, 4))]
        assert whole == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-12)
        np.testing.assert_allclose(gradient, np.concatenate([half[1] for half in halves]) / 2, rtol=1e-10)


def test_bad_knobs_are_refused():
    batch = make_batch(0, 1, 4, 3)
    for objective, knobs, words in (
        (grpo_loss, dict(clip_eps=-0.2), "clip_eps"),
        (grpo_loss, dict(length_norm="mean"), "length_norm"),
        (grpo_loss, dict(length_norm="constant"), "max_length"),
        (grpo_loss, dict(ddof=3), "ddof"),
        (reg_grpo_loss, dict(sigma_floor=0.0), "sigma_floor"),
        (reg_grpo_loss, dict(sigma_floor=math.nan), "sigma_floor"),
        (reg_grpo_loss, dict(length_norm="sum"), "length_norm"),
    ):
        with pytest.raises(ValueError, match=words):
            run(objective, batch, **knobs)


def test_bounded_exp_continues_smoothly():
    x = torch.tensor([-800.0, 0.0, 29.999, 30.0, 30.001, 1e4], dtype=torch.float64, requires_grad=True)
    value = bounded_exp(x)
    slope, = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value[:4], x[:4].exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope[:4], x[:4].exp(), rtol=1e-12, atol=0)
    assert value[4] > value[3] and slope[4] == slope[5] == slope[3]


def test_k3_is_never_negative_and_pulls_home():
    d = torch.linspace(-40, 40, 2001, dtype=torch.float64)
    logps = (-d).requires_grad_()
    kl = kl_k3(logps, torch.zeros_like(d))
    slope, = torch.autograd.grad(kl.sum(), logps)
    assert (kl >= 0).all() and (slope.sign() == -d.sign()).all()


# --- padding, over random shapes -------------------------------------------------------------------------------------

fillers = st.sampled_from([0.0, -1.0, 1e30, -1e30, math.inf, -math.inf, math.nan])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), B=st.integers(1, 3), G=st.integers(2, 16), T=st.integers(1, 6),
    extra=st.integers(0, 5),
    filler=fillers, name=st.sampled_from(list(OBJECTIVES)), length_norm=st.sampled_from(LENGTH_NORMS),
)
def test_padding_changes_nothing(seed, B, G, T, extra, filler, name, length_norm):
    logps, old, ref, mask, rewards = make_batch(seed, B, G, T)
    knobs = dict(length_norm=length_norm, max_length=9)
    loss, gradient, metrics = run(OBJECTIVES[name], (logps, old, ref, mask, rewards), **knobs)

    longer = np.pad(mask, ((0, 0), (0, 0), (0, extra)))
    padded = [np.where(longer, np.pad(part, ((0, 0), (0, 0), (0, extra))), filler) for part in (logps, old, ref)]
    padded_loss, padded_gradient, padded_metrics = run(OBJECTIVES[name], (*padded, longer, rewards), **knobs)

    assert padded_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(padded_gradient[..., :T], gradient, rtol=1e-10, atol=1e-15)
    assert (padded_gradient[~longer] == 0).all()
    for key in metrics:
        assert padded_metrics[key].item() == pytest.approx(metrics[key].item(), rel=1e-10, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(rewards=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_advantages_of_any_rewards(rewards):
    rewards = torch.tensor(rewards)
    advantages = group_advantages(rewards)
    assert torch.isfinite(advantages).all() and advantages.abs().max() <= 5**0.5 + 1e-3
    assert (advantages.sum(-1).abs() < 0.1).all()
    assert (advantages[is_vanishing(rewards)] == 0).all()


@settings(max_examples=60, deadline=None)
@given(rho=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=16), floor=st.floats(1e-3, 10))
def test_predicted_advantages_of_any_log_ratios(rho, floor):
    log_ratio = torch.tensor([rho], requires_grad=True)
    predicted = predicted_advantages(log_ratio, sigma_floor=floor)
    predicted.pow(2).sum().backward()
    assert torch.isfinite(predicted).all() and torch.isfinite(log_ratio.grad).all()
    assert predicted.abs().max() <= len(rho) ** 0.5 + 1e-3
