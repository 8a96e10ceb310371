"""Which passes of a TRL training step read the video of the prompt: sampling, the reference, and the pass with the gradient.

TRL 1.16 takes `{"type": "video", "video": path}` in a prompt without a word. It samples with the video, and both passes of its
update get the placeholders without pixels. `make bench-peers` installs what this needs and runs it. Where a TRL passes the video
on, `update_reads_the_video` becomes true.
"""
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import tyro
from peers.torchvision_ops import define_missing_ops

define_missing_ops()
from datasets import Dataset
from harness import save, show
from peers.measuring import KL, reward
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.video_processing_utils import VideoProcessorMixin, load_video
from trl import GRPOConfig, GRPOTrainer
from video_step_vs_peers import Settings, make_inputs


def decode_with_av(self: VideoProcessorMixin, files: Any, sample_indices_fn: Any = None) -> Any:
    "What `fetch_videos` does, with another of transformers' own decoders than torchcodec, which needs FFmpeg on the system."
    if isinstance(files, list):
        return list(zip(*[self.fetch_videos(file, sample_indices_fn) for file in files]))
    return load_video(files, backend="pyav", sample_indices_fn=sample_indices_fn)


def listen(trainer: GRPOTrainer, passes: list[dict[str, Any]]) -> None:
    "Notes every pass that reads more than a token: what it gets, and how often the encoder runs in it or for it."
    state = dict(early=0, running=None)  # runs of the encoder before a pass, which generate makes for it; the pass now running

    def begins(who: str):
        def hook(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None and ids.shape[1] > 1:
                purpose = "reference" if who == "reference" else "loss" if torch.is_grad_enabled() else "sampling"
                state["running"] = dict(purpose=purpose, rows=len(ids), tokens=ids.shape[1],
                                        placeholders=int((ids == trainer.model.config.video_token_id).sum()),
                                        encoder_runs=state["early"])
                state["early"] = 0
                passes.append(state["running"])
        return hook

    def ends(*args):
        state["running"] = None

    def encodes(*args):
        if state["running"] is None:
            state["early"] += 1
        else:
            state["running"]["encoder_runs"] += 1

    for who, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.model.register_forward_pre_hook(begins(who), with_kwargs=True)
        model.model.register_forward_hook(ends)
        model.model.visual.register_forward_pre_hook(encodes)


def train(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    "One step of TRL's trainer on a question about the clip; returns its passes."
    case = make_inputs(folder, settings, *settings.cases()[0])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder / "model", padding_side="left")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    VideoProcessorMixin.fetch_videos = decode_with_av
    processor.video_processor.do_sample_frames, processor.video_processor.fps = True, 2.0
    content = [{"type": "video", "video": str(folder / "clip.mp4")}, {"type": "text", "text": "what colour is the ball ?"}]
    config = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=case.G, num_generations=case.G, max_steps=1,
        max_completion_length=case.C, beta=KL, learning_rate=1e-5, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, generation_kwargs={"suppress_tokens": case.suppressed})
    passes: list[dict[str, Any]] = []
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completion_ids, **columns: [reward("x" * sum(ids)) for ids in completion_ids], args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": content}]}] * 8), processing_class=processor)
    listen(trainer, passes)
    trainer.train()
    assert {row["purpose"] for row in passes} == {"sampling", "reference", "loss"}, f"unexpected passes: {passes}"
    return passes


def main(settings: Settings) -> None:
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        passes = train(Path(folder), settings)
    reads = lambda *purposes: all(row["encoder_runs"] > 0 for row in passes if row["purpose"] in purposes)
    columns = list(passes[0])
    show("A step of TRL on a prompt with a video", columns, [[row[name] for name in columns] for row in passes])
    path = save("trl_with_video", settings, passes, sampling_reads_the_video=reads("sampling"),
                update_reads_the_video=reads("reference", "loss"))
    print(f"sampling reads the video: {reads('sampling')}; the update reads it: {reads('reference', 'loss')}\n{path}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
