"""What transformers' own processor makes of prompts, in a process of its own: python transformers_processor.py TORCHVISION QUESTIONS OUT

Its processors need torchvision, whose wheels do not fit a torch for CPUs; the hook of `with_vllm` makes its Python part import.
"""
import sys
from pathlib import Path

torchvision, questions, out = sys.argv[1:]
sys.path[:0] = [str(Path(__file__).parent / "with_vllm"), torchvision]
import torch  # noqa: E402
import torchvision_ops  # noqa: E402, F401
from transformers import AutoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

answers = []
for question in torch.load(questions, weights_only=True):
    processor = AutoProcessor.from_pretrained(question["model"])
    inputs = {}
    if videos := question["videos"]:
        inputs["videos"] = [video["frames"] for video in videos]
        inputs["video_metadata"] = [VideoMetadata(total_num_frames=max(video["indices"]) + 1, fps=video["fps"],
                                                  frames_indices=video["indices"]) for video in videos]
        inputs["do_sample_frames"] = False
    if question["images"]:
        inputs["images"] = question["images"]
    content = [{"type": "video"} for _ in videos] + [{"type": "image"} for _ in question["images"]]
    text = processor.apply_chat_template([{"role": "user", "content": [*content, {"type": "text", "text": question["words"]}]}],
                                         tokenize=False, add_generation_prompt=True)
    found = processor(text=[text], do_resize=False, return_tensors="pt", **inputs)
    answers.append({name: found[name] for name in ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos",
                                                   "video_grid_thw") if name in found}
                   | {"classes": [type(part).__name__ for part in (processor, processor.image_processor, processor.video_processor)]})
torch.save(answers, out)
