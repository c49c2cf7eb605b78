"""Signals wait for the end of a step, and are handed on to whoever listened before."""

import os
import signal
from collections.abc import Iterator

import pytest

from trigger_opt import interrupts
from trigger_opt.interrupts import Interrupted


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in interrupts.SIGNALS}
    yield
    assert {s: signal.getsignal(s) for s in interrupts.SIGNALS} == before


@pytest.mark.parametrize("signum", interrupts.SIGNALS)
def test_outside_a_search_a_signal_ends_the_run_at_once(signum: int) -> None:
    with pytest.raises(Interrupted) as caught, interrupts.listening():
        send(signum)
    assert caught.value.signum == signum
    assert isinstance(caught.value, KeyboardInterrupt), "what cleans up after Ctrl-C cleans up after all of them"


@pytest.mark.parametrize("signum", interrupts.SIGNALS)
def test_inside_it_waits_for_check(signum: int, capsys: pytest.CaptureFixture[str]) -> None:
    with interrupts.listening():
        with interrupts.deferred():
            send(signum)
            assert interrupts.asked()
            with pytest.raises(Interrupted) as caught:
                interrupts.check()
        assert not interrupts.asked()
    assert caught.value.signum == signum
    assert f"{signal.Signals(signum).name}: stops after this step" in capsys.readouterr().err


def test_what_waits_is_raised_at_the_end_at_last() -> None:
    with interrupts.listening():
        with pytest.raises(Interrupted), interrupts.deferred():
            send(signal.SIGUSR1)
        interrupts.check()
        assert not interrupts.asked()


def test_second_ctrl_c_does_not_wait() -> None:
    with interrupts.listening(), interrupts.deferred():
        send(signal.SIGINT)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
        # The first one's wish is granted, too.
        with pytest.raises(Interrupted):
            interrupts.check()


def test_first_of_several_signals_counts() -> None:
    with interrupts.listening(), interrupts.deferred():
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
    assert caught.value.signum == signal.SIGUSR2


def test_some_only_make_it_save_more_often(capsys: pytest.CaptureFixture[str]) -> None:
    with interrupts.listening(only_hurry=[signal.SIGTERM]):
        assert not interrupts.asked()
        with interrupts.deferred():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            interrupts.check()
        send(signal.SIGTERM)
        assert interrupts.asked()
    assert capsys.readouterr().err == "SIGTERM: goes on, and a search saves after every step from now on\n"
    with interrupts.listening():
        assert not interrupts.asked(), "a later run starts anew"


def test_one_that_comes_again_later_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with interrupts.listening(only_hurry=[signal.SIGTERM], patience=5.0):
        send(signal.SIGTERM)
        now[0] = 4.9
        send(signal.SIGTERM)
        now[0] = 5.0
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_handlers_of_before_are_told_and_come_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))
    other = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with interrupts.listening() as handlers:
            handlers[signal.SIGUSR2](signal.SIGUSR2, None)
            assert handlers[signal.SIGUSR1] == signal.SIG_DFL
        send(signal.SIGUSR2)
        assert heard == [signal.SIGUSR2, signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGUSR1, other)
