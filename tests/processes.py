"""Several processes of one run, forked from the test's own: no imports to wait for."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def in_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns in each of ``count`` processes that a launcher could have started.

    Plain data only. A process that fails or hangs fails the test.
    """
    context: Any = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    queue = context.Queue()
    started = [
        context.Process(target=_join, args=(index, count, port, work, queue), daemon=True)
        for index in range(count)
    ]
    for process in started:
        process.start()
    try:
        found = dict(queue.get(timeout=60) for _ in started)
    finally:
        for process in started:
            process.join(timeout=10)
            process.kill()
    return [found[index] for index in range(count)]


def _join(index: int, count: int, port: str, work: Callable[[], Any], queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(index)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_RANK": str(index), "OMP_NUM_THREADS": "1"}
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=index, world_size=count)
    queue.put((index, work()))
    torch.distributed.destroy_process_group()
