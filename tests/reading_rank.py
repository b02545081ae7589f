"""A process that reads data as a rank does, in processes of its own: `python reading_rank.py START_METHOD`.

It tells their ids, and goes on at each line that it is given: to the last batch, and to its end.
"""

from __future__ import annotations

import multiprocessing
import sys

from torch.utils.data import DataLoader, Dataset

from llava_cl.stopping import outlive_signals

BATCHES = 12
"""More than are read in advance."""


class Numbers(Dataset[int]):
    """Each index."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        return index


def main(method: str) -> None:
    """Reads."""
    multiprocessing.set_start_method(method)
    batches = iter(DataLoader(Numbers(), batch_size=None, num_workers=2, worker_init_fn=outlive_signals))
    read = [next(batches), next(batches)]
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    read += [next(batches) for _ in range(BATCHES - len(read))]
    print(read == list(range(BATCHES)), flush=True)
    sys.stdin.readline()
    # Kept until Python ends, as by the traceback of an error.
    globals()["kept"] = batches


if __name__ == "__main__":
    main(sys.argv[1])
