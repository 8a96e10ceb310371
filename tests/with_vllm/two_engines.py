"""Two processes, each with a policy and a vLLM; writes what each has seen.

    torchrun --standalone --nproc_per_node 2 two_engines.py MODEL WORLD OUT ddp|sharded
"""
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `two_processes`

from accelerate import Accelerator  # noqa: E402
from bench import SMALL, Bench, make_prompts, shake  # noqa: E402
from two_processes import sharding_accelerator  # noqa: E402

from deepvideo_r1.config import EngineConfig, ObjectiveConfig  # noqa: E402
from deepvideo_r1.model.policy import load_policy  # noqa: E402
from deepvideo_r1.model.prompt import load_processor  # noqa: E402
from deepvideo_r1.model.vllm_engine import start_vllm  # noqa: E402
from deepvideo_r1.training.update import make_learner  # noqa: E402


def main(model: Path, world: Path, out: Path, arrangement: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    accelerator = sharding_accelerator() if arrangement == "sharded" else Accelerator(cpu=True)
    rank, policy, processor = accelerator.process_index, load_policy(model), load_processor(model)
    samples, prompts = make_prompts(world, processor)
    learner = make_learner(policy, accelerator, ObjectiveConfig("rloo", kl_coef=0.0))
    engine = start_vllm(model, learner.policy, EngineConfig(name="vllm", eager=True), rank=rank, **SMALL)
    bench, found = Bench(model, learner.policy, processor, samples, prompts, engine), {}

    # each process asks every second question; the weights change alike
    mine = dict(chosen=slice(rank, None, 2))
    for moment in ("before", "after"):
        with learner.sampling():
            texts, gap = [group.texts for group in bench.sample(**mine)], bench.gap(**mine)
        found[moment] = {"texts": texts, "gap": (gap.mean, gap.largest)}
        if moment == "before":
            shake(learner.policy, "layers.0.mlp")
            with learner.sampling():
                found["stale"] = bench.gap(**mine).mean
            engine.load_weights(learner.policy)
    found["units"] = sum("FSDP" in type(module).__name__ for module in learner.policy.modules())
    found["processes"] = accelerator.num_processes
    torch.save(found, out / f"{arrangement}-{rank}.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
