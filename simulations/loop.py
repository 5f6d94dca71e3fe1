"""An asyncio event loop whose clock is virtual: coroutines wait for simulated time, which waits for nobody.

The order in which things happen is defined, so two runs are equal: by time, at equal times deliveries before timers
(a message beats its own timeout), then in the order in which they were planned. One event is taken at a time, and all
callbacks that it makes ready run before the next. `asyncio.all_tasks`, `asyncio.wait` and a TaskGroup's cancellation go
through sets, whose order is not defined: do nothing there that depends on order.

    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    run_virtual(main())    # 3600.0, at once
"""
import asyncio
import logging
import math
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakSet

from fedcore.errors import NothingCanHappen
from fedcore.simulations.clock import Entry, EventHeap

logger = logging.getLogger("fedcore")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
DELIVERY, TIMER = 0, 1
# So many waiting tasks are named when nothing can happen any more.
MOST_NAMED_TASKS = 5


def run_virtual(main: Coroutine[Any, Any, T], num_threads: int | None = None) -> T:
    """Run a coroutine on a virtual loop of its own, and return its result.

    Args:
        num_threads: threads of the default executor; None: as many as there are cores.

    Raises:
        NothingCanHappen: every task waits, and nothing is under way that could wake one.
    """
    with asyncio.Runner(loop_factory=lambda: make_loop(num_threads)) as runner:
        return runner.run(main)


def make_loop(num_threads: int | None = None) -> "VirtualLoop":
    """Return a new virtual loop."""
    # The base class is abstract in sockets, subprocesses and signals too, which have no place in virtual time.
    return VirtualLoop(num_threads)  # type: ignore[abstract]


async def sleep_until(at: float) -> None:
    """Wait for a moment of the loop's clock. Equal steps from a fixed start do not drift, as repeated sleeps do."""
    loop = asyncio.get_running_loop()
    if at <= loop.time():
        await asyncio.sleep(0)
        return
    woken: asyncio.Future[None] = loop.create_future()
    handle = loop.call_at(at, _wake, woken)
    try:
        await woken
    finally:
        handle.cancel()


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)


class VirtualTimer(asyncio.TimerHandle):
    """A planned callback that knows its place in the heap."""

    __slots__ = ("entry",)
    entry: Entry


class VirtualLoop(asyncio.AbstractEventLoop):
    """Time moves to the next planned event as soon as nothing is left to do now.

    Work given to an executor takes no virtual time: the clock waits for it, and results are taken in the order in which
    the work was submitted, however long each takes. There are no sockets, subprocesses or signals here.

    Args:
        num_threads: threads of the default executor; None: as many as there are cores.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.heap = EventHeap()
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._jobs: deque[tuple[Future[Any], asyncio.Future[Any]]] = deque()
        self._num_threads, self._executor = num_threads, None
        self._running = self._stopping = self._closed = False
        self._failure: BaseException | None = None
        self._handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = None
        self._task_factory: Any = None
        self._generators: WeakSet[AsyncGenerator[Any, Any]] = WeakSet()

    _executor: Executor | None

    # ---- planning -----------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    # Appending to a deque is atomic. When a thread's callback comes is up to the thread: for reproducible runs hand
    # work to `run_in_executor`, whose results are joined in order.
    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> VirtualTimer:
        return self._plan(self._now + delay, callback, args, context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> VirtualTimer:
        return self._plan(when, callback, args, context)

    def deliver_at(self, when: float, tie: int, callback: Callable[[*Ts], object], *args: *Ts) -> Entry:
        """Plan the arrival of a message: before all timers of that moment, and among arrivals by `tie`.

        It is lighter than a timer: the callback runs in the loop's own context. `heap.cancel` takes it back.
        """
        if not when < math.inf:
            return self._never(when)
        return self.heap.push(when, DELIVERY, tie, (callback, args))

    def _never(self, when: float) -> Entry:
        """Return an entry that is in no heap: what is planned for the end of time must not hide a deadlock."""
        if math.isnan(when):
            raise ValueError("the time of an event is not a number")
        return Entry(when, None, cancelled=True)

    def _plan(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> VirtualTimer:
        timer = VirtualTimer(when, callback, args, self, context)
        timer.entry = self.heap.push(when, TIMER, 0, timer) if when < math.inf else self._never(when)
        return timer

    def _timer_handle_cancelled(self, handle: VirtualTimer) -> None:
        """asyncio calls this when a timer is cancelled."""
        self.heap.cancel(handle.entry)

    # ---- running ------------------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Run until `stop`.

        Raises:
            NothingCanHappen: every task waits, and nothing is under way that could wake one.
        """
        if self._closed or self._running:
            raise RuntimeError("The loop is closed." if self._closed else "The loop is running already.")
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("Another event loop is running in this thread.")
        hooks = sys.get_asyncgen_hooks()
        self._running = True
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=self._finish_generator)
        asyncio._set_running_loop(self)
        try:
            while not self._stopping:
                self._drain()
                if not self._stopping and not self._ready:
                    self._next_moment()
                    self._raise_failure()
        finally:
            self._running = self._stopping = False
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _drain(self) -> None:
        """Run what is ready, and what that makes ready."""
        ready = self._ready
        while ready and not self._stopping:
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
            if self._failure is not None:
                self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _next_moment(self) -> None:
        """Take the result of the oldest job, or move the clock to the next event."""
        if self._jobs:
            job, result = self._jobs.popleft()
            _settle(job, result)
        elif self.heap.next_at() is not None:
            entry = self.heap.pop()
            self._now = max(self._now, entry.at)
            item = entry.item
            if type(item) is tuple:    # a delivery
                self._deliver(*item)
            else:
                item._run()
        else:
            raise NothingCanHappen(self._deadlock())

    def _deliver(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            callback(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # as asyncio's own handles do
            self.call_exception_handler({"message": f"Exception in {callback!r}", "exception": error})

    def _deadlock(self) -> str:
        waiting = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        places = []
        for task in waiting[:MOST_NAMED_TASKS]:
            frames = task.get_stack()
            where = f" ({frames[-1].f_code.co_filename}:{frames[-1].f_lineno})" if frames else ""
            places.append(f"{task.get_name()}{where}")
        more = f" and {len(waiting) - len(places)} more" if len(waiting) > len(places) else ""
        return f"At {self._now:g} s all coroutines wait and nothing is under way: {', '.join(places)}{more}."

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run until a future is done, and return its result."""
        made_here = not asyncio.isfuture(future)
        task: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        task.add_done_callback(self._stop_when_done)
        try:
            self.run_forever()
        except BaseException:
            if made_here and task.done() and not task.cancelled():
                task.exception()    # it is being raised already: asyncio need not complain that nobody looked at it
            raise
        finally:
            task.remove_done_callback(self._stop_when_done)
        if not task.done():
            raise RuntimeError("The event loop was stopped before the future was done.")
        return task.result()

    def _stop_when_done(self, _: "asyncio.Future[Any]") -> None:
        self.stop()

    def stop(self) -> None:
        """Let `run_forever` return after the present callback."""
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Forget everything that was planned."""
        if self._running:
            raise RuntimeError("A running loop cannot be closed.")
        self._closed = True
        self._ready.clear()
        self._jobs.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    # ---- tasks, futures, executors ------------------------------------------------------------------------------

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **kwargs: Any) -> "asyncio.Task[Any]":
        if self._task_factory is not None:
            made: asyncio.Task[Any] = self._task_factory(self, coro, **kwargs)
            return made
        return asyncio.Task(coro, loop=self, **kwargs)

    def set_task_factory(self, factory: Any) -> None:
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        return self._task_factory

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        """Compute in another thread (or process) while the clock stands still."""
        if executor is None:
            self._executor = self._executor or ThreadPoolExecutor(self._num_threads)
            executor = self._executor
        result: asyncio.Future[T] = self.create_future()
        self._jobs.append((executor.submit(func, *args), result))
        return result

    def set_default_executor(self, executor: Executor) -> None:
        self._executor = executor

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    def _finish_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators.discard(generator)
        if not self._closed:
            self.create_task(generator.aclose())

    async def shutdown_asyncgens(self) -> None:
        for generator in list(self._generators):
            await generator.aclose()
        self._generators.clear()

    # ---- errors -------------------------------------------------------------------------------------------------

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """Accepted and ignored: slow callbacks, which debugging would report, are normal here."""

    def set_exception_handler(self, handler: Any) -> None:
        self._handler = handler

    def get_exception_handler(self) -> Any:
        return self._handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Hand on what went wrong where nobody waits for it; without a handler the run ends with that exception."""
        if self._handler is not None:
            self._handler(self, context)
        else:
            self.default_exception_handler(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        failure = context.get("exception")
        if self._running and self._failure is None and failure is not None:
            self._failure = failure
        else:
            logger.error("%s", context.get("message"), exc_info=failure)


def _settle(job: "Future[Any]", result: "asyncio.Future[Any]") -> None:
    """Wait for a job and hand on what became of it."""
    if result.cancelled():
        job.cancel()
        return
    try:
        value = job.result()
    except BaseException as error:  # whatever the job raised is for whoever awaits it
        result.set_exception(error)
    else:
        result.set_result(value)
