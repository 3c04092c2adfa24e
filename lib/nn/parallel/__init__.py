"""One module on several GPUs of one process."""

from nn.parallel.data_parallel import DataParallel

__all__ = ["DataParallel"]
