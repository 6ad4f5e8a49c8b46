"""`Stepper`: the thread that steps a scheduler, and how it and its callers hear of each other.

Threads: callers put what they want done into a queue that the thread looks into between two halves of a round; it waits
there, using no CPU, when nothing runs. What it finds goes to each caller's event loop in one call for all that wait
there. Only the thread touches the scheduler, the runner and the pool. A caller whose loop was closed is given up.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter

from hybrid.serving.answer import Answer, Ended, Event
from hybrid.serving.request import EngineStoppedError
from hybrid.serving.scheduler import Scheduler


class Mailbox:
    """Where the events of one answer arrive, on the event loop that it was made on."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """On its loop only."""
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event. Raises what ended the answer, if it was an error."""
        event = await self._events.get()
        if isinstance(event, Ended) and event.error is not None:
            raise event.error
        return event


class Stepper:
    """A thread around `scheduler`; `rest` is called on it when nothing runs, and at its end."""

    def __init__(self, scheduler: Scheduler, rest: Callable[[], None]) -> None:
        self.failure: BaseException | None = None
        self._scheduler, self._rest = scheduler, rest
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mailboxes: dict[Answer, Mailbox] = {}
        self._on_failure: list[Callable[[BaseException], None]] = []
        self._lock = threading.Lock()  # over the last two, and whether more is taken
        self._closing: float | None = None  # when what still runs is cancelled
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="hybrid-steps", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer, mailbox: Mailbox) -> None:
        """Have it answered. Raises `EngineStoppedError` where no more is taken."""
        with self._lock:
            self.check()
            self._mailboxes[answer] = mailbox
        self._commands.put(lambda: self._add(answer))

    def check(self) -> None:
        """Raise `EngineStoppedError` where no more is taken."""
        if self._ended or self._closing is not None:
            raise _stopped(self.failure)

    def cancel(self, answer: Answer) -> None:
        """Give an answer up; nothing where it has ended."""
        if self._mailboxes.get(answer) is not None:
            self._commands.put(lambda: self._give_up([answer]))

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        """Call `call` with what ended the thread, if an exception does; on that thread, or at once where it has."""
        with self._lock:
            if self.failure is None:
                self._on_failure.append(call)
                return
        call(self.failure)

    def stop(self, grace: float) -> None:
        """Take no more; finish what runs within `grace` seconds, then cancel it, and end."""
        with self._lock:
            until = perf_counter() + grace
            self._closing = until if self._closing is None else min(until, self._closing)
        self._commands.put(lambda: None)

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._goes_on():
                self._hand_out(self._scheduler.decode())
                self._take_commands()
                self._hand_out(self._scheduler.read())
            self._rest()
        except BaseException as error:  # noqa: BLE001 - whatever it is, all who wait must hear of it
            self.failure = error
        self._end()

    def _goes_on(self) -> bool:
        """Take commands, waiting for one where nothing runs; False once it is time to end."""
        self._take_commands()
        while not self._scheduler.busy and self._closing is None:
            self._rest()
            self._commands.get()()
            self._take_commands()
        return self._closing is None or (self._scheduler.busy and perf_counter() < self._closing)

    def _take_commands(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _add(self, answer: Answer) -> None:
        if answer not in self._mailboxes:
            return  # given up meanwhile
        try:
            self._scheduler.add(answer)
        except Exception as error:  # noqa: BLE001 - the caller's
            self._hand_out([Ended(answer, error)])

    def _give_up(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._mailboxes.pop(answer, None)
            self._scheduler.cancel(answer)

    def _hand_out(self, events: Sequence[Event]) -> None:
        """Each to its caller's loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Event]]] = {}
        for event in events:
            last = isinstance(event, Ended) or event.finish is not None
            take = self._mailboxes.pop if last else self._mailboxes.get
            mailbox = take(event.answer, None)
            if mailbox is not None:
                by_loop.setdefault(mailbox.loop, []).append((mailbox, event))
        for loop, found in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, found)
            except RuntimeError:  # the loop was closed
                self._give_up([event.answer for _, event in found])

    def _end(self) -> None:
        """Tell all that wait, and those who asked to hear of a failure."""
        with self._lock:
            self._ended = True
            left, calls = list(self._mailboxes), list(self._on_failure)
        self._hand_out([Ended(answer, _stopped(self.failure)) for answer in left])
        if self.failure is None:
            self._give_up(self._scheduler.answers())
            return
        for call in calls:
            call(self.failure)


def _deliver(found: Sequence[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in found:
        mailbox.put(event)


def _stopped(failure: BaseException | None) -> EngineStoppedError:
    if failure is None:
        return EngineStoppedError("the engine was closed; it answers no more")
    error = EngineStoppedError(f"the engine failed and answers no more: {type(failure).__name__}: {failure}")
    error.__cause__ = failure
    return error
