"""FSDP2 on CPUs, for tests: put this folder on PYTHONPATH, and a sharded recipe runs without a GPU.

accelerate offers FSDP2 on GPUs only. It decides by a state of its own, which is changed here before anything else runs.
"""
import os
import sys

if any(word == "deepvideo_r1" or word.endswith("deepvideo-r1") for word in sys.orig_argv):  # not what it starts itself
    from deepvideo_r1.training import launch

    launch._lacks_gpu = lambda: False
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # one of several processes
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
