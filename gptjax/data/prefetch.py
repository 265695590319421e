"""Batches made ahead of time in a thread."""

import queue
import threading
from collections.abc import Callable, Generator

from gptjax.data.batches import Batch


def prefetch(make_batch: Callable[[int], Batch], steps: range, depth: int) -> Generator[Batch, None, None]:
    """`make_batch(step)` for each step, made up to `depth` steps ahead in a thread; its errors are raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                put(make_batch(step))
        except BaseException as e:  # raised again in the caller's thread
            put(e)

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
