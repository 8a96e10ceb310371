"""Answers of the toy's cold start to five questions, sampled once for the effect explorer: `python docs/record_effect.py [CACHE]`.

CACHE holds worlds and cold starts; what is missing there is made. Writes `deepvideo_r1/explore/answers.json`.
"""
import json
import sys
from pathlib import Path

from deepvideo_r1.data.clip_cache import visuals_loader
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.explore.effect import LEVELS, NAMES, choose_spread, record_question
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import rollout_groups
from deepvideo_r1.reward import score
from deepvideo_r1.toy.cold_start import cold_start
from deepvideo_r1.toy.config import ToyConfig

ROOT = Path(__file__).resolve().parent.parent
N_QUESTIONS, N_TRIES = 240, 128  # questions to choose from, responses to each


if __name__ == "__main__":
    config = ToyConfig()
    world, checkpoint, _ = cold_start(config, sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "toy" / "cache")
    processor, policy = load_processor(checkpoint), load_policy(checkpoint)
    samples, load = load_samples(world / "rl.jsonl")[:N_QUESTIONS], visuals_loader(config.prompt)
    prompts = [build_prompt(sample, load(sample, processor), processor, template=config.prompt.template)
               for sample in samples]
    groups = rollout_groups(policy, processor, samples, prompts, [(0, "probe", sample.id) for sample in samples],
                            group_size=N_TRIES, max_tokens=config.rollout.max_tokens)
    scored = [score(group) for group in groups]
    accuracies = [float(group.reward_parts["accuracy"].mean()) for group in scored]
    mean = sum(float(group.rewards.mean()) for group in scored) / len(scored)
    levels = {knob: [round(level, 4) for level in values] for knob, values in LEVELS.items()}
    chosen = [samples[place] for place in choose_spread(accuracies)]
    questions = [{"name": name} | record_question(policy, processor, sample, prompt=config.prompt, levels=levels,
                                                  max_tokens=config.rollout.max_tokens)
                 for name, sample in zip(NAMES, chosen)]
    record = {"levels": levels, "buffer_mean": round(mean, 3), "questions": questions}
    path = ROOT / "deepvideo_r1" / "explore" / "answers.json"
    path.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.stat().st_size} bytes; accuracy of all {len(samples)}: {sum(accuracies) / len(accuracies):.2f}")
