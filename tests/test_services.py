"""Models inside of services: what a request gets depends on nothing that others do before or beside it."""

import asyncio

import pytest
import torch
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls.hf.cache import KeptCache


@pytest.fixture
def llama():
    return build("llama")


def is_compressed(model) -> bool:
    """Whether a request that comes now is."""
    out = model.generate(ids(1, 20), max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return isinstance(out.past_key_values, KeptCache)


def test_a_pause_is_of_the_task_that_makes_it(llama):
    """Requests of an asyncio server are tasks of one thread: none may run uncompressed since another one pauses, nor
    compressed since another's pause is over; and nothing stays paused."""

    async def serve():
        is_begun, is_over, told = asyncio.Event(), asyncio.Event(), {}

        async def short():
            with handle.paused():
                is_begun.set()
                await asyncio.sleep(0)
                told["in its own"] = is_compressed(llama)
                await asyncio.sleep(0.01)
            told["after its own"] = is_compressed(llama)
            is_over.set()

        async def long():
            await is_begun.wait()
            told["beside another's"] = is_compressed(llama)
            with handle.paused():
                started = asyncio.create_task(goes_on())
                await is_over.wait()
                told["in its own, another's over"] = is_compressed(llama)
                told["on a thread, in its own"] = await asyncio.to_thread(is_compressed, llama)
            await started

        async def goes_on():
            told["in that of whoever started it"] = is_compressed(llama)
            await is_over.wait()
            await asyncio.sleep(0.01)
            told["started in one that is over"] = is_compressed(llama)

        await asyncio.gather(short(), long())
        return told

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        assert asyncio.run(serve()) == {
            "in its own": False,
            "beside another's": True,
            "in that of whoever started it": False,
            "after its own": True,
            "in its own, another's over": False,
            "on a thread, in its own": False,
            "started in one that is over": True,
        }
        assert is_compressed(llama)


def test_pauses_of_generators_end_in_any_order(llama):
    def pausing():
        with handle.paused():
            yield

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        one, two = pausing(), pausing()
        next(one), next(two)
        one.close()
        assert not is_compressed(llama)
        two.close()
        assert is_compressed(llama)
