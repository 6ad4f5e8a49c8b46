"""The step thread: what callers hear, who is given up, how it rests, ends and fails. Over a fake runner."""

import asyncio
import gc
import threading
import time
import weakref

import pytest
from serving_cases import SPEC, Served, answer_alone, request

from hybrid.model.kv_cache import KVCache
from hybrid.serving.answer import Answer, Produced
from hybrid.serving.request import EngineStoppedError, QueueFullError
from hybrid.serving.stepper import Mailbox, Stepper


class Threaded:
    """A scheduler with its thread, whose steps wait for `gate` where it is closed."""

    def __init__(self, **served):
        self.served = Served(**served)
        self.runner, self.scheduler, self.pool = self.served.runner, self.served.scheduler, self.served.pool
        self.gate = threading.Event()
        self.gate.set()
        decode = self.runner.decode
        self.runner.decode = lambda rows: (self.gate.wait(5), decode(rows))[1]
        self.stepper = Stepper(self.scheduler, self.runner.rest)

    def submit(self, tokens=8, prompt=(1, 2, 3), **more):
        cache = KVCache(SPEC, self.served.capacity, self.pool)
        answer = Answer(request(prompt, tokens, **more), frozenset(), cache, self.served.clock())
        mailbox = Mailbox()
        self.stepper.submit(answer, mailbox)
        return answer, mailbox

    def end(self):
        self.stepper.stop(0.0)
        self.stepper.join()
        self.served.check_blocks()


@pytest.fixture
def threaded():
    made = Threaded()
    yield made
    made.gate.set()
    made.stepper.stop(0.0)
    made.stepper.join()


async def all_of(mailbox):
    found = [await mailbox.next()]
    while isinstance(found[-1], Produced) and not found[-1].finish:
        found.append(await mailbox.next())
    return [event.token for event in found]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came to this")


def test_each_caller_hears_of_its_own_answer_on_its_own_loop(threaded):
    async def ask(n):
        answer, mailbox = threaded.submit(prompt=(n, 2, 3))
        return answer.request, await all_of(mailbox)

    async def some(first):
        return await asyncio.gather(*(ask(n) for n in range(first, first + 3)))

    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(asyncio.run(some(n)))) for n in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(found) == 2 and all(tokens == answer_alone(one) for group in found for one, tokens in group)
    threaded.end()


def test_a_step_is_one_call_of_a_loop(threaded):
    async def main():
        loop, calls = asyncio.get_running_loop(), []
        threaded.gate.clear()
        boxes = [threaded.submit(tokens=5)[1] for _ in range(3)]
        await until(lambda: len(threaded.scheduler.running) == 1)
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), call(*args))[1]
        threaded.gate.set()
        await asyncio.gather(*map(all_of, boxes))
        assert max(len(events) for _, events in calls) == 3
        assert len(calls) <= len(threaded.runner.steps) + len(threaded.runner.pieces)

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread here")
def test_it_rests_and_uses_no_cpu_where_nothing_runs(threaded):
    async def main():
        await all_of(threaded.submit()[1])

    asyncio.run(main())
    time.sleep(0.05)
    rested, (thread,) = threaded.runner.rested, [t for t in threading.enumerate() if t is threaded.stepper._thread]
    before = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    time.sleep(0.1)
    assert time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) - before < 0.002
    assert rested == threaded.runner.rested >= 2


def test_who_goes_away_in_the_middle_leaves_nothing(threaded):
    async def main():
        threaded.gate.clear()
        answer, mailbox = threaded.submit(tokens=50)
        await mailbox.next()
        threaded.stepper.cancel(answer)
        threaded.gate.set()
        await until(lambda: not threaded.scheduler.busy)

    asyncio.run(main())
    assert threaded.scheduler.tally.cancelled == 1
    threaded.end()


def test_a_loop_that_was_closed_is_given_up(threaded):
    async def leave():
        threaded.gate.clear()
        threaded.submit(tokens=50)
        await until(lambda: threaded.scheduler.running)

    asyncio.run(leave())
    threaded.gate.set()
    asyncio.run(until(lambda: not threaded.scheduler.busy))
    assert threaded.scheduler.tally.cancelled == 1
    threaded.end()


def test_a_thousand_that_vanish():
    threaded = Threaded(blocks=64, capacity=64)

    async def one(n):
        answer, mailbox = threaded.submit(tokens=40, prompt=(n % 61, n % 7, 3))
        try:
            for _ in range(n % 3):
                await mailbox.next()
        except QueueFullError:
            return
        finally:
            threaded.stepper.cancel(answer)

    async def main():
        await asyncio.gather(*map(one, range(1000)))
        await until(lambda: not threaded.scheduler.busy)

    asyncio.run(main())
    assert not threaded.stepper._mailboxes
    threaded.end()


def test_stopping_finishes_what_runs_within_its_grace(threaded):
    async def main():
        answer, mailbox = threaded.submit()
        await mailbox.next()
        threaded.stepper.stop(30)
        with pytest.raises(EngineStoppedError, match="the engine was closed; it answers no more"):
            threaded.submit()
        assert len(await all_of(mailbox)) == 7
        await asyncio.to_thread(threaded.stepper.join)
        return answer

    asyncio.run(main())
    threaded.end()


def test_stopping_ends_the_rest_after_it(threaded):
    async def main():
        threaded.gate.clear()
        boxes = [threaded.submit(tokens=50)[1] for _ in range(2)]
        await until(lambda: threaded.scheduler.running)
        threaded.stepper.stop(0.0)
        threaded.gate.set()
        for mailbox in boxes:
            with pytest.raises(EngineStoppedError, match="was closed"):
                await all_of(mailbox)

    asyncio.run(main())
    assert threaded.stepper.failure is None and threaded.runner.rested > 0
    threaded.end()


def test_a_failure_ends_all_with_its_cause(threaded):
    def fail(rows):
        raise ZeroDivisionError("a worker stopped")

    async def main():
        heard = []
        threaded.gate.clear()
        boxes = [threaded.submit(tokens=50)[1] for _ in range(3)]
        await until(lambda: threaded.scheduler.running)
        threaded.stepper.on_failure(heard.append)
        threaded.runner.decode = fail
        threaded.gate.set()
        for mailbox in boxes:
            with pytest.raises(
                EngineStoppedError, match=r"failed and .* ZeroDivisionError: a worker stopped"
            ) as caught:
                await all_of(mailbox)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        await asyncio.to_thread(threaded.stepper.join)
        with pytest.raises(EngineStoppedError, match="a worker stopped"):
            threaded.submit()
        threaded.stepper.on_failure(heard.append)
        assert heard == [threaded.stepper.failure] * 2

    asyncio.run(main())


def test_what_has_ended_keeps_no_answer_alive(threaded):
    async def main():
        answer, mailbox = threaded.submit()
        await all_of(mailbox)
        threaded.stepper.cancel(answer)
        return weakref.ref(answer)

    answer = asyncio.run(main())
    threaded.end()
    gc.collect()
    assert answer() is None
