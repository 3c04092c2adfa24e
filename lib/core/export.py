"""Trained detectors as programs without this project's modules: torch.export and ONNX.

torch.export holds the whole network: images to scored proposals, and the mask and keypoint heads.
It calls the compiled operators of `lib/ops`. ONNX has neither Detectron's proposal rule nor
RoIAlign over a pyramid, so there the graphs are cut: backbone with RPN, and each head from pooled
features on; proposals and pooling between them are done by this project (`core.export_onnx`).

An export is a folder: `export.yaml` (format, config, classes) and one file a part. Either is used
through `load_exported`, as a Predictor; batch size and image size are free.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim

import utils.blob as blob_utils
from core.config import cfg
from core.errors import UserError
from core.predictor import Predictor, configure
from datasets.vocabulary import Vocabulary
from utils.device import pick_devices
from utils.run_dir import make_folder, plain
from utils.skeleton import Skeleton
from utils.weights import atomic_write

RECORD = "export.yaml"
# Head and outputs by the name of their part.
HEADS = {
    "box": ("Box_Head", "Box_Outs"),
    "mask": ("Mask_Head", "Mask_Outs"),
    "keypoint": ("Keypoint_Head", "Keypoint_Outs"),
}
LARGEST_BATCH = 256


class _Detector(nn.Module):
    """Images to proposals with scores and deltas, and the maps that heads pool from."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data: Tensor, im_info: Tensor) -> tuple[Tensor, ...]:
        out = self.net(data, im_info)
        return out["rois"], out["cls_score"], out["bbox_pred"], *as_list(out["blob_conv"])


class _Head(nn.Module):
    """The mask or the keypoint head, pooling included."""

    def __init__(self, head: nn.Module, outs: nn.Module) -> None:
        super().__init__()
        self.head, self.outs = head, outs

    def forward(self, rois: Tensor, maps: list[Tensor]) -> Tensor:
        return self.outs(self.head(_as_blob(maps), {self.head.pooling["blob_rois"]: rois}))


class ExportedModel(nn.Module):
    """torch.export programs behind the interface of `Generalized_RCNN` in eval mode."""

    def __init__(self, programs: Mapping[str, nn.Module], device: torch.device) -> None:
        super().__init__()
        self.programs = nn.ModuleDict(programs)
        self.device = device

    def forward(self, data: Tensor, im_info: Tensor) -> dict[str, Any]:
        rois, cls_score, bbox_pred, *maps = self.programs["detector"](data, im_info)
        return {
            "rois": rois,
            "cls_score": cls_score,
            "bbox_pred": bbox_pred,
            "blob_conv": _as_blob(maps),
        }

    def mask_net(self, blob_conv: list[Tensor] | Tensor, rpn_blob: dict[str, Tensor]) -> Tensor:
        """As `Generalized_RCNN.mask_net`."""
        return self.programs["mask"](rpn_blob["mask_rois"], as_list(blob_conv))

    def keypoint_net(self, blob_conv: list[Tensor] | Tensor, rpn_blob: dict[str, Tensor]) -> Tensor:
        """As `Generalized_RCNN.keypoint_net`."""
        return self.programs["keypoint"](rpn_blob["keypoint_rois"], as_list(blob_conv))


def export_torch(predictor: Predictor, folder: Path) -> list[Path]:
    """Write a Predictor's model as torch.export programs, for the device that it is on.

    Returns:
        the files.

    Raises:
        UserError: a model of this kind cannot be exported.
    """
    refuse_unsupported()
    make_folder(folder)
    net, device = predictor.model, predictor.device
    data, im_info = example_images(device)
    detector = _Detector(net).eval()
    with torch.no_grad():
        rois, _, _, *maps = detector(data, im_info)
        images, size = Dim("images", max=LARGEST_BATCH), free_size()
        parts = {"detector": trace(detector, (data, im_info), ({0: images, **size}, {0: images}))}
        rois = rois.new_tensor([[0, 0, 0, 90, 90], [1, 9, 9, 60, 70], [1, 5, 5, 30, 100]])
        for name, (head, outs) in HEADS.items():
            if name != "box" and hasattr(net, head):
                free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
                shapes = ({0: Dim("rois", max=LARGEST_BATCH * 1000)}, [free for _ in maps])
                part = _Head(getattr(net, head), getattr(net, outs))
                parts[name] = trace(part, (rois, maps), shapes)
    files = []
    for name, program in parts.items():
        files.append(folder / f"{name}.pt2")
        with atomic_write(files[-1]) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No complete tensor")
            torch.export.save(program, file)
    write_record(folder, "torch", predictor.vocabulary, device)
    return files


def trace(part: nn.Module, example: tuple, free: tuple) -> torch.export.ExportedProgram:
    """torch.export of a part; free: the sizes that are not fixed, for each argument.

    Raises UserError for a model whose code fixes one of these sizes.
    """
    try:
        return torch.export.export(part.eval(), example, dynamic_shapes=free, strict=False)
    except torch._dynamo.exc.UserError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"this model cannot be exported, its {type(part).__name__.strip('_')} is not free in "
            f"size ({reason})"
        ) from error


def load_exported(
    folder: str | Path, *, device: str | None = None, batch_size: int = 8
) -> Predictor:
    """An exported model as a Predictor.

    Args:
        device: for an export to torch only the one that it was exported on.
    Raises:
        UserError: the folder holds no export, or it is for another device.
    """
    folder = Path(folder)
    try:
        record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is no exported model: it lacks a readable {RECORD}") from error
    chosen = pick_devices(device or record["device"])[0]
    if chosen.type != record["device"]:
        raise UserError(
            f"{folder} was exported for {record['device']} and cannot run on {chosen.type}: export "
            f"it again with --device {chosen.type}"
        )
    lines = tuple(tuple(tuple(end) for end in line) for line in record["skeleton"])
    vocabulary = Vocabulary(tuple(record["names"]), tuple(record["category_ids"]), Skeleton(lines))
    configure(folder / "config.yaml", (), lambda: vocabulary)
    if record["format"] == "onnx":
        from core.export_onnx import onnx_model

        model = onnx_model(folder)
    else:
        files = sorted(folder.glob("*.pt2"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable|No complete tensor")
            programs = {file.stem: torch.export.load(file).module() for file in files}
        model = ExportedModel(programs, chosen)
    return Predictor.of_model(model, vocabulary, device=chosen, batch_size=batch_size)


def refuse_unsupported() -> None:
    """Raise UserError for models that cannot be exported."""
    reasons = {
        "RETINANET.RETINANET_ON": cfg.RETINANET.RETINANET_ON,
        "MODEL.RPN_ONLY": cfg.MODEL.RPN_ONLY,
        "MODEL.FASTER_RCNN False (proposals from a file)": not cfg.MODEL.FASTER_RCNN,
    }
    for what, present in reasons.items():
        if present:
            raise UserError(
                f"models with {what} cannot be exported: only those with an RPN and RoI heads can"
            )


def example_images(device: torch.device) -> tuple[Tensor, Tensor]:
    """Network input to trace with: two images, for one would be taken for a constant."""
    side = 6 * max(32, blob_utils.coarsest_stride())
    data = torch.zeros(2, 3, side, side + 32, device=device)
    im_info = torch.tensor([[side, side + 32, 1.0]] * 2, device=device)
    return data, im_info


def free_size() -> dict[int, Any]:
    """Height and width of network input as torch.export takes them: multiples of the stride."""
    stride = blob_utils.coarsest_stride()
    largest = 2 * max(cfg.TEST.MAX_SIZE, cfg.TEST.SCALE, 256) // stride
    smallest = max(1, 32 // stride)
    names = {2: "height", 3: "width"}
    dims = {axis: Dim(name, min=smallest, max=largest) for axis, name in names.items()}
    return {axis: stride * dim if stride > 1 else dim for axis, dim in dims.items()}


def write_record(folder: Path, kind: str, vocabulary: Vocabulary, device: torch.device) -> None:
    """Write what `load_exported` must know besides the programs."""
    record = {
        "format": kind,
        "device": device.type,
        "names": list(vocabulary.names),
        "category_ids": list(vocabulary.category_ids),
        "skeleton": [[list(end) for end in line] for line in vocabulary.skeleton.lines],
    }
    for name, content in ((RECORD, record), ("config.yaml", plain(cfg))):
        with atomic_write(folder / name) as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())


def as_list(blob_conv: list[Tensor] | Tensor) -> list[Tensor]:
    """Feature maps as a list, also where there is only one."""
    return [blob_conv] if isinstance(blob_conv, Tensor) else list(blob_conv)


def _as_blob(maps: list[Tensor]) -> list[Tensor] | Tensor:
    return list(maps) if cfg.FPN.FPN_ON else maps[0]
