"""A sweep's batches on Ray workers: the GPUs of one or many machines, or processes of this one. Only this module
imports ray.

Each batch is a Ray task. Ray hands it to a free worker, and to another one if the worker dies; results are taken in the
order of the plan, so the records are those of the local engine. A worker loads a model when a batch first needs it, and
keeps it for the next. Few tasks are handed over at a time: a sweep that is broken off leaves no more than these to
somebody else's Ray, where nothing takes them back. (``ray.cancel`` of Ray 2.60 ends this process now and then.)
"""

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..numbers import check_whole
from .batch import run_batch
from .config import SweepConfig
from .corpus import Corpus
from .plan import Batch
from .records import check_same
from .sources import identity, load_model

RETRIES = 3  # how often Ray tries a batch again whose worker died
AHEAD = 2  # tasks handed over for each that the cluster can run at once: one runs, the next waits at hand


def need_ray(config: SweepConfig, workers: int | None) -> None:
    """Raise, in one sentence, if the batches of a config cannot be run on Ray as asked.

    Raises
    ------
    ImportError
        If ray is missing.
    ValueError
        If the number of workers makes no sense, or the device is one GPU by its number.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError("the engine 'ray' needs the package ray; expected pip install 'kvpitfalls[ray]'")
    if workers is not None:
        check_whole("workers", workers, 1)
    if ":" in config.device:
        raise ValueError(
            f"device is {config.device!r}; expected 'cuda' with the engine 'ray', which gives each worker a GPU of "
            "its own"
        )


def run_ray(
    config: SweepConfig, corpus: Corpus, batches: list[Batch], same: dict, workers: int | None
) -> Iterator[list[dict]]:
    """The records of each batch, in order, made by Ray workers.

    Parameters
    ----------
    config : SweepConfig
    corpus : Corpus
    batches : list of Batch
    same : dict
        What records depend on, as it is here. A worker for which it is otherwise refuses to work.
    workers : int or None
        Start Ray here with so many processors. By default Ray's own choice: the cluster of ``RAY_ADDRESS``, or all of
        this machine. A task takes one processor, and on "cuda" one GPU.

    Raises
    ------
    ValueError
        If workers are given where Ray is running in this process already; what a worker raises.
    RuntimeError
        If Ray gives up on a batch, since worker after worker died at it.

    Notes
    -----
    Workers use as many threads as this process does, since records may depend on it: ``OMP_NUM_THREADS=1`` gives each
    worker one core.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    import ray

    started = not ray.is_initialized()
    if workers is not None and not started:
        raise ValueError(f"workers is {workers}, but Ray is running in this process already; expected None")
    if started:
        here = {} if workers is None else {"address": "local", "num_cpus": workers}
        ray.init(include_dashboard=False, logging_level=logging.WARNING, **here)
    try:
        task = _task(config.device, _run)
        shared = ray.put((config, corpus, same, torch.get_num_threads()))
        yield from _in_order(lambda batch: task.remote(shared, batch), batches, config.device)
    finally:
        if started:
            ray.shutdown()


def _in_order(begin: Callable[[Batch], Any], batches: Sequence[Batch], device: str) -> Iterator[list[dict]]:
    """The records of each batch, in order; a slow one keeps no worker from those behind it."""
    import ray

    left, begun, running = deque(batches), deque[Any](), []
    while left or begun:
        while left and len(running) < AHEAD * _n_at_once(device):
            running.append(begin(left.popleft()))
            begun.append(running[-1])
        _, running = ray.wait(running)
        while begun and begun[0] not in running:
            yield _get(begun.popleft())


def _n_at_once(device: str) -> int:
    """How many tasks all of the cluster's nodes could run; nodes come and go."""
    import ray

    held, taken = ray.cluster_resources(), ("CPU", "GPU") if device == "cuda" else ("CPU",)
    return max(1, int(min(held.get(name, 0) for name in taken)))


def _task(device: str, function: Callable) -> Any:
    """A function that Ray's workers run, as often as they live: else Ray ends one that had a GPU after each call, and
    the next loads the model anew."""
    import ray

    return ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=RETRIES, max_calls=0)(function)


def _get(result) -> list[dict]:
    import ray
    from ray import exceptions

    try:
        return ray.get(result)
    except exceptions.RayTaskError as error:  # what the worker raised, without Ray's account of it
        raise error.cause from error
    except exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"Ray gave up on a batch ({reason}); what is recorded is kept, and the same sweep goes on from there"
        ) from error


class _Held:
    """What a worker process has loaded: one model at a time."""

    same: dict | None = None
    name: str | None = None
    model: Any = None
    tokenizer: Any = None


def _run(shared: tuple, batch: Batch) -> list[dict]:
    """A batch, in a worker."""
    config, corpus, same, n_thread = shared
    torch.set_num_threads(n_thread)
    if _Held.same != same:
        check_same(same, identity(config, corpus))
        _Held.same, _Held.name = same, None
    if _Held.name != batch.model:
        _Held.name = _Held.model = None  # before the next is loaded: two may not fit
        _Held.model, _Held.tokenizer = load_model(config, batch.model)
        _Held.name = batch.model
    return run_batch(_Held.model, _Held.tokenizer, corpus, config, batch)
