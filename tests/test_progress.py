"""Progress: what a log and a terminal show, time left, and that model text cannot reach the terminal raw."""

import io
import sys

import pytest
from rich.console import Console

from trigger_opt.progress import LINE_EVERY, Progress, printable, say, stage_progress

EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]x[/] \x9b31m\r\nverdict: clean\u202e\u2028\ud800 :smile:"


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log_console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80), file


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    # _environ: the colours of this machine must not decide the test.
    return Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"}), file


def left_after(progress: Progress, clock: Clock, *, seconds: float, done: int) -> float | None:
    clock.now += seconds
    progress.update(done)
    return progress.snapshot().seconds_left


def test_log_lines_are_plain_and_say_what_matters() -> None:
    console, file = log_console()
    clock = Clock()
    with stage_progress("search", total=60, unit="step", console=console, clock=clock) as p:
        clock.now += 20
        p.update(15, best="open sesame", score=3.214, evaluations=9000)
    started, line, finished = file.getvalue().splitlines()
    assert started == "search: started, 0/60 step"
    assert line == 'search: 15/60 step, 1 min 00 s left, 3.21 nats, 450 evaluations/s, best "open sesame"'
    assert finished.startswith("search: finished after 20 s, 15/60 step, 3.21 nats")
    assert "\x1b" not in file.getvalue()


def test_log_lines_come_at_a_sensible_pace() -> None:
    console, file = log_console()
    clock = Clock()
    with stage_progress("search", total=1000, unit="step", console=console, clock=clock) as p:
        for step in range(1000):
            clock.now += 0.1
            p.update(step)
    between = len(file.getvalue().splitlines()) - 2
    assert 100 / LINE_EVERY - 2 <= between <= 100 / LINE_EVERY


def test_lines_in_a_log_are_flushed_and_never_wrapped() -> None:
    class Flushes(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = Flushes()
    with stage_progress("search", console=Console(file=file, width=20)) as p:
        p.note("word " * 30)
        assert file.flushed.splitlines()[1] == "search: " + "word " * 30


def test_terminal_shows_everything_on_one_line() -> None:
    console, file = terminal()
    clock = Clock()
    with stage_progress("search", total=60, unit="step", seconds=200.0, console=console, clock=clock) as p:
        clock.now += 20
        p.update(15, best=" a\tb ", score=3.214, evaluations=9000)
        drawn = file.getvalue().split("\r\x1b[2K")[-1]
        for shown in ("search", "15/60 step", '" a\\tb "', "3.21 nats", "450 evaluations/s", "1 min 00 s left", "━"):
            assert shown in drawn
        assert "\n" not in drawn


def test_terminal_cuts_a_long_best_string_to_the_width() -> None:
    console, file = terminal()
    with stage_progress("search", total=2, console=console, clock=(clock := Clock())) as p:
        clock.now += 1
        p.update(1, best="x" * 500, score=1.0)
    assert "…" in file.getvalue()
    assert "x" * 100 not in file.getvalue()


@pytest.mark.parametrize("width", [1, 10, 40])
def test_a_narrow_terminal_is_survived(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"})
    with stage_progress("search", total=2, console=console, clock=(clock := Clock())) as p:
        clock.now += 1
        p.update(1, best="\x1b[2J wide 漢字", score=1.0, evaluations=10)


def test_a_dumb_terminal_gets_lines() -> None:
    file = io.StringIO()
    with stage_progress("search", console=Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})):
        pass
    assert "\x1b" not in file.getvalue()
    assert "search: started" in file.getvalue()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_terminal_is_in_order_after_an_interruption(error: type[BaseException]) -> None:
    console, file = terminal()
    stderr = sys.stderr
    with pytest.raises(error), stage_progress("search", total=3, console=console):
        raise error
    text = file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor back
    assert text.rstrip().endswith("\x1b[?25h")
    assert sys.stderr is stderr


def test_a_log_says_that_a_stage_was_interrupted() -> None:
    console, file = log_console()
    with pytest.raises(KeyboardInterrupt), stage_progress("search", total=3, unit="step", console=console):
        raise KeyboardInterrupt
    assert "search: interrupted after 0 s, 0/3 step" in file.getvalue()


def test_model_text_cannot_reach_a_terminal_raw() -> None:
    console, file = terminal()
    with stage_progress("search", total=2, console=console, clock=(clock := Clock())) as p:
        clock.now += 1
        p.update(1, best="[bold red]x[/]\x1b[2J\x07\n", score=1.0)
        p.note(EVIL)
    text = file.getvalue()
    assert "\x1b[2J" not in text
    assert not {"\x07", "\x9b", "\u202e", "\u2028", "\ud800"} & set(text)
    assert "[bold red]x[/]\\x1b[2J\\x07\\n" in text  # markup and emoji names are text, not instructions
    assert ":smile:" in text
    assert "\nverdict: clean" not in text


def test_model_text_cannot_reach_a_log_raw() -> None:
    console, file = log_console()
    with stage_progress("search", total=1, console=console, clock=(clock := Clock())) as p:
        clock.now += LINE_EVERY
        p.update(1, best=EVIL)
        p.note(EVIL)
    assert all(c == "\n" or c.isprintable() for c in file.getvalue())
    assert all(line.startswith("search: ") for line in file.getvalue().splitlines())


def test_time_left_follows_the_count_without_a_budget() -> None:
    clock = Clock()
    with stage_progress("search", total=10, console=log_console()[0], clock=clock) as p:
        assert p.snapshot().seconds_left is None
        assert left_after(p, clock, seconds=30, done=1) == pytest.approx(270)
        assert left_after(p, clock, seconds=10, done=4) == pytest.approx(60)
        assert left_after(p, clock, seconds=0, done=10) == 0


def test_time_left_follows_whichever_ends_first() -> None:
    clock = Clock()
    with stage_progress("search", total=100, seconds=50.0, console=log_console()[0], clock=clock) as p:
        assert p.snapshot().seconds_left == 50
        assert left_after(p, clock, seconds=20, done=10) == pytest.approx(30)  # 180 s by the count
        assert left_after(p, clock, seconds=10, done=90) == pytest.approx(10 / 3)  # 20 s by the budget
        assert left_after(p, clock, seconds=100, done=95) == 0


def test_a_resumed_stage_counts_speed_and_time_from_where_it_took_up() -> None:
    clock = Clock()
    with stage_progress("search", total=100, done=50, evaluations=5000, console=log_console()[0], clock=clock) as p:
        clock.now += 10
        p.update(60, evaluations=6000)
        assert p.snapshot().seconds_left == pytest.approx(40)
        assert p.snapshot().evaluations_per_second == pytest.approx(100)


def test_best_and_score_stay_until_something_new_comes() -> None:
    with stage_progress("search", console=log_console()[0]) as p:
        p.update(1, best="a", score=2.0)
        p.update(2)
        p.update(3, score=0.0)
        assert (p.snapshot().best, p.snapshot().score, p.snapshot().done) == ("a", 0.0, 3)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (" a  b ", " a  b "),
        ("a\tb\nc\r", "a\\tb\\nc\\r"),
        ("\\n", "\\\\n"),
        ("\x1b[31m\x00\x7f\x85", "\\x1b[31m\\x00\\x7f\\x85"),
        ("\u00a0\u200b\u202e\u2028\ufeff\ud800", "\\xa0\\u200b\\u202e\\u2028\\ufeff\\ud800"),
        ("héllo 漢字 😀", "héllo 漢字 😀"),
        ("", ""),
    ],
)
def test_printable(raw: str, shown: str) -> None:
    assert printable(raw) == shown


def test_say_prints_to_stdout_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    say("first", "a\x1b[2J\nverdict: clean", printable("b\n"))
    out, err = capsys.readouterr()
    assert out == "first\na\\x1b[2J\\nverdict: clean\nb\\n\n"
    assert err == ""


def test_say_survives_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("é 漢")
    assert raw.getvalue() == b"\\xe9 \\u6f22\n"


def test_the_default_console_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress("search"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "search: started" in err
