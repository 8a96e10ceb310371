"""What the benchmarks share: models with random weights, prompts, interleaved timing, peak memory, tables and JSON."""
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub

import torch
import tyro
from memory import PeakMemory, clean_heap  # offered here too
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration)

from deepvideo_r1.core import Prompt, Rollout, Sample, make_generator
from deepvideo_r1.model.policy import PolicyModel

IMAGE, VIDEO, START, END, EOS, PAD, FIRST_WORD = 1, 2, 3, 4, 5, 0, 8

# hidden size, MLP width, layers, heads, key-value heads, vocabulary, tied; then the encoder: hidden, MLP width, blocks, heads.
# "3b" and "7b" are the shapes in config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct. "tiny" keeps the proportions
# of the 3B (MLP and vocabulary to hidden size, encoder to language model). "quick" is for tests.
SIZES = {"quick": ((48, 96, 2, 4, 2, 256, True), (48, 96, 2, 2)),
         "tiny": ((256, 1376, 4, 4, 1, 4096, True), (160, 432, 4, 4)),
         "3b": ((2048, 11008, 36, 16, 2, 151936, True), (1280, 3420, 32, 16)),
         "7b": ((3584, 18944, 28, 28, 4, 152064, False), (1280, 3420, 32, 16))}


@dataclass
class Options:
    "How a benchmark is run."
    quick: bool = False  # sizes for a test: takes seconds, and its figures mean nothing
    size: Literal["quick", "tiny", "3b", "7b"] = "tiny"  # size of the model
    family: Literal["qwen2_5_vl", "qwen2_vl"] = "qwen2_5_vl"  # family of the model
    device: str = "cpu"  # device: cpu or cuda
    dtype: Literal["float32", "bfloat16"] = "float32"  # number type of weights and activations
    attention: Literal["auto", "split", "flash", "flex"] = "auto"  # kernel of the packed rows; auto: the fastest on the device
    repeats: int = 3  # number of times that each side is timed; the sides take turns
    threads: int = 1  # number of CPU threads
    peak_tflops: float | None = None  # peak of the device in tera-FLOP/s at this dtype; with it the table shows the share that is used
    out: Annotated[Path, tyro.conf.arg(help="folder of the JSON files")] = Path(__file__).parent / "results"

    def __post_init__(self):
        if self.quick:
            self.size, self.repeats = "quick", 1
        torch.set_num_threads(self.threads)


# --- models and prompts -----------------------------------------------------------------------------------------------

def text_settings(size: str) -> dict[str, Any]:
    "Keyword arguments of a Qwen2 configuration of this size."
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SIZES[size][0]
    return dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
                rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)


def vl_config(size: str, family: str = "qwen2_5_vl") -> Qwen2_5_VLConfig | Qwen2VLConfig:
    "The configuration of a Qwen-VL model of this size."
    text, (hidden, mlp, blocks, heads) = text_settings(size), SIZES[size][1]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # 16, 24, 24 at the real size
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
               tie_word_embeddings=text["tie_word_embeddings"])
    if family == "qwen2_vl":
        vision = dict(depth=blocks, embed_dim=hidden, hidden_size=text["hidden_size"], num_heads=heads, mlp_ratio=4)
        return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    full = list(range(blocks // 4 - 1, blocks, blocks // 4)) if blocks >= 4 else [blocks - 1]  # a quarter apart, the last too
    vision = dict(depth=blocks, hidden_size=hidden, intermediate_size=mlp, num_heads=heads, out_hidden_size=text["hidden_size"],
                  fullatt_block_indexes=full, window_size=112, tokens_per_second=2)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def random_weights(cls, config, options: Options, seed: int = 0) -> nn.Module:
    "A model in evaluation mode, with random weights large enough that its outputs differ from token to token."
    with torch.random.fork_rng(), torch.device(options.device):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=getattr(torch, options.dtype))
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.normal_(model.get_input_embeddings().weight, std=0.15)
        last = getattr(model.model, "language_model", model.model).norm.weight  # random signs: otherwise a tied head repeats its input
        with torch.no_grad():
            last.copy_(torch.randint_like(last, 2) * 2 - 1)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD)
    return model.to(options.device).eval()


def make_policy(options: Options) -> PolicyModel:
    "A policy with random weights and a frozen encoder; it never samples a placeholder."
    cls = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration}[options.family]
    hf = random_weights(cls, vl_config(options.size, options.family), options)
    return PolicyModel(hf, pad_ids=(VIDEO, IMAGE), banned_ids=(VIDEO, IMAGE), attention=options.attention).to(options.device)


def make_text_model(options: Options) -> Qwen2ForCausalLM:
    "A text-only Qwen2 with random weights."
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return random_weights(Qwen2ForCausalLM, Qwen2Config(**text_settings(options.size), rope_parameters=rope), options)


def use_attention(policy: PolicyModel, packed: bool) -> None:
    "Our attention, or the default of transformers: both sides run on the same weights."
    policy.base.set_attn_implementation({"text_config": "shared_prefix" if packed else "sdpa", "vision_config": "sdpa"})


def random_ids(policy: PolicyModel, *shape: int, seed: int) -> Tensor:
    "Ids of words."
    rows = policy.get_input_embeddings().weight.shape[0]
    return torch.randint(FIRST_WORD, rows, shape, generator=make_generator("ids", seed))


def make_prompt(policy: PolicyModel, length: int, *, side: int = 9, words: int = 64) -> Prompt:
    """A prompt of `length` tokens about a video, with frames of side x side tokens (9: 252 x 252 pixels) and at least `words` words.

    Two frames are one step in time, so 712 tokens hold 16 frames and 1400 hold 32. The steps lie so close in time that all
    engines place the words after the video at the same position.
    """
    config = policy.base.config.vision_config
    steps = (length - words) // side**2
    if steps < 1:
        return Prompt(random_ids(policy, length, seed=0))
    merge = config.spatial_merge_size
    grid = torch.tensor([[steps, side * merge, side * merge]])
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = torch.randn(int(grid.prod()), width, generator=make_generator("patches"))
    n_words = length - steps * side**2
    ids = random_ids(policy, n_words, seed=0)
    ids[2], ids[3] = START, END
    ids = torch.cat([ids[:3], torch.full((steps * side**2,), VIDEO), ids[3:]])
    return Prompt(ids, patches, grid, ("video",), ((side - 1) / max(steps - 1, side - 1) / 2,))


def make_rollout(policy: PolicyModel, prompt: Prompt, group_size: int, n_tokens: int) -> Rollout:
    "G random responses of C tokens each."
    ids = random_ids(policy, group_size, n_tokens, seed=1)
    return Rollout(Sample(id="s", question="q", answer="a"), prompt, ids, torch.ones_like(ids, dtype=torch.bool),
                   torch.zeros(ids.shape))


# --- measuring --------------------------------------------------------------------------------------------------------

def synchronize(options: Options) -> None:
    "Waits for the device."
    if options.device != "cpu":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], options: Options) -> dict[str, float]:
    "CPU seconds of this process and seconds on the wall; on a GPU the latter count."
    gc.collect()
    synchronize(options)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    synchronize(options)
    return dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def interleaved(sides: dict[str, Callable[[], Any]], options: Options) -> dict[str, dict[str, float]]:
    "Median seconds of each side; the sides take turns (A B A B ...), so that other work on the machine slows all of them."
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            rows[name].append(timed(run, options))
    return {name: {f"{clock}_s": statistics.median(row[clock] for row in timings) for clock in ("cpu", "wall")}
            for name, timings in rows.items()}


def clock(options: Options) -> str:
    "The clock whose seconds the ratios compare."
    return "cpu_s" if options.device == "cpu" else "wall_s"


def time_sides(case: dict[str, Any], sides: dict[str, Callable[[], Any]], options: Options, *, peer: str, ours: str) -> None:
    "Times the sides of a case in turns, and adds the ratios of the peer's time to ours and of our memory to the peer's."
    rows, key = case["sides"], clock(options)
    for name, seconds in interleaved(sides, options).items():
        rows[name] |= seconds
    case["speedup"] = rows[peer][key] / rows[ours][key]
    if rows[ours]["peak_mib"]:
        case["memory_ratio"] = rows[ours]["peak_mib"] / rows[peer]["peak_mib"]


def peak_memory(run: Callable[[], Any], options: Options) -> float | None:
    "`PeakMemory` of one run."
    meter = PeakMemory(options).start()
    run()
    return meter.stop()


# --- results ----------------------------------------------------------------------------------------------------------

def _processor(options: Options) -> str:
    if options.device != "cpu":
        return torch.cuda.get_device_name()
    if sys.platform.startswith("linux"):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(": ")[2] if names else platform.machine()
    return platform.processor() or platform.machine()


def machine(options: Options) -> dict[str, Any]:
    "The machine and the versions that the figures depend on."
    names = {}
    for name in ("torch", "transformers", "trl"):
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            names[name] = None
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(date=date.today().isoformat(), processor=_processor(options), cores=os.cpu_count(), threads=options.threads,
                load_average=round(os.getloadavg()[0], 2), python=platform.python_version(), commit=done.stdout.strip() or None,
                **names)


def save(name: str, options: Options, cases: list[dict[str, Any]], **more: Any) -> Path:
    "Writes NAME.json: machine, options and one row for each case."
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
              if k not in ("out", "environments", "video_r1")}  # folders of this machine
    path.write_text(json.dumps(dict(name=name, machine=machine(options), options=chosen, cases=_rounded(cases), **more),
                               indent=1) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    "Prints a table."
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*("-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


# --- equality ---------------------------------------------------------------------------------------------------------

# float32 allows for rounding. In bfloat16, with 8 bits, no two ways of computing agree closely: the check finds gross errors.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.5, 0.2)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    "Copies of all gradients."
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    "Norm of the difference of all gradients over their norm."
    assert ours.keys() == theirs.keys() and ours, "the two sides do not train the same weights"
    total = sum(float(theirs[name].float().norm()) ** 2 for name in theirs)
    return (sum(float((ours[name].float() - theirs[name].float()).norm()) ** 2 for name in theirs) / total) ** 0.5


def check_equal(name: str, logps: tuple[Tensor, Tensor], grads: tuple[dict, dict] | None, options: Options) -> dict[str, float]:
    "Largest difference of log-probs and relative difference of gradients; raises `SystemExit` above the tolerance."
    differences = dict(logp_difference=float((logps[0].detach().float() - logps[1].detach().float()).abs().max()))
    if grads is not None:
        differences["gradient_difference"] = relative_difference(*grads)
    for (what, value), allowed in zip(differences.items(), TOLERANCE[options.dtype]):
        if not value <= allowed:
            raise SystemExit(f"{name}: {what} is {value:.3g}, allowed at {options.dtype} is {allowed:g}: nothing was timed")
    return differences
