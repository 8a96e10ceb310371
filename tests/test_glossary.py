"""Every number in a file has a meaning in a glossary, and no meaning is left over."""
import json

import pytest
import torch
from accelerate import Accelerator

from deepvideo_r1.baselines import OBJECTIVES
from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.core import Sample
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.evaluation.evaluate import ROW_FIELDS, evaluate
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.support.glossary import Meaning, glossary_table, unexplained
from deepvideo_r1.toy.made_up import write_made_up_run
from deepvideo_r1.toy.study import RESULT_FIELDS, arm_figures, level_figures, result_names
from deepvideo_r1.trainer import Trainer
from deepvideo_r1.training.step_metrics import STEP_METRICS


@pytest.fixture(scope="module")
def step_rows(trained_model, tiny_world, tmp_path_factory):
    "A row of a real step for every objective, with augmentation."
    rows = []
    for name in OBJECTIVES:
        trainer = Trainer(
            load_policy(trained_model), load_processor(trained_model), load_samples(tiny_world / "rl.jsonl"),
            tmp_path_factory.mktemp("run"), train=TrainConfig(prompts_per_step=2), prompt=PromptConfig("plain"),
            rollout=RolloutConfig(2, max_tokens=4), objective=ObjectiveConfig(name),
            augment=AugmentConfig(enabled=True, min_groups=1, hint_source="stored"), accelerator=Accelerator(cpu=True))
        rows.append(trainer.step())
    return rows


def test_every_metric_of_a_step_is_explained_and_every_explanation_is_of_a_metric(step_rows):
    for row in step_rows:
        assert unexplained(row, STEP_METRICS) == []
    written = {name for row in step_rows for name in row}
    with_an_engine = {"engine_gap", "engine_gap_max", "sampler_weight", "sampler_weight_cut"}  # see test_engines
    assert {name for name in STEP_METRICS if name not in written and "<" not in name} == with_an_engine


def test_a_part_of_your_own_reward_is_explained():
    assert unexplained(["reward_brevity"], STEP_METRICS) == [] and unexplained(["brevity"], STEP_METRICS) == ["brevity"]


def test_every_field_of_an_evaluation_row_is_explained(trained_model, tiny_world):
    samples = [load_samples(tiny_world / f"{name}.jsonl")[0] for name in ("L1", "grounding")]
    samples += [Sample(id="both", question="what ?", options=("a", "b"), answer="A", kind="choice", spans=((0.0, 1.0),)),
                Sample(id="gone", video="gone.mp4", question="what ?", answer="x")]
    rows = evaluate(load_policy(trained_model), load_processor(trained_model), samples, prompt=PromptConfig("plain"),
                    max_tokens=4)
    assert {name for row in rows for name in row} == set(ROW_FIELDS)


def test_every_field_of_the_results_is_explained(step_rows, tmp_path):
    made_up = json.loads((write_made_up_run(tmp_path, seeds=[0], extras=False) / "results.json").read_text())
    levels = level_figures({"greedy": [{"parts": {"accuracy": [1.0]}}], "sampled": [{"parts": {"accuracy": [0.0]}}]})
    entry = made_up["arms"][0]
    gain = {"sampled": 0.1, "ci": [0, 1], "greedy": 0.1, "greedy_ci": [0, 1]}
    real = {"config": {}, "cold_start": {"seconds": 1.0, "loss": 0.1, "reused": False, "accuracy": {"L1": levels}, "grounding": levels},
            "arms": [{"arm": "grpo", "seed": 0, "cpu_seconds": 1.0, **arm_figures(step_rows[:1]), "accuracy": {"L1": levels}, "gain": {"L1": gain}}]}
    assert unexplained(result_names(real), RESULT_FIELDS) == []
    assert unexplained(result_names(made_up), RESULT_FIELDS) == [] and entry["arm"] == "grpo"
    generic = {name.replace(".L1.", ".<level>.") for name in result_names(real)}
    assert [name for name in RESULT_FIELDS if name not in generic] == []


def test_a_table_keeps_bars_within_their_cells():
    assert glossary_table({"x": Meaning("|difference|", "nats")}).splitlines()[2] == "| `x` | \\|difference\\| | nats |  |"
