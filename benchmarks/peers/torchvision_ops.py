"""The two operators of torchvision that its wheel for GPUs cannot load beside a torch for CPUs; nothing here calls them."""
import sys

import torch


def define_missing_ops() -> None:
    "Makes `import torchvision` possible where its compiled part does not load."
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        globals()["_kept"] = library  # it is undone where it is freed
