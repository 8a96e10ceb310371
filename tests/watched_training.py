"""Trains with held-out questions in two processes: with whole weights, with sharded ones, and stopped in an evaluation.

    torchrun --standalone --nproc_per_node 2 tests/watched_training.py MODEL WORLD OUT
"""
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from test_training_runs import make_config
from two_processes import sharding_accelerator

import deepvideo_r1.training.held_out as held_out_module
from deepvideo_r1.experiment import run_training
from deepvideo_r1.support.interrupts import Stopped


def stop_one_process(rank: int, run) -> int:
    "Signals the second process alone, within the second evaluation; returns the number of the signal that ended the run here."
    plain, calls = held_out_module.evaluate, []

    def signalled(*args, **settings):
        calls.append(1)
        act = lambda done, total: os.kill(os.getpid(), signal.SIGTERM) if (len(calls), rank, done) == (2, 1, 1) else None
        return plain(*args, **settings | {"batch_prompts": 1, "on_progress": act})

    held_out_module.evaluate = signalled
    try:
        run()
    except Stopped as stopped:
        return stopped.number
    finally:
        held_out_module.evaluate = plain
    return 0


def main(model: Path, world: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    run = lambda name: run_training(make_config(model, world, out / name), accelerator=accelerator)
    assert accelerator.num_processes == 2 and not accelerator.is_fsdp2
    run("ddp")
    assert stop_one_process(accelerator.process_index, lambda: run("stopped")) == signal.SIGTERM  # in both processes
    run("stopped")
    accelerator = sharding_accelerator()
    assert accelerator.num_processes == 2 and accelerator.is_fsdp2
    run("sharded")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
