"""A whole training step on a video, sampling included: ms-swift and Video-R1's own trainer against ours.

One model with random weights, one clip, prompts and responses of the same lengths, GRPO with a KL to a frozen copy, one update,
AdamW. ms-swift and ours take turns in one process. Video-R1 needs other versions of transformers and TRL, so it has a process
of its own, and the two processes take turns. `make bench-peers` installs both in `.peers/`; what is missing there is left out.
"""
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from harness import Options, random_weights, save, show, vl_config
from peers.measuring import Case
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from deepvideo_r1.model.processor import SPECIAL_TOKENS, write_tiny_processor
from deepvideo_r1.toy.world import write_video

HERE = Path(__file__).resolve().parent
PEERS = {"ms_swift": "ms-swift", "video_r1": "Video-R1"}
COUNTED = ("files_decoded", "videos_encoded", "prompts_read")


@dataclass
class Settings(Options):
    "A training step on a video against ms-swift's and Video-R1's."
    prompt_lengths: tuple[int, ...] = (712, 1400)  # values of P; 712 tokens hold 16 frames of 252 x 252, 1400 hold 32
    lengths: tuple[int, ...] = (128, 512)  # values of C, tokens of each response
    prompts: tuple[int, ...] = (1, 4)  # values of B, prompts of a step; Video-R1 takes one
    group_size: int = 8  # G
    every: bool = False  # all combinations; without it the first case, and those that differ from it in one value
    peers: tuple[Literal["ms_swift", "video_r1"], ...] = ("ms_swift", "video_r1")  # those to compare with, if they are there
    environments: Path = HERE.parent / ".peers"  # folder that `make bench-peers` makes
    video_r1: Annotated[Path | None, tyro.conf.arg(help="clone of Video-R1; by default $VIDEO_R1, else the folder Video-R1 in "
                                                        "`environments`")] = None
    keep: bool = False  # keep the other cases of the JSON file
    side: int = 9  # tokens along a side of a frame

    def __post_init__(self):
        super().__post_init__()
        self.environments = self.environments.absolute()
        self.video_r1 = Path(self.video_r1 or os.environ.get("VIDEO_R1") or self.environments / "Video-R1").absolute()
        if self.quick:
            self.prompt_lengths, self.lengths, self.prompts, self.group_size, self.side = (128,), (6,), (1, 2), 4, 2
        if self.family != "qwen2_5_vl" or self.device != "cpu" or self.dtype != "float32":
            raise SystemExit("this benchmark runs a qwen2_5_vl on the CPU in float32")

    def cases(self) -> list[tuple[int, int, int]]:
        "(P, C, B) of each case."
        first = self.prompt_lengths[0], self.lengths[0], self.prompts[0]
        combinations = [(p, c, b) for p in self.prompt_lengths for c in self.lengths for b in self.prompts]
        return [case for case in combinations if self.every or sum(x != y for x, y in zip(case, first)) < 2]


# --- what all sides read ----------------------------------------------------------------------------------------------

def make_inputs(folder: Path, settings: Settings, length: int, n_tokens: int, prompts: int) -> Case:
    "Writes the model, a clip and `case.json` into the folder."
    frames = 2 * ((length - 64) // settings.side**2)  # two frames are one step in time; at least 64 tokens are words
    if settings.quick:
        frames = 4
    texts = ["what colour is the ball ?", "You are a helpful assistant.", "system user assistant"] * 3
    pixels = (28 * settings.side)**2
    tokenizer = write_tiny_processor(folder / "model", texts, vocab_size=640, max_pixels=pixels)
    ids = tokenizer.get_vocab()

    # a model whose ids are those of the tokenizer
    config = vl_config(settings.size)
    text = config.text_config
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    text.eos_token_id, text.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2):
        setattr(config, f"{name}_token_id", ids[f"<|{token}|>"])
    model = random_weights(Qwen2_5_VLForConditionalGeneration, config, settings)
    suppressed = sorted({ids[token] for token in SPECIAL_TOKENS} | set(range(len(tokenizer), text.vocab_size)))
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
                                               suppress_tokens=suppressed)
    model.save_pretrained(folder / "model")
    write_settings(folder / "model", pixels)

    # a clip of four frames a second, of which every second one is read
    cells = torch.randint(0, 255, (2 * settings.side, 2 * settings.side, 3), generator=torch.Generator().manual_seed(0))
    clip = torch.stack([cells.roll(t, 0) for t in range(2 * frames)]).to(torch.uint8)
    write_video(folder / "clip.mp4", clip.numpy(), fps=4, enlarge=14)
    case = Case(P=length, C=n_tokens, G=settings.group_size, B=prompts, frames=frames, side=settings.side,
                rounds=settings.repeats, threads=settings.threads, suppressed=suppressed,
                pad_ids={name: ids[f"<|{name}_pad|>"] for name in ("image", "video")})
    case.write(folder)
    return case


def write_settings(folder: Path, pixels: int) -> None:
    "The preprocessor's files as transformers and ms-swift read them."
    image = json.loads((folder / "preprocessor_config.json").read_text())
    image["size"] = {"shortest_edge": image["min_pixels"], "longest_edge": pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    video = {name: value for name, value in image.items() if name not in ("image_processor_type", "min_pixels", "max_pixels")}
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "size": {**image["size"], "longest_edge": 64 * pixels}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


# --- the sides --------------------------------------------------------------------------------------------------------

def missing(peer: str, settings: Settings) -> str | None:
    "Why a peer cannot be run; None where it can."
    wanted = [python_of(peer, settings), environment_of(peer, settings) / ".installed"]  # a stamp of the Makefile
    if peer == "video_r1":
        wanted.append(settings.video_r1 / "src/r1-v/src/open_r1/trainer/grpo_trainer.py")
    for path in wanted:
        if not path.exists():
            return f"{path} is missing: make bench-peers installs it"
    return None


def environment_of(peer: str, settings: Settings) -> Path:
    return settings.environments / PEERS[peer].lower()


def python_of(peer: str, settings: Settings) -> Path:
    return environment_of(peer, settings) / "bin/python"


def command(peer: str, folder: Path, settings: Settings, *more: str) -> dict[str, Any]:
    "Arguments of `subprocess` that start a peer's program."
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": str(settings.threads),
                                "PYTHONWARNINGS": "ignore"}
    return dict(args=[str(python_of(peer, settings)), "-m", f"peers.{peer}", str(folder), *more], env=environment, cwd=folder)


def beside_ms_swift(folder: Path, settings: Settings) -> dict[str, Any]:
    "What its process has measured, ours included."
    log = folder / "ms_swift.log"
    with log.open("w") as file:
        done = subprocess.run(**command("ms_swift", folder, settings), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"ms-swift's process ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return json.loads((folder / "ms_swift.json").read_text())


@contextmanager
def video_r1_process(folder: Path, settings: Settings) -> Iterator[Any]:
    "A function that lets Video-R1 do a step and returns what it has measured so far."
    log = folder / "video_r1.log"
    with log.open("w") as file:
        process = subprocess.Popen(**command("video_r1", folder, settings, str(settings.video_r1)), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=file, text=True)

        def read(word: str) -> dict[str, Any]:
            line = process.stdout.readline()
            if not line.startswith(word):
                process.wait()
                raise SystemExit(f"Video-R1's process ended with {process.returncode}:\n{log.read_text()[-3000:]}")
            return json.loads(line[len(word):])

        def step() -> dict[str, Any]:
            process.stdin.write("step\n")
            process.stdin.flush()
            return read("STEP")

        try:
            step.versions = read("READY")
            yield step
        finally:
            process.stdin.close()
            process.kill()
            process.wait()


def beside_video_r1(folder: Path, case: Case, settings: Settings) -> dict[str, Any]:
    "The two processes take turns; ours is this one."
    from peers.our_side import OurSide

    case.top_p = 0.95
    case.write(folder)
    versions = {name: version(name) for name in ("torch", "transformers")}
    with OurSide(case, folder) as ours, video_r1_process(folder, settings) as step:
        for turn in range(case.rounds + 2):
            theirs = step()
            if turn == 0:
                found = ours.check("Video-R1", **torch.load(folder / "video_r1.pt"))
                (folder / "video_r1.pt").unlink()
            ours.step()
    return dict(sides={"video_r1": theirs, "ours": ours.meter.result}, check=found,
                versions={"video_r1": step.versions, "ours": versions})


def ours_alone(folder: Path, case: Case) -> dict[str, Any]:
    "Our side, where there is no peer."
    from peers.our_side import OurSide

    with OurSide(case, folder) as ours:
        for _ in range(case.rounds + 2):
            ours.step()
    return dict(sides={"ours": ours.meter.result}, check={}, versions={})


# --- figures ----------------------------------------------------------------------------------------------------------

def summary(found: dict[str, Any], peer: str | None, case: Case) -> dict[str, Any]:
    "A row of the JSON file: medians, ratios of each round, and what was counted in a step."
    row = dict(peer=peer, P=case.P, C=case.C, G=case.G, B=case.B, rounds=case.rounds, sides={}, **found["check"],
               versions=found["versions"], load_average=os.getloadavg()[0])
    for name, side in found["sides"].items():
        row["sides"][name] = {clock: statistics.median(side[clock]) for clock in ("cpu_s", "wall_s", "generation_s")}
        row["sides"][name] |= {"cpu_s_each": side["cpu_s"], "peak_mib": side.get("peak_mib")}
        row["sides"][name] |= {what: side["counts"].get(what, 0) for what in COUNTED}
    for name, ratio in ((peer, "speedup"), (f"{peer}_lean", "speedup_over_lean")):
        if name in row["sides"]:
            pairs = list(zip(found["sides"][name]["cpu_s"], found["sides"]["ours"]["cpu_s"], strict=True))
            row[ratio] = row["sides"][name]["cpu_s"] / row["sides"]["ours"]["cpu_s"]
            row[f"{ratio}_each"] = [theirs / ours for theirs, ours in pairs]
    if peer and row["sides"][peer]["peak_mib"]:
        row["memory_ratio"] = row["sides"]["ours"]["peak_mib"] / row["sides"][peer]["peak_mib"]
    return row


def earlier_rows(settings: Settings, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "The cases of the JSON file that were not measured again."
    path = settings.out / "video_step_vs_peers.json"
    if not settings.keep or not path.exists():
        return []
    key = lambda row: tuple(row[name] for name in ("peer", "P", "C", "G", "B"))
    return [row for row in json.loads(path.read_text())["cases"] if key(row) not in {key(new) for new in rows}]


def main(settings: Settings) -> None:
    warnings.filterwarnings("ignore")
    started, rows = time.perf_counter(), []
    left_out = {peer: why for peer in settings.peers if (why := missing(peer, settings))}
    for peer, why in left_out.items():
        print(f"{PEERS[peer]} is left out: {why}", flush=True)
    peers = [peer for peer in settings.peers if peer not in left_out]
    path = None
    for length, n_tokens, prompts in settings.cases():
        for peer in [peer for peer in peers if peer == "ms_swift" or prompts == 1] if peers else [None]:
            folder = Path(tempfile.mkdtemp())
            try:
                case = make_inputs(folder, settings, length, n_tokens, prompts)
                found = (beside_ms_swift(folder, settings) if peer == "ms_swift" else
                         beside_video_r1(folder, case, settings) if peer == "video_r1" else ours_alone(folder, case))
            finally:
                shutil.rmtree(folder)
            rows.append(summary(found, peer, case))
            path = save("video_step_vs_peers", settings, earlier_rows(settings, rows) + rows, left_out=left_out)
            print(f"P={length} C={n_tokens} B={prompts} {peer or 'ours alone'}: {rows[-1].get('speedup', 1):.2f}x", flush=True)
    table = [[row["P"], row["C"], row["B"], name, side["cpu_s"], side["generation_s"], side["wall_s"],
              side["cpu_s"] / row["sides"]["ours"]["cpu_s"], side["peak_mib"], *(side[what] for what in COUNTED),
              row.get("logp_difference"), row.get("gradient_difference")] for row in rows for name, side in row["sides"].items()]
    show("A training step on a video", ["P", "C", "prompts", "side", "CPU s", "of it sampling", "wall s", "of ours", "peak MiB",
                                        "clips decoded", "videos encoded", "prompts read", "logp diff", "gradient diff"], table)
    print(path, f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
