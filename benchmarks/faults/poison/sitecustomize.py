"""Makes numbers go wrong in a role's process, on order. On the path of the bench's nodes only; the product does not know of it.

An order is a file ORDERS/PROCESS (such as ORDERS/learner-0) that holds a word, and a path after it if the order is not to be
taken before there is a file at that path. It is taken by the first forward pass of that process that it fits, and is gone then:

    nan       the output of a module is NaN (where gradients are recorded, if the process records any)
    inf       the gradient at a module's output is infinite
    blow_up   the weights of a module are ten times what they were, for good
    hold      the process stands still, for good
"""

import logging
import os
import sys
import threading
import time

ORDERS = os.environ.get("RONDO_FAULT_ORDERS", "")


def _name() -> str:
    """Of the role's process: that of its log file."""
    paths = [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return os.path.basename(paths[0]).removesuffix(".log") if paths else ""


def _hook(module, inputs, output):  # type: ignore[no-untyped-def]
    import torch

    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return None
    place = os.path.join(ORDERS, _name())
    if not os.path.isfile(place):
        return None
    with open(place) as file:
        order, _, awaited = file.read().strip().partition(" ")
    if not order or (awaited and not os.path.isfile(awaited)):
        return None
    learns = _name().startswith(("learner", "reward"))
    if learns and not output.requires_grad:
        return None
    if order == "blow_up" and not hasattr(module, "weight"):
        return None
    os.rename(place, place + ".taken")
    while order == "hold":
        time.sleep(1.0)
    if order == "nan":
        return output * float("nan")
    if order == "inf":
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None
    with torch.no_grad():
        module.weight.mul_(10.0)
    return None


def _wait_for_torch() -> None:
    while True:
        module = sys.modules.get("torch.nn.modules.module")
        if module is not None and hasattr(sys.modules.get("torch"), "compile"):
            module.register_module_forward_hook(_hook)
            return
        time.sleep(0.05)


if ORDERS:
    threading.Thread(target=_wait_for_torch, daemon=True).start()
