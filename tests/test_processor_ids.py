"""Prompts of real clips, beside those of transformers' own processors: token ids, pixels and grids, for every family."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from deepvideo_r1.core import Sample
from deepvideo_r1.data.video import read_video
from deepvideo_r1.model.families import FAMILIES
from deepvideo_r1.model.policy import load_policy, save_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.tiny import make_tiny_checkpoint
from deepvideo_r1.toy.world import world_texts

ROOT = Path(__file__).resolve().parents[1]
PLACES = [ROOT / ".torchvision", *map(Path, sys.path)]
CLIPS = {"video_0.mov": {}, "nasa_13013.mp4": {"max_frames": 7}, "h264_10bits.mp4": {"max_frames": 5, "fps": 3.0},
         "flipping_a_pancake.mkv": {"fps": 1.0}}
WORDS = "what happens in the video ?"


@pytest.fixture(scope="module")
def torchvision() -> str:
    place = next((place for place in PLACES if (place / "torchvision" / "__init__.py").exists()), None)
    if place is None or not importlib.util.find_spec("torch"):
        pytest.skip("needs torchvision's Python part, without its torch: "
                    "pip install --no-deps --target .torchvision torchvision==0.28.0")
    return str(place)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    "A tiny checkpoint of each family, saved by `save_policy`."
    torch.set_num_threads(1)
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        sizes = dict(patch_size=16, max_pixels=96 * 96) if FAMILIES[family].is_stepwise else dict(max_pixels=84 * 84)
        tiny = make_tiny_checkpoint(folder / "tiny", texts=[*world_texts(), WORDS], hidden_size=48, n_layers=2, family=family,
                                    **sizes)
        save_policy(load_policy(tiny), load_processor(tiny), folder / "saved")
        made[family] = folder / "saved"
    return made


@pytest.fixture(scope="module")
def answers(torchvision, models, shared_dir, tmp_path_factory) -> dict[tuple[str, str], tuple]:
    "Our prompt and what transformers makes of the same frames, for every family and clip."
    questions, ours = [], {}
    for family, model in models.items():
        processor = load_processor(model)
        size = dict(factor=processor.factor, max_pixels=processor.max_pixels)
        for name, settings in CLIPS.items():
            clip = read_video(shared_dir / "videos" / name, **size, **settings)
            still = read_video(shared_dir / "videos" / "video_0.mov", max_frames=1, **size)
            with av.open(str(shared_dir / "videos" / name)) as container:
                fps = float(container.streams.video[0].average_rate)
            start = float(clip.timestamps[0])
            indices = [round((seconds - start) * fps) + round(start * fps) for seconds in clip.timestamps.tolist()]
            sample = Sample(id=name, question=WORDS, answer="x", kind="text")
            ours[family, name] = build_prompt(sample, [("video", clip), ("image", still)], processor, template="plain")
            questions.append({"model": str(model), "words": WORDS, "images": [still.frames[0]],
                              "videos": [{"frames": clip.frames, "fps": fps, "indices": indices}]})
    folder = tmp_path_factory.mktemp("answers")
    torch.save(questions, folder / "questions.pt")
    done = subprocess.run([sys.executable, ROOT / "tests" / "transformers_processor.py", torchvision, folder / "questions.pt",
                           folder / "answers.pt"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(folder / "answers.pt", weights_only=True)
    return {key: (prompt, found) for (key, prompt), found in zip(ours.items(), theirs, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLIPS)
def test_prompts_are_those_of_transformers(answers, models, family, name):
    prompt, found = answers[family, name]
    tokenizer = load_processor(models[family]).tokenizer
    assert tokenizer.decode(prompt.prompt_ids) == tokenizer.decode(found["input_ids"][0])
    assert torch.equal(prompt.prompt_ids, found["input_ids"][0])
    assert torch.equal(prompt.grid_thw, torch.cat([found["video_grid_thw"], found["image_grid_thw"]]))
    patches = torch.cat([found["pixel_values_videos"], found["pixel_values"]])
    torch.testing.assert_close(prompt.patches, patches, atol=1e-6, rtol=0)
    assert len(prompt.prompt_ids) > 30 and patches.std() > 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_files_give_the_classes_of_the_family(answers, family):
    processor, image, video = answers[family, next(iter(CLIPS))][1]["classes"]
    assert processor == FAMILIES[family].processor and image.startswith("Qwen2VLImageProcessor")
    assert video == (FAMILIES[family].video_processor or "Qwen2VLVideoProcessor")
