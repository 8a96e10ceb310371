"""Video-R1's own trainer on a case, in a process and an environment of its own: a step for each line on standard input.

    python -m peers.video_r1 FOLDER SOURCE

SOURCE is a clone of https://github.com/tulerfeng/Video-R1. Two things are changed, without which it does not run on a CPU:
`.to('cuda')` in its trainer, and the encoder's attention, for which transformers 4.50 builds a mask over all copies of the
video where no flash attention is installed. The first is one line; the second computes the same, frame by frame. Sizes of
frames are set as the other sides have them.
"""
import json
import os
import sys
import types
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "FORCE_QWENVL_VIDEO_READER": "decord", "WANDB_DISABLED": "true"}
FOLDER, SOURCE = (Path(path).resolve() for path in sys.argv[1:3])
sys.path[:0] = [str(SOURCE / "src/qwen-vl-utils/src")]
ANSWERS = os.fdopen(os.dup(1), "w")  # what the trainer prints goes to standard error
os.dup2(2, 1)

import torch
import torch.nn.functional as F
from peers.measuring import (BETAS, KL, LEARNING_RATE, MAX_NORM, Case, Meter, count_decoded, count_model, filled, keep_gradients,
                             reward)
from peers.torchvision_ops import define_missing_ops

define_missing_ops()
import qwen_vl_utils.vision_process as vision
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2TokenizerFast,
                          Qwen2VLImageProcessor, TrainerCallback)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from trl import GRPOConfig

QUESTION = "what colour is the ball ?"


def answer(word: str, **content) -> None:
    print(word, json.dumps(content), file=ANSWERS, flush=True)


# --- the checkpoint, in the layout of transformers 4.50 ---------------------------------------------------------------

def old_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def new_name(name: str) -> str:
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def load_model() -> Qwen2_5_VLForConditionalGeneration:
    "The model of the case with the same weights; its encoder is frozen."
    saved = json.loads((FOLDER / "model/config.json").read_text())
    text, rope = saved["text_config"], saved["text_config"].pop("rope_parameters")
    kept = {name: value for name, value in text.items() if name not in ("model_type", "dtype", "layer_types")}
    ids = {name: value for name, value in saved.items() if name.endswith("token_id")}
    encoder = {k: v for k, v in saved["vision_config"].items() if k not in ("dtype", "model_type", "initializer_range")}
    config = Qwen2_5_VLConfig(vision_config=encoder, rope_theta=rope["rope_theta"], **kept | ids, **{
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}})
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config)
    weights = {old_name(name): value for name, value in load_file(FOLDER / "model/model.safetensors").items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.config._name_or_path = "model"
    model.visual.requires_grad_(False)
    return model


def load_processor(side: int) -> Qwen2_5_VLProcessor:
    "The processor of the case."
    tokenizer = Qwen2TokenizerFast(tokenizer_file=str(FOLDER / "model/tokenizer.json"), eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    template = (FOLDER / "model/chat_template.jinja").read_text()
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=(28 * side)**2)
    return Qwen2_5_VLProcessor(images, tokenizer, chat_template=template)


def by_frame(self, hidden_states, cu_seqlens, rotary_pos_emb=None, position_embeddings=None):
    "Attention of the encoder within each frame or window, as flash attention computes it."
    n = len(hidden_states)
    query, key, value = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)
    query, key = modeling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    sizes = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x in (query, key, value)))
    out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)[0].transpose(0, 1)
    return self.proj(out.reshape(n, -1))


# --- the trainer ------------------------------------------------------------------------------------------------------

def load_trainer(side: int, frames: int, processor: Qwen2_5_VLProcessor) -> type:
    "Their trainer's class, from their file with `.to('cuda')` replaced."
    pixels = (28 * side)**2
    vision.VIDEO_MIN_PIXELS, vision.VIDEO_MAX_PIXELS, vision.FPS_MAX_FRAMES = min(4 * 28 * 28, pixels), pixels, frames
    modeling.Qwen2_5_VLVisionSdpaAttention.forward = by_frame
    path = SOURCE / "src/r1-v/src/open_r1/trainer/grpo_trainer.py"
    module = types.ModuleType("video_r1_trainer")
    module.__file__ = str(path)
    exec(compile(path.read_text().replace(".to('cuda')", ".to(device)"), str(path), "exec"), module.__dict__)
    module.AutoProcessor = types.SimpleNamespace(from_pretrained=lambda *args, **kwargs: processor)
    return module.Qwen2VLGRPOTrainer


class Turns(TrainerCallback):
    "Waits for a line before each step, and answers with what was measured after the last."

    def __init__(self, meter: Meter, kept: dict, case: Case):
        self.meter, self.kept, self.case = meter, kept, case

    def on_step_begin(self, *args, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)  # the other side has ended
        self.meter.begin()

    def on_step_end(self, *args, **kwargs):
        self.meter.end()
        if self.meter.done == 1:
            torch.save(first_group(self.kept, self.case), FOLDER / "video_r1.pt")
            self.kept.clear()
        answer("STEP", **self.meter.result)


def first_group(kept: dict, case: Case) -> dict:
    "Prompt, responses, log-probs and gradients of the first step, as `OurSide.check` reads them."
    ids, inputs, positions = kept["ids"], kept["inputs"], kept["positions"]
    assert ids.shape == (case.G, case.P + case.C), f"prompt and responses are {tuple(ids.shape)}"
    patches = inputs["pixel_values_videos"]
    group = dict(prompt_ids=ids[0, :case.P], patches=patches[:len(patches) // case.G], grid=inputs["video_grid_thw"][:1],
                 seconds=1.0, positions=positions[:, 0, :case.P], next=positions[0, 0, case.P], ids=ids[:, case.P:],
                 logps=kept["logps"][:, case.P - 1:], rewards=torch.tensor(kept["rewards"]))
    gradients = {new_name(name): value for name, value in kept["gradients"].items()}
    return dict(groups=[{k: v.clone() if torch.is_tensor(v) else v for k, v in group.items()}], gradients=gradients)


def keep_first_step(trainer, kept: dict) -> None:
    "Fills `kept` with what the first pass with a gradient read and computed."
    score, kept["gradients"] = trainer._get_per_token_logps, {}
    keep_gradients(trainer.accelerator, trainer.model, kept["gradients"])

    def scored(model, ids, **inputs):
        logps = score(model, ids, **inputs)
        if kept and "logps" not in kept:
            kept.update(ids=ids, inputs=inputs, logps=logps.detach())
        return logps

    def placed(module, args, kwargs):
        if kept and "positions" not in kept and torch.is_grad_enabled():
            kept["positions"] = kwargs["position_ids"]

    trainer._get_per_token_logps = scored
    trainer.model.model.register_forward_pre_hook(placed, with_kwargs=True)


def main() -> None:
    case = Case.read(FOLDER)
    torch.set_num_threads(case.threads)
    counts, kept = Counter(), {}
    meter, processor = Meter(counts, case), load_processor(case.side)
    model, trainer_class = load_model(), load_trainer(case.side, case.frames, processor)

    # one row, again and again: a video and a question that make P tokens
    content = lambda text: [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": text}]}]
    asked = lambda text: processor.apply_chat_template(content(text), add_generation_prompt=True)
    visual = case.frames // 2 * case.side**2
    count = lambda text: len(processor.tokenizer(asked(text))["input_ids"]) - 1 + visual
    question = filled(QUESTION, count, case.P)
    rows = [{"prompt": content(question), "data_type": "video", "path": "./clip.mp4", "problem_id": i} for i in range(8)]
    os.chdir(FOLDER)  # the trainer looks for videos below the working directory
    if not Path("Video-R1-data").exists():
        os.symlink(FOLDER, "Video-R1-data")

    def rewards(prompts, completions, **columns):
        values = [reward(completion[0]["content"]) for completion in completions]
        if kept:  # of the first step
            kept["rewards"] = values
        return values

    args = GRPOConfig(output_dir=str(FOLDER / "video_r1"), per_device_train_batch_size=1, gradient_accumulation_steps=1,
                      num_generations=case.G, max_steps=case.rounds + 2, max_prompt_length=16384, max_completion_length=case.C,
                      beta=KL, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.0, weight_decay=0.0,
                      adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=MAX_NORM, bf16=False, fp16=False, use_cpu=True,
                      gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
                      remove_unused_columns=False)
    args.model_init_kwargs = None
    trainer = trainer_class(model, reward_funcs=rewards, args=args, train_dataset=Dataset.from_list(rows),
                            script_args=types.SimpleNamespace(temporal=False, len_control=False),
                            attn_implementation="sdpa", callbacks=[Turns(meter, kept, case)])
    trainer.generation_config.suppress_tokens = case.suppressed
    count_decoded(counts)
    for counted in (trainer.model, trainer.ref_model):
        count_model(counted.visual, counted.model, counts, case.P)
    keep_first_step(trainer, kept)
    trainer.model.generate = meter.generating(trainer.model.generate)
    answer("READY", **{name: version(name) for name in ("torch", "transformers", "trl")})
    trainer.train()


if __name__ == "__main__":
    main()
