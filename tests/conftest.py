"""What all tests share: no network, and reasons to skip."""
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A test that asks the hub for a file fails at once, in subprocesses too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    "The folder of sample videos and data sets that may lie beside the repository."
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the sample files in ../shared")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    "A random tiny Qwen2.5-VL checkpoint in Hugging Face layout."
    import torch
    from transformers.utils.logging import disable_progress_bar

    from deepvideo_r1.model.tiny import make_tiny_checkpoint
    from deepvideo_r1.toy.world import world_texts

    torch.set_num_threads(1)
    disable_progress_bar()
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", texts=world_texts(), hidden_size=48, n_layers=2)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    "A folder with a few videos and the questions about them: 9 for sft, 12 for rl, 4 for each level."
    from deepvideo_r1.toy.world import WorldConfig, make_world

    return make_world(tmp_path_factory.mktemp("world"), WorldConfig(sft_videos=3, rl_videos=6, eval_videos=2))


@pytest.fixture(scope="session")
def trained_model(tiny_model, tiny_world, tmp_path_factory) -> Path:
    "The tiny checkpoint after a second of fine-tuning: about half of its responses have the right form."
    import torch

    from deepvideo_r1.config import PromptConfig
    from deepvideo_r1.model.policy import load_policy, save_policy
    from deepvideo_r1.model.prompt import load_processor
    from deepvideo_r1.toy.cold_start import load_examples, sft_loss

    policy, processor = load_policy(tiny_model), load_processor(tiny_model)
    examples = load_examples(tiny_world / "sft.jsonl", processor, PromptConfig("plain"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(24):
        optimizer.zero_grad()
        sft_loss(policy, examples, torch.arange(len(examples.prompts)), 1.0).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    directory = tmp_path_factory.mktemp("model") / "trained"
    save_policy(policy, processor, directory)
    return directory


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    "The ids of the questions that an evaluation built a prompt for."
    import deepvideo_r1.evaluation.evaluate as evaluate_module

    build, ids = evaluate_module.prompt_for, []

    def noted(policy, processor, sample, *visuals, **settings):
        ids.append(sample.id)
        return build(policy, processor, sample, *visuals, **settings)

    monkeypatch.setattr(evaluate_module, "prompt_for", noted)
    return ids


@pytest.fixture(scope="session")
def site(built_site) -> Path:
    "The built site; a test file may look at another one."
    return built_site


@pytest.fixture(scope="session")
def built_site(tmp_path_factory) -> Path:
    "The built site, beside the `pages` that Sphinx made it from; the workers of one session share it."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    folder.mkdir(exist_ok=True)
    sphinx = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "docs", folder / "pages", folder / "site"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for command in (["docs/build.py", folder / "pages"], sphinx):
                done = subprocess.run([sys.executable, *command], cwd=Path(__file__).resolve().parents[1], capture_output=True,
                                      text=True, timeout=600)
                assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    return folder / "site"
