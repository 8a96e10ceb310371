"""ms-swift's GRPO trainer and ours in turns in one process: `python -m peers.ms_swift FOLDER` writes FOLDER/ms_swift.json.

ms-swift takes two kinds of step here: as it is, and "lean", without the pass over the old log-probs, which it makes although one
update needs none (its loss then takes the log-probs of the same pass). What it needs to run here, none of it in its numbers:
`msgspec`, which it imports and does not require; `--template` beside `--model_type`; ids of the placeholders that are constants
in its code; VIDEO_MIN_TOKEN_NUM, without which it enlarges a frame of 252 x 252 by 78 %; an offline hub; and, for responses of
one length, `suppress_tokens` in generation_config.json.
"""
import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(sys.argv[1]).resolve()
CASE = json.loads((FOLDER / "case.json").read_text())
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "USE_HF": "1", "ENABLE_AUDIO_OUTPUT": "0", "FPS": "2",
               "MODELSCOPE_CACHE": str(FOLDER / "cache"), "HF_HOME": str(FOLDER / "hf"), "FORCE_QWENVL_VIDEO_READER": "decord",
               "FPS_MAX_FRAMES": str(CASE["frames"]), "VIDEO_MIN_TOKEN_NUM": "4", "VIDEO_MAX_TOKEN_NUM": str(CASE["side"]**2)}

import torch
from peers.torchvision_ops import define_missing_ops

define_missing_ops()
from peers.measuring import (BETAS, CLIP, KL, LEARNING_RATE, MAX_NORM, Case, Meter, count_decoded, count_model, filled,
                             keep_gradients, reward)
from peers.our_side import QUESTION, OurSide
from swift.pipelines import rlhf_main
from swift.rewards import ORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import AutoTokenizer, TrainerCallback


def write_rows(case: Case) -> Path:
    "Writes the questions; with the system prompt of ms-swift's template they have P tokens."
    tokenizer, visual = AutoTokenizer.from_pretrained(FOLDER / "model"), case.frames // 2 * case.side**2
    turn = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|>"
            "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n")
    question = filled(QUESTION, lambda text: len(tokenizer(turn.format(text))["input_ids"]) - 1 + visual, case.P)
    row = {"messages": [{"role": "user", "content": f"<video>{question}"}], "videos": [str(FOLDER / "clip.mp4")], "solution": "w"}
    path = FOLDER / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2 * case.B)
    return path


class FirstStep:
    "Keeps the groups and the gradients of the first step, as `OurSide.check` reads them."

    def __init__(self, case: Case):
        self.case, self.gradients, self.rewards, self.batches = case, {}, None, None

    def attach(self, trainer: GRPOTrainer) -> None:
        "Listens to the trainer until its first step is done."
        prepare = trainer._prepare_batch_inputs
        keep_gradients(trainer.accelerator, trainer.model, self.gradients)

        def prepared(samples):
            self.batches = prepare(samples)
            trainer._prepare_batch_inputs = prepare
            return self.batches

        trainer._prepare_batch_inputs = prepared

    def groups(self) -> list[dict]:
        found, case = [], self.case
        for number, batch in enumerate(self.batches):
            inputs, logps = batch["model_inputs"], batch["grpo_batch"].old_per_token_logps
            ids, places, patches = inputs["input_ids"], inputs["position_ids"][-3:], inputs["pixel_values_videos"]
            assert ids.shape == (case.G, case.P + case.C), f"prompt and responses are {tuple(ids.shape)}"
            found.append(dict(
                prompt_ids=ids[0, :case.P], patches=patches[:len(patches) // case.G], grid=inputs["video_grid_thw"][:1],
                seconds=float(inputs["second_per_grid_ts"][0]), positions=places[:, 0, :case.P], next=places[0, 0, case.P],
                ids=ids[:, case.P:], logps=logps, rewards=torch.tensor(self.rewards[number * case.G:][:case.G])))
        return found


class Turns(TrainerCallback):
    "Counts and times ms-swift's steps, and lets ours do a step between them."

    def __init__(self, case: Case):
        self.case, self.first, self.is_lean = case, FirstStep(case), False
        self.counts = Counter()
        self.meters = {"ms_swift": Meter(self.counts, case), "ms_swift_lean": Meter(self.counts, case)}
        self.meters["ms_swift_lean"].done = 2  # warmed up by the others; its peak is theirs
        self.ours, self.check = OurSide(case, FOLDER), None

    @property
    def meter(self) -> Meter:
        return self.meters["ms_swift_lean" if self.is_lean else "ms_swift"]

    def on_step_begin(self, *args, **kwargs):
        self.meter.begin()

    def on_step_end(self, *args, **kwargs):
        self.meter.end()
        if self.check is None:
            self.check = self.ours.check("ms-swift", self.first.groups(), self.first.gradients)
            self.first.batches = self.first.gradients = None
        timed = self.meters["ms_swift"].done > 2
        if not timed or self.is_lean:
            self.ours.step()
        self.is_lean = timed and not self.is_lean

    def attach(self, trainer: GRPOTrainer) -> None:
        "Listens to the trainer."
        self.first.attach(trainer)
        for model in (trainer.model, trainer.ref_model):
            count_model(model.model.visual, model.model.language_model, self.counts, self.case.P)
        score, generate = trainer._get_per_token_logps_and_entropies, trainer._generate_completions

        def score_unless_lean(model, *args, **kwargs):
            is_old = model is trainer.model and not torch.is_grad_enabled()
            return (None, None) if is_old and self.is_lean else score(model, *args, **kwargs)

        def generate_timed(*args, **kwargs):
            return self.meter.generating(generate)(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies, trainer._generate_completions = score_unless_lean, generate_timed
        trainer.add_callback(self)


def main() -> None:
    case = Case.read(FOLDER)
    torch.set_num_threads(case.threads)
    turns = Turns(case)
    count_decoded(turns.counts)
    Qwen2VLTemplate.image_token_id, Qwen2VLTemplate.video_token_id = case.pad_ids["image"], case.pad_ids["video"]

    class Reward(ORM):
        def __call__(self, completions, **columns):
            rewards = [reward(text) for text in completions]
            turns.first.rewards = turns.first.rewards or rewards
            return rewards

    orms["ours"] = Reward
    make = GRPOTrainer.__init__

    def make_and_attach(self, *args, **kwargs):
        make(self, *args, **kwargs)
        turns.attach(self)

    GRPOTrainer.__init__ = make_and_attach
    given = dict(
        rlhf_type="grpo", model=FOLDER / "model", model_type="qwen2_5_vl", template="qwen2_5_vl", tuner_type="full",
        freeze_vit=True, freeze_aligner=True, dataset=write_rows(case), split_dataset_ratio=0, reward_funcs="ours",
        num_generations=case.G, per_device_train_batch_size=case.G, gradient_accumulation_steps=case.B,
        max_completion_length=case.C, max_length=8192, temperature=1.0, top_p=1.0, top_k=0, beta=KL, epsilon=CLIP,
        loss_type="grpo", num_iterations=1, max_steps=2 + 2 * case.rounds, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", warmup_ratio=0, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0,
        max_grad_norm=MAX_NORM, optim="adamw_torch", torch_dtype="float32", bf16=False, fp16=False, attn_impl="sdpa",
        gradient_checkpointing=False, use_vllm=False, report_to="none", save_strategy="no", eval_strategy="no",
        logging_steps=1, log_completions=False, output_dir=FOLDER / "out", dataloader_num_workers=0, dataset_num_proc=1,
        load_from_cache_file=False)
    with turns.ours:
        rlhf_main([word for name, value in given.items()
                   for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))])
    sides = {name: meter.result for name, meter in turns.meters.items()} | {"ours": turns.ours.meter.result}
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "ms-swift")}
    (FOLDER / "ms_swift.json").write_text(json.dumps(dict(sides=sides, check=turns.check, versions=versions)))


if __name__ == "__main__":
    main()
