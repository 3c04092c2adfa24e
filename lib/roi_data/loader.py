"""The training loader: which image when (samplers), and batches for every GPU (collation)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch.utils.data as torch_data

from core.config import cfg
from core.errors import UserError
from roi_data.loader_workers import BatchReader, Item, TrainLoader
from roi_data.minibatch import MinibatchOptions, Sample, get_sample, pack_minibatch
from utils.packed_roidb import PackedRoidb, RoidbEntry

# A bad image's neighbours that are tried in its place: where so many cannot be read, none can.
_MOST_REPLACEMENTS = 10


class RoiDataLoader(torch_data.Dataset):
    """Training images by (index, ratio, seed): see `roi_data.minibatch.get_sample`.

    num_classes: with background; UserError if a label of the roidb is not below it. training is
    True: this data set has no other use. The roidb is copied into a compact form that processes
    share: the caller may drop it.
    """

    def __init__(
        self, roidb: Sequence[RoidbEntry], num_classes: int, training: bool = True
    ) -> None:
        if not training:
            raise ValueError("RoiDataLoader is for training; core.test_engine reads test images")
        largest = max((int(e["gt_classes"].max(initial=0)) for e in roidb), default=0)
        if largest >= num_classes:
            raise UserError(
                f"the training data have class label {largest} but MODEL.NUM_CLASSES is "
                f"{num_classes}; set it to the number of classes with background"
            )
        self._options = MinibatchOptions.from_cfg()
        self._roidb = PackedRoidb.pack(roidb)
        self._sizes = np.array([(e["height"], e["width"]) for e in roidb]).reshape(-1, 2)
        self._skip_bad_images = cfg.DATA_LOADER.ON_BAD_IMAGE == "skip"

    def __len__(self) -> int:
        return len(self._roidb)

    def __getitem__(self, item: Item) -> Sample:
        return self.read(item)[0]

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) as the annotations say."""
        height, width = self._sizes[index].tolist()
        return height, width

    def image_path(self, index: int) -> str:
        return self._roidb[index]["image"]

    def read(self, item: Item, out: np.ndarray | None = None) -> tuple[Sample, str]:
        """An item's image, decoded into `out` (uint8, of its image_size) if that is given.

        An image that cannot be read is a UserError or, with DATA_LOADER.ON_BAD_IMAGE `skip`, it
        is replaced by its neighbour in aspect ratio, which the text says; '' otherwise.
        """
        index, ratio, seed = item
        try:
            return get_sample(self._roidb[index], ratio, seed, self._options, out), ""
        except UserError as error:
            if not self._skip_bad_images:
                raise
            bad = error
        for other in self._neighbours(index):
            try:
                sample = get_sample(self._roidb[other], ratio, seed, self._options)
            except UserError:
                continue
            return sample, f"{bad} (it is left out; another is trained on in its place)"
        raise UserError(f"{bad} ({_MOST_REPLACEMENTS} others cannot be read either)")

    def _neighbours(self, index: int) -> list[int]:
        """The images that follow one in aspect ratio, the nearest first; before it at the end."""
        ratios = self._sizes[:, 1] / self._sizes[:, 0]
        order = np.argsort(ratios, kind="stable")
        place = int(np.flatnonzero(order == index)[0])
        following = [*order[place + 1 :], *order[:place][::-1]]
        return [int(i) for i in following[:_MOST_REPLACEMENTS]]


def cal_minibatch_ratio(ratio_list: np.ndarray, ims_per_batch: int) -> np.ndarray:
    """The target aspect ratio of each image: that of its group of `ims_per_batch` neighbours.

    It is the group's first ratio if all are below 1, its last if all are above 1, else 1.
    ratio_list and result: float64 (n,).
    """
    target = np.ones(len(ratio_list), dtype=np.float64)
    for begin in range(0, len(ratio_list), ims_per_batch):
        group = ratio_list[begin : begin + ims_per_batch]
        if (group < 1).all():
            target[begin : begin + ims_per_batch] = group[0]
        elif (group > 1).all():
            target[begin : begin + ims_per_batch] = group[-1]
    return target


class MinibatchSampler(torch_data.Sampler):
    """An endless sequence of passes over the images, each in another order.

    Arguments as `rank_for_training` returns them. With TRAIN.ASPECT_GROUPING, IMS_PER_BATCH
    neighbours in aspect ratio form a group, groups are shuffled, and what does not fill a group
    comes last. Every iteration is the next pass; `epoch` is the number of the next one, and order
    and seeds of a pass depend on cfg.RNG_SEED and that number alone.
    """

    def __init__(self, ratio_list: np.ndarray, ratio_index: np.ndarray) -> None:
        self._ratios = np.asarray(ratio_list)
        self._indices = np.asarray(ratio_index)
        self._group = cfg.TRAIN.IMS_PER_BATCH
        self._grouping = cfg.TRAIN.ASPECT_GROUPING
        self._seed = cfg.RNG_SEED
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Item]:
        rng = np.random.RandomState([self._seed % 2**32, self.epoch])
        self.epoch += 1
        pairs = self.shuffled(rng)
        seeds = rng.randint(2**31, size=len(self), dtype=np.int64).tolist()
        for (index, ratio), seed in zip(pairs, seeds, strict=True):
            yield index, ratio, seed

    def shuffled(self, rng: np.random.RandomState) -> list[tuple[int, float]]:
        """(roidb index, target ratio) of one pass, in an order drawn from rng."""
        if self._grouping:
            order = np.arange(len(self))
            whole_groups = order[: len(self) // self._group * self._group]
            rng.shuffle(whole_groups.reshape(-1, self._group))  # a view: order changes with it
            ratios = cal_minibatch_ratio(self._ratios, self._group)[order]
        else:
            order = rng.permutation(len(self))
            ratios = cal_minibatch_ratio(self._ratios[order], self._group)
        return list(zip(self._indices[order].tolist(), ratios.tolist(), strict=True))


class BatchSampler(torch_data.BatchSampler):
    """Lists of batch_size items of a MinibatchSampler; each iteration is its next pass or, if it is
    endless, all passes from there on.

    Of world_size processes each gets its share of every list: groups of IMS_PER_BATCH stay whole.
    `seek` makes resuming exact: the state of a training is the number of batches it has consumed.
    """

    def __init__(
        self,
        sampler: MinibatchSampler,
        batch_size: int,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._endless = endless
        size = batch_size // world_size
        self._part = slice(rank * size, (rank + 1) * size)
        self._skip = 0

    def seek(self, batches: int) -> None:
        """Let the next iteration start after so many batches of the whole sequence of passes."""
        self.sampler.epoch, self._skip = divmod(batches, len(self))

    def __iter__(self) -> Iterator[list[Item]]:
        # A generator, so that nothing changes before the first batch is asked for: DataLoader
        # makes an iterator that it never uses.
        skip, self._skip = self._skip, 0
        for _ in itertools.count() if self._endless else range(1):
            for batch in itertools.islice(super().__iter__(), skip, None):
                yield batch[self._part]
            skip = 0


def collate_minibatch(
    samples: Sequence[Sample], options: MinibatchOptions | None = None
) -> dict[str, list]:
    """Batch for all GPUs: each key of `pack_minibatch` with a list of one entry per GPU.

    Every GPU gets options.ims_per_batch images in order; options are those of cfg by default.
    """
    options = options or MinibatchOptions.from_cfg()
    size = options.ims_per_batch
    parts = [
        pack_minibatch(samples[begin : begin + size], options)
        for begin in range(0, len(samples), size)
    ]
    return {key: [part[key] for part in parts] for key in parts[0]}


def build_train_loader(
    roidb: Sequence[RoidbEntry],
    ratio_list: np.ndarray,
    ratio_index: np.ndarray,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    endless: bool = False,
) -> TrainLoader:
    """The loader of training batches over all GPUs, as `combined_roidb_for_training` feeds it.

    batch_size: images over all GPUs. Of world_size processes that train together, this one is
    number `rank` and gets the images of its GPUs: those that a single process would give them.
    One iteration is one pass, the last incomplete batch left out, or with `endless` one pass after
    the other: the processes read ahead into the next, or a small data set would keep the GPU
    waiting. `loader.batch_sampler.seek(n)` continues after n batches. What is drawn depends on
    cfg.RNG_SEED and the number of the batch, not on num_workers. Batches lie in pinned memory if
    cfg.CUDA. Raises UserError if the images do not fill one batch; iterating raises UserError
    naming an image that cannot be used.
    """
    if len(roidb) < batch_size:
        raise UserError(
            f"{len(roidb)} training images do not fill a batch of {batch_size}; "
            f"use --bs {len(roidb)} or less, or more images"
        )
    sampler = MinibatchSampler(ratio_list, ratio_index)
    images = RoiDataLoader(roidb, cfg.MODEL.NUM_CLASSES)
    return TrainLoader(
        BatchReader(images, MinibatchOptions.from_cfg(), num_workers),
        BatchSampler(sampler, batch_size, True, rank, world_size, endless),
        num_workers,
        pin_memory=cfg.CUDA,
    )
