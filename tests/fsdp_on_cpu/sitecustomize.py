"""FSDP2 on CPUs, for tests: put this folder on PYTHONPATH, and a sharded recipe runs without a GPU.

accelerate offers FSDP2 on GPUs only. It decides by a state of its own, which is changed here before anything else runs.
"""
import os
import sys

if "deepvideo_r1" in " ".join(sys.orig_argv) or "deepvideo-r1" in " ".join(sys.orig_argv):
    from deepvideo_r1.training import launch

    launch._lacks_gpu = lambda: False
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # one of several processes
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
