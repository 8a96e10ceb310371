"""Float32 masters: small updates of a bfloat16 policy arrive, and what is saved of them is safe to load."""
import pickle
import shutil
import warnings

import pytest
import torch
from accelerate import Accelerator

from deepvideo_r1.config import ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import Prompt, Rollout, Sample, make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.model.policy import load_policy, save_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.support.checkpoint import publish_checkpoint
from deepvideo_r1.support.files import DamagedFileError
from deepvideo_r1.trainer import Trainer, fit
from deepvideo_r1.training.update import make_learner, stand_in, update_policy


@pytest.fixture(scope="module")
def small_weights(tiny_model, tmp_path_factory):
    "A checkpoint whose matrices have a standard deviation of 0.02."
    policy, directory = load_policy(tiny_model), tmp_path_factory.mktemp("small")
    for name, weight in policy.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02, generator=make_generator(name))
    save_policy(policy, load_processor(tiny_model), directory)
    return directory


def groups() -> list[Rollout]:
    made = []
    for number in range(2):
        generator = make_generator("group", number)
        ids = torch.randint(300, 330, (4, 6), generator=generator)
        made.append(Rollout(Sample(id=str(number), question="?", answer="x"), Prompt(torch.arange(300, 308)), ids, ids > 0,
                            torch.zeros(4, 6), rewards=torch.rand(4, generator=generator)))
    return made


def change(model, dtype: str, **settings) -> tuple[torch.Tensor, list[dict]]:
    "How 20 updates change what is trained, and their metrics."
    policy = load_policy(model, dtype=dtype, **settings)
    train = TrainConfig(learning_rate=1e-6, warmup_steps=0)
    learner = make_learner(policy, Accelerator(cpu=True), ObjectiveConfig("reg_grpo", kl_coef=0.1), train)
    trained = [p for p in policy.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    rows = [update_policy(learner, groups(), stand_in(groups()[0].sample, 300), train=train,
                          objective=ObjectiveConfig("reg_grpo", kl_coef=0.1), step=step)[0] for step in range(20)]
    assert {p.dtype for p in trained} == {torch.float32}
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(trained, before)]), rows


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}, {"train_vision": True}], ids=str)
def test_updates_of_a_bfloat16_policy_arrive(small_weights, settings):
    exact, _ = change(small_weights, "float32", **settings)
    computed, rows = change(small_weights, "bfloat16", **settings)
    reached = exact != 0  # embeddings of tokens that do not occur have no gradient
    assert float((computed[reached] != 0).float().mean()) > 0.95
    if "lora_rank" not in settings:  # the first updates of B decide the sign of those of A, whose gradient begins at 0
        assert 0.98 < float(computed @ exact / exact.square().sum()) < 1.02
    assert rows[0]["kl"] == 0 and rows[0]["ratio_mean"] == 1 and rows[-1]["kl"] > 0


def test_the_states_of_the_optimizer_are_float32(small_weights):
    policy = load_policy(small_weights, dtype="bfloat16")
    learner = make_learner(policy, Accelerator(cpu=True))
    update_policy(learner, groups(), stand_in(groups()[0].sample, 300))
    states = {value.dtype for state in learner.optimizer.state.values() for value in state.values()}
    assert states == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in learner.reference.frozen.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_a_bfloat16_run_saves_resumes_and_exports(trained_model, tiny_world, tmp_path, settings):
    "Bit for bit, and the exported model has the type of its config."
    def run(directory, steps):
        trainer = Trainer(load_policy(trained_model, dtype="bfloat16", **settings), load_processor(trained_model),
                          load_samples(tiny_world / "rl.jsonl"), directory, prompt=PromptConfig("plain"),
                          rollout=RolloutConfig(6, max_tokens=24), objective=ObjectiveConfig("grpo"),
                          train=TrainConfig(steps=steps, prompts_per_step=6, save_every=2, learning_rate=1e-2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer, fit(trainer)

    whole, rows = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    continued, _ = run(tmp_path / "parts", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), continued.policy.parameters()))
    assert rows[0]["kl"] == 0 and rows[0]["ratio_mean"] == 1 and rows[-1]["kl"] > 0

    save_policy(continued.policy, continued.processor, tmp_path / "model")
    again = load_policy(tmp_path / "model", dtype="bfloat16")
    if not settings:
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for (name, a), b in zip(again.named_parameters(), continued.policy.parameters()):
        assert torch.equal(a, b.to(a.dtype)), name


class Planted:
    "A pickle that makes a file when it is read."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_file_of_a_checkpoint_is_unpickled(trained_model, tiny_world, tmp_path):
    "Every file in turn is a planted pickle, with a manifest that fits it; it is refused by name and never run."
    def trainer():
        return Trainer(load_policy(trained_model), load_processor(trained_model), load_samples(tiny_world / "rl.jsonl"),
                       tmp_path / "run", prompt=PromptConfig("plain"), rollout=RolloutConfig(2, max_tokens=4),
                       train=TrainConfig(steps=1, prompts_per_step=2))

    fit(trainer())
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    content = pickle.dumps(Planted(tmp_path / "it ran"))
    pickle.loads(content).close()
    assert (tmp_path / "it ran").exists()
    (tmp_path / "it ran").unlink()

    for name in sorted(path.name for path in checkpoint.iterdir()):
        shutil.copytree(checkpoint, tmp_path / "good")
        (checkpoint / name).write_bytes(content)
        if name != "MANIFEST.json":
            (checkpoint / "MANIFEST.json").unlink()
            publish_checkpoint(checkpoint.rename(tmp_path / "aside"), checkpoint, 2)
        with pytest.warns(UserWarning, match="the checkpoint"), pytest.raises(DamagedFileError):
            fit(trainer())
        assert not (tmp_path / "it ran").exists(), name
        shutil.rmtree(checkpoint)
        (tmp_path / "good").rename(checkpoint)
    assert len(fit(trainer())) == 1
