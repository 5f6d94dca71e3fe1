"""Uploads are admitted in order, and only as many as fit."""
import asyncio

import pytest

from fedcore.transport.credits import Credits


def run(scenario) -> None:
    asyncio.run(scenario())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_no_more_uploads_are_admitted_than_there_is_room_for_and_the_others_come_in_order():
    async def scenario() -> None:
        credits, admitted = Credits(2, None, lambda _: None), []

        async def upload(name: str) -> None:
            await credits.acquire(name, 10)
            admitted.append(name)

        tasks = [asyncio.create_task(upload(name)) for name in "abcd"]
        await settle()
        assert admitted == ["a", "b"] and (credits.admitted, credits.waiting) == (2, 2)
        credits.release("b")
        await settle()
        assert admitted == ["a", "b", "c"]
        credits.release("a")
        credits.release("a")    # twice is once
        await asyncio.gather(*tasks)
        assert admitted == ["a", "b", "c", "d"] and credits.admitted == 2

    run(scenario)


def test_a_single_upload_is_admitted_whatever_its_size():
    async def scenario() -> None:
        credits = Credits(4, 100, lambda _: None, in_use=lambda: 3)
        await credits.acquire("large", 1000)
        assert not credits.has_room(1)
        waiting = asyncio.create_task(credits.acquire("small", 1))
        await settle()
        assert not waiting.done()
        credits.release("large")
        await waiting

    run(scenario)


def test_old_models_that_are_still_being_sent_hold_up_uploads_but_not_for_ever():
    async def scenario() -> None:
        old = 4
        credits = Credits(4, None, lambda _: None, in_use=lambda: old, patience_s=0.2)
        first, second = (asyncio.create_task(credits.acquire(name, 1)) for name in "ab")
        await settle()
        assert not credits.has_room(1) and credits.waiting == 2
        old = 3
        credits.admit()
        await first
        assert credits.admitted == 1 and credits.waiting == 1
        old = 9
        credits.release("a")
        await settle()
        assert credits.waiting == 1, "an old model takes its place"
        await second    # nobody fetched anything meanwhile
        third = asyncio.create_task(credits.acquire("c", 1))
        await settle()
        assert credits.admitted == 1 and not third.done(), "one at a time"
        credits.release("b")
        await settle()
        assert not third.done(), "patience begins anew"
        await third

    run(scenario)


def test_a_broken_off_upload_keeps_its_place_until_somebody_wants_it():
    async def scenario() -> None:
        evicted: list[str] = []
        credits = Credits(1, None, evicted.append)
        await credits.acquire("a", 1)
        credits.park("a")
        await credits.acquire("a", 1)    # it goes on
        credits.park("a")
        await credits.acquire("b", 1)
        assert evicted == ["a"] and credits.admitted == 1

    run(scenario)


def test_an_upload_that_gives_up_waiting_does_not_block_the_others():
    async def scenario() -> None:
        credits = Credits(1, None, lambda _: None)
        await credits.acquire("a", 1)
        impatient = asyncio.create_task(credits.acquire("b", 1))
        patient = asyncio.create_task(credits.acquire("c", 1))
        await settle()
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        credits.release("a")
        await patient
        assert (credits.admitted, credits.waiting) == (1, 0)

    run(scenario)
