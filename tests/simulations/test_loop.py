import asyncio
import math
import random
import threading
import time

import pytest

from fedcore.errors import NothingCanHappen
from fedcore.simulations.loop import VirtualLoop, run_virtual, sleep_until


def now():
    return asyncio.get_running_loop().time()


def test_sleeping_costs_no_time_of_ours():
    async def main():
        await asyncio.sleep(1e7)
        return now()

    started = time.monotonic()
    assert run_virtual(main()) == 1e7
    assert time.monotonic() - started < 5


def test_the_clock_shows_exactly_what_was_planned():
    async def main():
        expected = 0.0
        for _ in range(10_000):
            expected += 0.1
            await asyncio.sleep(0.1)
            assert now() == expected
        drifted = now()
        for k in range(10_001, 20_001):
            await sleep_until(k * 0.1)
            assert now() == k * 0.1
        return drifted, now()

    drifted, exact = run_virtual(main())
    assert drifted == pytest.approx(1000, abs=1e-8) and drifted != 1000
    assert exact == 2000.0


def test_equal_times_happen_in_the_order_planned_and_deliveries_first():
    seen = []

    async def main():
        loop = asyncio.get_running_loop()
        for name in "abc":
            loop.call_at(5, seen.append, name)
        for tie in (2, 0, 1):
            loop.deliver_at(5, tie, seen.append, tie)
        loop.call_at(1, seen.append, "early")
        await asyncio.sleep(6)

    run_virtual(main())
    assert seen == ["early", 0, 1, 2, "a", "b", "c"]


def test_all_that_one_event_wakes_runs_before_the_next_event_of_the_same_time():
    seen = []

    async def waiter(event):
        await event.wait()
        await asyncio.sleep(0)
        seen.append("woken")

    async def main():
        event = asyncio.Event()
        task = asyncio.create_task(waiter(event))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(1, event.set)
        asyncio.get_running_loop().call_at(1, seen.append, "second")
        await asyncio.sleep(2)
        await task

    run_virtual(main())
    assert seen == ["woken", "second"]


def test_a_message_beats_its_own_timeout():
    async def main():
        loop = asyncio.get_running_loop()
        message = loop.create_future()
        # The timeout is planned first, and for the same moment.
        receive = asyncio.create_task(asyncio.wait_for(message, 3))
        await asyncio.sleep(0)
        loop.deliver_at(3, 0, message.set_result, "here")
        return await receive

    assert run_virtual(main()) == "here"


def test_timeouts_fire_at_their_time():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        assert now() == 2.5
        done, pending = await asyncio.wait([asyncio.create_task(asyncio.sleep(delay)) for delay in (1, 9)], timeout=4)
        assert (len(done), len(pending), now()) == (1, 1, 6.5)
        async with asyncio.timeout_at(10):
            await asyncio.sleep(1)
        return now()

    assert run_virtual(main()) == 7.5


def test_a_task_group_ends_with_its_first_failure():
    async def fail():
        await asyncio.sleep(2)
        raise ValueError("broken")

    async def main():
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(100))
                group.create_task(fail())
        assert [str(error) for error in caught.value.exceptions] == ["broken"]
        return now()

    assert run_virtual(main()) == 2


def test_cancelled_timers_leave_the_heap():
    async def main():
        loop = asyncio.get_running_loop()
        for _ in range(50_000):
            async with asyncio.timeout(1000):
                await asyncio.sleep(0.001)
        timer = loop.call_later(5, pytest.fail, "cancelled, and yet it happened")
        timer.cancel()
        timer.cancel()
        await asyncio.sleep(10)
        return len(loop.heap), len(loop.heap._heap)

    live, held = run_virtual(main())
    assert live == 0
    assert held < 5000


def test_same_program_same_history():
    def history(seed):
        rng, seen = random.Random(seed), []

        async def node(rank, inboxes):
            for step in range(20):
                await asyncio.sleep(rng.random())
                to = rng.randrange(5)
                asyncio.get_running_loop().deliver_at(now() + rng.random(), rank, inboxes[to].put_nowait, (rank, step))
            while True:
                try:
                    seen.append((now(), rank, await asyncio.wait_for(inboxes[rank].get(), 1)))
                except TimeoutError:
                    return

        async def main():
            inboxes = [asyncio.Queue() for _ in range(5)]
            await asyncio.gather(*(node(rank, inboxes) for rank in range(5)))

        run_virtual(main())
        return seen

    assert history(3) == history(3) != history(4)
    assert len(history(3)) > 50


def test_a_deadlock_is_named_and_does_not_hang():
    async def main():
        await asyncio.sleep(7)
        stuck = asyncio.create_task(asyncio.Event().wait(), name="forgotten peer")
        await stuck

    with pytest.raises(NothingCanHappen, match=r"At 7 s all coroutines wait.*test_loop.py:\d+.*forgotten peer"):
        run_virtual(main())


def test_waiting_for_the_end_of_time_is_a_deadlock_too():
    with pytest.raises(NothingCanHappen):
        run_virtual(asyncio.sleep(math.inf))
    with pytest.raises(ValueError, match="not a number"):
        run_virtual(asyncio.sleep(math.nan))


def test_exceptions_surface_from_tasks_and_callbacks():
    async def raising():
        await asyncio.sleep(1)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run_virtual(raising())

    async def main():
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await asyncio.sleep(5)

    with pytest.raises(ZeroDivisionError):
        run_virtual(main())

    async def deliver():
        asyncio.get_running_loop().deliver_at(1, 0, lambda: {}["nothing"])
        await asyncio.sleep(5)

    with pytest.raises(KeyError, match="nothing"):
        run_virtual(deliver())


def test_the_failure_of_a_task_that_nobody_awaits_ends_the_run():
    async def fail():
        raise OSError("nobody looked")

    async def main():
        asyncio.create_task(fail())
        await asyncio.sleep(5)

    with pytest.raises(OSError, match="nobody looked"):
        run_virtual(main())


def test_an_exception_handler_of_ones_own_keeps_the_run_going():
    caught = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: caught.append(context["exception"]))
        loop.call_later(1, lambda: 1 / 0)
        await asyncio.sleep(5)
        return now()

    assert run_virtual(main()) == 5
    assert [type(error) for error in caught] == [ZeroDivisionError]


def test_the_clock_waits_for_threads_and_takes_results_in_the_order_submitted():
    order = []

    def work(index, seconds):
        time.sleep(seconds)
        return index, threading.get_ident()

    async def submit(index):
        result = await asyncio.get_running_loop().run_in_executor(None, work, index, 0.05 / (index + 1))
        order.append((now(), result[0]))
        return result[1]

    async def main():
        ticker = asyncio.create_task(asyncio.sleep(1e-9))
        threads = await asyncio.gather(*(submit(index) for index in range(4)))
        await ticker
        return threads

    assert threading.get_ident() not in run_virtual(main(), num_threads=4)
    assert order == [(0.0, 0), (0.0, 1), (0.0, 2), (0.0, 3)]


def test_what_a_thread_raises_reaches_who_waits():
    async def main():
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        job = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)
        job.cancel()
        await asyncio.sleep(3)
        return now()

    assert run_virtual(main()) == 3


def test_async_generators_are_finished():
    closed = []

    async def numbers():
        try:
            while True:
                yield now()
                await asyncio.sleep(1)
        finally:
            closed.append(now())

    async def main():
        async for at in numbers():
            if at >= 3:
                break

    run_virtual(main())
    assert closed == [3.0]


def test_the_loop_refuses_to_be_used_wrongly():
    loop = VirtualLoop()

    async def nested():
        other = VirtualLoop()
        with pytest.raises(RuntimeError, match="Another event loop"):
            other.run_forever()
        with pytest.raises(RuntimeError, match="running already"):
            loop.run_forever()
        with pytest.raises(RuntimeError, match="cannot be closed"):
            loop.close()

    loop.run_until_complete(nested())
    future = loop.create_future()
    loop.call_later(1, loop.stop)
    with pytest.raises(RuntimeError, match="stopped before"):
        loop.run_until_complete(future)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_forever()
