"""Packets on the workers of a Dask cluster, each of which loads the model once.

Dask moves packets, and repeats those of a worker that dies. What is added here: a bounded number of packets under way;
the last ones a second time on idle workers, in case the first hangs; and packets cut in halves until a request that
kills workers is alone.
"""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from qwen3np.batches.answers import Answers, Recipe, wrong_line
from qwen3np.batches.requests import Request
from qwen3np.ops.fast.threads import num_threads

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # as Dask has it: the threads are ours
CORES = num_threads()  # of this process, before a worker gives it its share
_PATIENCE = 20  # seconds in which a scheduler must answer
_TRIES = 3  # attempts to load the model, if every worker dies
_LOOK = 1.0  # seconds without a result after which idle workers get copies
_working = threading.Lock()
_held: dict[Recipe, Answers] = {}  # on a worker: one at a time


@contextmanager
def cluster(workers: int | None, scheduler: str | None) -> Generator[Any]:
    """Yield the client of this scheduler, or of as many worker processes here. Raises ValueError without either."""
    try:
        import dask.config as dask_config
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError(f"more than one process needs {error.name}: pip install qwen3np[batch]") from None
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError) as error:
            raise ValueError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from None
        with client:
            yield client
        return
    assert workers is not None
    # Dask counts the shared pages of a mapped file for each worker, hence no limit
    options: dict[str, Any] = {"memory_limit": 0, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    # Ctrl-C reaches every process of a terminal; this one ends the others
    options["preload"] = ["import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"]
    each = max(num_threads() // workers, 1)
    config: dict[str, Any] = {
        "distributed.scheduler.worker-ttl": "60s",  # without a sign of life
        "distributed.worker.profile.enabled": False,  # which looks at every thread 100 times a second
        # without Dask's MALLOC_TRIM_THRESHOLD_, which makes every array of a forward pass fault its pages in again
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(_ONE_THREAD, 1),
    }
    with (
        dask_config.set(config),
        LocalCluster(n_workers=workers, threads_per_worker=each, **options) as here,
        Client(here, direct_to_workers=True) as client,
    ):
        yield client


class Spread:
    """The workers of a client, all with the same model. Calling it answers packets."""

    def __init__(self, client: Any, recipe: Recipe) -> None:
        """Load the model on every worker. Raises ValueError where they do not have the same."""
        self.client, self.recipe = client, recipe
        for _ in range(_TRIES):
            try:
                client.wait_for_workers(1, timeout=60)
            except TimeoutError:
                raise ValueError(f"{client.scheduler.address}: this scheduler has no workers") from None
            if fingerprints := self._fingerprints():
                break
        else:
            raise ValueError("every worker died while it loaded the model; is there enough memory for it?")
        models = {_model(fingerprint): worker for worker, fingerprint in fingerprints.items()}
        if len(models) > 1:
            listed = "; ".join(f"{worker} has {model}" for model, worker in models.items())
            raise ValueError(
                f"the workers would not compute the same: {listed}; each needs the same version of qwen3np and the "
                "same files of the model"
            )
        (self.model,) = models

    def __call__(self, packets: Iterable[list[Request]]) -> Iterator[tuple[Request, bytes]]:
        """Yield the line of each request's result as it comes. Raises ValueError if the scheduler is gone."""
        source, numbers, exhausted, most, looked = iter(packets), count(), False, 0, 0.0
        under_way: dict[int, tuple[list[Request], list[Any]]] = {}
        finished = SimpleQueue[tuple[int, Any]]()

        def submit(number: int, packet: list[Request], **where: Any) -> None:
            # as bytes, since Dask looks for futures in every field of lists
            future = self.client.submit(_answered, self.recipe, self.model, pickle.dumps(packet), pure=False, **where)
            under_way.setdefault(number, (packet, []))[1].append(future)
            future.add_done_callback(lambda done: finished.put((number, done)))

        while True:
            if time.monotonic() > looked + _LOOK:
                most, looked = 2 * sum(self.client.nthreads().values()) + 1, time.monotonic()
            while not exhausted and len(under_way) < most:
                packet = next(source, None)
                exhausted = packet is None
                if packet:
                    submit(next(numbers), packet)
            if not under_way:
                return
            try:
                number, future = finished.get(timeout=_LOOK)
            except Empty:
                self._require_scheduler()
                if exhausted:
                    idle = [worker for worker, tasks in self.client.processing().items() if not tasks]
                    once = [number for number, (_, copies) in under_way.items() if len(copies) == 1]
                    for worker, number in zip(idle, once, strict=False):
                        submit(number, under_way[number][0], workers=[worker])
                continue
            if number not in under_way or future.status == "cancelled":
                self._require_scheduler()
                continue
            packet, copies = under_way.pop(number)
            if future.status == "finished":
                yield from zip(packet, future.result().splitlines(keepends=True), strict=True)
            else:
                error = future.exception()
                if type(error).__name__ != "KilledWorker":
                    raise error
                if len(packet) == 1:
                    request = packet[0]._replace(error="every worker that computed this request died")
                    yield request, wrong_line(request, "worker_died")
                else:
                    for half in (packet[: len(packet) // 2], packet[len(packet) // 2 :]):
                        submit(next(numbers), half)
            for copy in copies:
                copy.cancel()

    def _fingerprints(self) -> dict[str, str]:
        """The fingerprint of each worker, except those that leave in the meantime."""
        futures = {
            w: self.client.submit(_fingerprint, self.recipe, workers=[w], pure=False) for w in self.client.nthreads()
        }
        while any(worker in self.client.nthreads() and not future.done() for worker, future in futures.items()):
            self._require_scheduler()
            time.sleep(0.05)
        try:
            return {worker: future.result() for worker, future in futures.items() if future.done()}
        except (RuntimeError, ImportError) as error:  # Dask's, where it cannot unpickle
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the scheduler and every worker need the packages of this process ({reason})") from None

    def _require_scheduler(self) -> None:
        if self.client.status != "running":
            raise ValueError("the scheduler is gone; what is done is written, and the same command goes on from there")


def _model(fingerprint: str) -> str:
    """The part of a fingerprint that is the same on every machine."""
    return "-".join(fingerprint.split("-")[:2])


def _fingerprint(recipe: Recipe) -> str:
    """On a worker: what its answers depend on."""
    with _working:
        return _loaded(recipe).fingerprint


def _answered(recipe: Recipe, model: str, pickled: bytes) -> bytes:
    """On a worker: the lines of a packet. Several threads take turns, since one packet uses all of them."""
    packet: list[Request] = pickle.loads(pickled)
    with _working:
        answers = _loaded(recipe)
        if _model(answers.fingerprint) != model:
            raise ValueError(f"a worker that joined later has {_model(answers.fingerprint)}, the others {model}")
        lines = {request.key: line for request, line in answers(packet)}
        return b"".join(lines[request.key] for request in packet)  # moved as a whole


def _loaded(recipe: Recipe) -> Answers:
    from distributed import get_worker

    if recipe not in _held:
        while _held:  # another model, which goes before this one needs its memory
            _held.popitem()[1].close()
        gc.collect()
        threads = get_worker().state.nthreads
        os.environ["QWEN3NP_NUM_THREADS"] = str(threads)
        _held[recipe] = recipe.answers(share=min(threads / CORES, 1))
    return _held[recipe]
