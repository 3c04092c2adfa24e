"""Optimizers with Detectron's parameter groups, and checkpoints of model and training.

A checkpoint is a dict with `step, train_size, batch_size, model, optimizer`, as those of
Detectron.pytorch, which load here too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from utils.load_report import LoadReport, first_names
from utils.weights import SAFETENSORS, read_safetensors, read_torch_file, save_torch_file

logger = logging.getLogger(__name__)

# Below this Detectron takes a learning rate for zero.
_TINY_LR = 1e-7


def param_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trained parameters as `weights`, `biases` and `gn_weights`, in model order.

    The biases of group normalisation are biases; frozen parameters are in no group.
    """
    gn_weights = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    groups: dict[str, list[str]] = {"weights": [], "biases": [], "gn_weights": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("bias"):
            groups["biases"].append(name)
        elif name in gn_weights:
            groups["gn_weights"].append(name)
        else:
            groups["weights"].append(name)
    return groups


def build_optimizer(model: nn.Module, solver: Any, iter_size: int = 1) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over `param_groups`, in that order, fused where torch can.

    Args:
        solver: a config's SOLVER group.
        iter_size: passes whose gradients are summed into a step. The weight decay that is added to
            the gradient counts as often, as in one pass over all the images.
    Raises:
        UserError: SOLVER.TYPE is unknown, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    passes = 1 if solver.TYPE == "AdamW" else iter_size
    bias_decay = solver.WEIGHT_DECAY if solver.BIAS_WEIGHT_DECAY else 0.0
    bias_lr_scale = 2.0 if solver.BIAS_DOUBLE_LR else 1.0
    settings = {
        "weights": (1.0, solver.WEIGHT_DECAY),
        "biases": (bias_lr_scale, bias_decay),
        "gn_weights": (1.0, solver.WEIGHT_DECAY_GN),
    }
    names = param_groups(model)
    if not any(names.values()):
        raise UserError("every parameter is frozen (TRAIN.FREEZE_CONV_BODY, RESNETS.FREEZE_AT)")
    groups = [
        {
            "params": [parameters[name] for name in names[group]],
            "lr": solver.BASE_LR * lr_scale,
            "lr_scale": lr_scale,
            "weight_decay": decay * passes,
        }
        for group, (lr_scale, decay) in settings.items()
    ]
    trained = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in trained)
    if solver.TYPE == "SGD":
        optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, fused=fused)
        # Zeros equal a first step without buffers. Fused SGD would make the buffers without
        # filling them, and leaves them so when fp16's loss scaling skips that step.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if solver.TYPE == "Adam":
        return torch.optim.Adam(groups, fused=fused)
    if solver.TYPE == "AdamW":
        return torch.optim.AdamW(groups, fused=fused)
    raise UserError(f"SOLVER.TYPE (or --o) must be SGD, Adam or AdamW, not {solver.TYPE!r}")


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Rate of the first group (weights), as last set."""
    return optimizer.param_groups[0]["lr"]


def update_learning_rate(
    optimizer: torch.optim.Optimizer,
    cur_lr: float,
    new_lr: float,
    *,
    scale_momentum: bool = True,
    threshold: float = 1.1,
    twice: bool = False,
) -> None:
    """Set the rate of every group (`lr_scale` times `new_lr`) and treat momentum as Detectron.

    Detectron's velocity contains the rate; torch's does not, so it follows every change by itself.
    Detectron lets it follow only jumps (`scale_momentum`, a change by more than `threshold`):
    for any other change torch's buffer is multiplied by cur_lr / new_lr.

    Args:
        cur_lr: the rate of the last step that was taken.
        twice: at a jump multiply the buffer by new_lr / cur_lr on top, as Detectron.pytorch did.
    """
    for group in optimizer.param_groups:
        group["lr"] = new_lr * group.get("lr_scale", 1.0)
    if new_lr == cur_lr or new_lr == 0 or cur_lr == 0:
        return
    jump = max(new_lr / cur_lr, cur_lr / new_lr) > threshold
    if scale_momentum and jump and cur_lr > _TINY_LR:
        if twice:
            _scale_momentum(optimizer, new_lr / cur_lr)
    else:
        _scale_momentum(optimizer, cur_lr / new_lr)


def _scale_momentum(optimizer: torch.optim.Optimizer, factor: float) -> None:
    states = optimizer.state.values()
    buffers = [b for s in states if (b := s.get("momentum_buffer")) is not None]
    if buffers:
        torch._foreach_mul_(buffers, factor)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load momentum and the last learning rate of a checkpoint; the other settings stay.

    Raises:
        UserError: it is the state of another kind of optimizer or of other parameters.
    """
    mine = optimizer.state_dict()
    saved = state.get("param_groups", [])
    sizes = [len(group["params"]) for group in mine["param_groups"]]
    # The seed leaves out nothing, but a group without parameters may be missing elsewhere.
    saved_sizes = [len(group["params"]) for group in saved]
    if [n for n in sizes if n] != [n for n in saved_sizes if n]:
        raise UserError(
            f"the checkpoint's optimizer trained {sum(saved_sizes)} parameters, this model has "
            f"{sum(sizes)} to train: resume with the config it was made with, or leave out --resume"
        )
    keys = {"SGD": {"momentum_buffer"}}.get(type(optimizer).__name__, {"exp_avg", "exp_avg_sq"})
    found = {key for entry in state["state"].values() for key in entry}
    if state["state"] and not keys <= found:
        raise UserError(
            f"the checkpoint's optimizer is not {type(optimizer).__name__}: set SOLVER.TYPE (--o) "
            "as it was, or leave out --resume"
        )
    order = [index for group in saved for index in group["params"]]
    entries = {new: state["state"][old] for new, old in enumerate(order) if old in state["state"]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for new, entry in entries.items():
        shapes = {tuple(v.shape) for v in entry.values() if torch.is_tensor(v) and v.dim()}
        if shapes - {tuple(parameters[new].shape)}:
            raise UserError(
                "the checkpoint's optimizer state is of other parameters: resume with the config "
                "it was made with, or leave out --resume"
            )
    rates = [group["lr"] for group in saved if group["params"]]
    for group in mine["param_groups"]:
        if group["params"]:
            group["lr"] = float(rates.pop(0))
    optimizer.load_state_dict({"state": entries, "param_groups": mine["param_groups"]})


def ckpt_content(
    *,
    step: int,
    train_size: int,
    batch_size: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **extra: Any,
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        step: the zero-based step after which it is taken; training resumes at step + 1.
        train_size: images (with flips) of the training set.
        batch_size: images of a pass over all GPUs.
        model: the bare model, not its DataParallel.
        extra: further entries of tensors and plain values.
    """
    return {
        "step": step,
        "train_size": train_size,
        "batch_size": batch_size,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        **extra,
    }


def save_ckpt(path: str | Path, **content: Any) -> None:
    """Write a checkpoint of `ckpt_content`'s arguments: whole, or not at all."""
    save_torch_file(ckpt_content(**content), path)


def read_ckpt(path: str | Path) -> dict[str, Any]:
    """A checkpoint file as a dict with at least `model`; a bare state dict becomes one.

    Files named `.safetensors` are read as such.

    Raises:
        UserError: the file is missing, damaged, or holds no weights.
    """
    is_safe = Path(path).suffix == SAFETENSORS
    content = read_safetensors(path) if is_safe else read_torch_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        return dict(content)
    if isinstance(content, Mapping) and any(torch.is_tensor(v) for v in content.values()):
        return {"model": content}
    raise UserError(f"{path} holds no model: a checkpoint is a dict with the key 'model'")


def load_ckpt(
    model: nn.Module,
    ckpt: str | Path | Mapping[str, Any],
    *,
    new_classes: bool = False,
    source: str | Path = "the checkpoint",
) -> LoadReport:
    """Load the weights of a checkpoint into a model. Logs the report.

    Args:
        ckpt: a file, a checkpoint's dict, or its state dict.
        source: where a dict comes from, for messages.
        new_classes: predictor layers made for another number of classes keep their initialisation
            (fine-tuning) instead of being an error.
    Raises:
        UserError: the file is unusable, or the weights are not of this model.
    """
    if isinstance(ckpt, (str, Path)):
        source, ckpt = ckpt, read_ckpt(ckpt)
    state = ckpt["model"] if isinstance(ckpt.get("model"), Mapping) else ckpt
    own = model.state_dict()
    # Layers without a Detectron blob are copies or constants; older checkpoints lack some.
    mapping = getattr(model, "detectron_weight_mapping", ({}, []))[0]
    lacking = [n for n in own if n not in state]
    missing = [n for n in lacking if mapping.get(n, n) is not None]
    unexpected = [n for n in state if n not in own]
    mismatched = [n for n in own if n in state and own[n].shape != state[n].shape]
    skipped = [n for n in mismatched if new_classes and is_class_predictor(n, own, state)]
    mismatched = [n for n in mismatched if n not in skipped]
    problems = [
        f"it lacks {first_names(missing)}" if missing else "",
        f"it has {first_names(unexpected)}, which the model has not" if unexpected else "",
        f"shapes differ in {first_names(_shapes(mismatched, own, state))}" if mismatched else "",
    ]
    if any(problems):
        predictors_only = not (missing or unexpected) and all(
            is_class_predictor(n, own, state) for n in mismatched
        )
        advice = "use the config and data set it was trained with"
        if predictors_only:
            advice = "its data set has another number of classes (MODEL.NUM_CLASSES)"
            if all("bbox_pred" in name for name in mismatched):
                dense = mismatched[0].startswith("RetinaNet")
                key = "RETINANET.CLASS_SPECIFIC_BBOX" if dense else "MODEL.CLS_AGNOSTIC_BBOX_REG"
                advice = f"set {key} as in its training"
        raise UserError(
            f"{source} is not a checkpoint of this model: "
            f"{'; '.join(filter(None, problems))}: {advice}"
        )
    loaded = {n: state[n] for n in own if n in state and n not in skipped}
    model.load_state_dict(loaded, strict=False)
    report = LoadReport(list(loaded), _shapes(skipped, own, state), without_blob=lacking)
    report.log(source)
    return report


def warn_of_another_training(checkpoint: Mapping[str, Any], **values: int) -> None:
    """Warn, before resuming, of a `train_size` or `batch_size` other than the checkpoint's.

    Steps and the place in the data are counted in batches of the earlier training.
    """
    for name, value in values.items():
        if (before := checkpoint.get(name, value)) != value:
            logger.warning(
                "the training to resume had %s %s, this one has %s: it will see other images at "
                "other rates than if it had not stopped",
                name,
                before,
                value,
            )


def is_class_predictor(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Does this parameter of an output layer differ from the other only in the number of classes,
    or of keypoints?"""
    mine, others = tuple(own[name].shape), tuple(other[name].shape)
    if "Keypoint_Outs." in name and len(mine) == len(others) == 4:
        # A deconvolution has its outputs second; the fixed upsampling is square in them.
        square = mine[0] == mine[1] and others[0] == others[1]
        return mine[2:] == others[2:] and (mine[0] == others[0] or square)
    return "_Outs." in name and mine[1:] == others[1:]


def _shapes(names: Iterable[str], own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [f"{n} ({tuple(own[n].shape)}, in the file {tuple(other[n].shape)})" for n in names]
