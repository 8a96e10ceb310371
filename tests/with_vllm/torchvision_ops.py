"""Lets torchvision be imported beside torch for CPUs, whose wheels do not fit together: two compiled operators are only declared.

vLLM looks at models in processes of its own, so that this lies in the environment's site-packages, with a .pth file that imports it.
"""
import sys


class Declares:
    "Declares the operators when torchvision is first looked for, and finds nothing itself."

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # lives as long as this object
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].declared = self


sys.meta_path.insert(0, Declares())
