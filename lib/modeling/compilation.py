"""`torch.compile` for the parts of a detector that are plain networks."""

from __future__ import annotations

import logging

from torch import nn

logger = logging.getLogger(__name__)

# Between them lie targets, NMS and sampling, which are no work for a compiler.
PARTS = ("Conv_Body", "Box_Head", "Box_Outs", "Mask_Head", "Mask_Outs", "Keypoint_Head",
         "Keypoint_Outs")  # fmt: skip


def compile_parts(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Let backbone and heads of a Generalized_RCNN be compiled when they are first called.

    Modules stay the same objects: names in state dicts do not change, and DistributedDataParallel
    can wrap the model afterwards. Images come in as many sizes as there are padding buckets
    (FPN.COARSEST_STRIDE): the second size that a part meets makes its graph one of dynamic sizes,
    so that each is compiled twice, not once for every bucket.
    """
    for name, child in model.named_children():
        if name in PARTS:
            child.compile(backend=backend, dynamic=None)
    logger.info(
        "backbone and heads are compiled (MODEL.COMPILE) when images of the first and of a second "
        "size come: such a step takes minutes, less in later runs, as torch keeps what it compiled"
    )
    return model
