"""Ctrl-C raises where it is allowed, once, and nowhere else."""

import os
import signal
import threading

import pytest

from hybrid.chat.interrupts import InterruptGuard


def test_outside_an_allowed_block_an_interrupt_does_not_raise():
    with InterruptGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        assert guard.pressed


def test_inside_an_allowed_block_only_the_first_raises():
    cleaned_up = False
    with InterruptGuard() as guard:
        with pytest.raises(KeyboardInterrupt), guard.allowed():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned_up = True
        assert guard.pressed
    assert cleaned_up


def test_a_chat_that_does_not_come_back_is_ended_by_one_more(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with InterruptGuard() as guard:
        with pytest.raises(KeyboardInterrupt), guard.allowed():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert codes == []
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]
        with guard.allowed():
            pass
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]


def test_a_swallowed_interrupt_is_still_seen_and_the_next_block_starts_afresh():
    with InterruptGuard() as guard:
        with guard.allowed():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert guard.pressed
        with guard.allowed():
            assert not guard.pressed
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_the_handler_before_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), InterruptGuard():
        assert signal.getsignal(signal.SIGINT) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_on_another_thread_it_changes_nothing():
    seen = []

    def enter():
        with InterruptGuard() as guard, guard.allowed():
            seen.append(guard.pressed)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) == before
