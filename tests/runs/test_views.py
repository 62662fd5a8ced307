"""What the terminal shows."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fednano.errors import ConfigError
from fednano.runs import PlainView, QuietView, RunInfo, RunView, Summary, make_view
from fednano.runs.live import LiveView, sparkline
from fednano.runs.table import final_rows, print_final_table
from fednano.runs.text import format_bytes, format_count, format_percent, format_seconds, phase_title

INFO = RunInfo(
    "20260131-142501-x", Path("runs/x"), "tiny", "easy-vqa", "nano", "fisher", 2, 0, {"federated": 2}
)
Fields = Callable[[], dict[str, Any]]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(view: RunView, clock: Clock | None = None) -> None:
    """A run of two rounds; the second client's second update is refused."""

    def wait(seconds: float) -> None:
        if clock is not None:
            clock.now += seconds

    view.start(INFO)
    view.phase_started("zero-shot", 0)
    view.evaluation("zero-shot", 0, accuracy=0.698, samples=9673)
    view.phase_started("federated", 2)
    for number in (1, 2):
        view.round_started(number, ["client-0", "client-1"])
        wait(1)
        view.client_done(
            "client-0", loss=0.5 / number, samples=300, seconds=1.0, bytes={"adapter_up": 40_960}
        )
        wait(1)
        view.client_done("client-1", refused="leaf is not finite" if number == 2 else None, loss=0.4)
        view.round_done(
            number,
            loss=0.45 / number,
            seconds=2.0,
            bytes={
                "adapter_up": 81_920,
                "adapter_down": 81_920,
                "activation_up": 12_000_000,
                "activation_down": 9_000_000,
            },
        )
        view.evaluation("federated", number, accuracy=0.8 + number / 20, loss=0.3, samples=1000)
    view.message("something to know")
    view.message("be careful", "warning")


def test_plain_view_writes_a_line_for_each_event(summary_fields: Fields) -> None:
    stream, clock = io.StringIO(), Clock()
    view = PlainView(stream, clock=clock)
    play(view, clock)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 16
    assert all(re.match(r"\[ +\d:\d\d\] \S", line) for line in lines)
    text = stream.getvalue()
    assert "evaluation (Zero-shot): accuracy 69.8 %, 9,673 samples" in text
    assert "round 1/2, client client-0 done: loss 0.5000, 300 samples, 1.0 s, adapter up 41.0 kB" in text
    assert "warning: round 2, client client-1: update refused: leaf is not finite" in text
    assert "activation up 12.0 MB" in text
    assert lines[-1] == "[    0:04] warning: be careful"
    view.finish(Summary(**summary_fields()), report=Path("runs/x/report.html"))
    view.finish(error="twice")
    table = stream.getvalue().splitlines()[16:]
    assert table[0].split() == ["Accuracy,", "zero-shot", "50.0", "%"]
    assert table[-1].endswith("runs/x/report.html")
    assert "\x1b" not in stream.getvalue()


def test_plain_view_does_not_let_text_start_a_line() -> None:
    stream = io.StringIO()
    PlainView(stream).message("a\n[    0:00] round 9 merged\x1b[31m\r\u2028b", "warning")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_plain_view_on_a_stream_that_knows_ascii_only() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainView(stream).message("größer")
    assert raw.getvalue().endswith(b"gr??er\n")


def test_quiet_view_shows_warnings_and_errors_only() -> None:
    stream = io.StringIO()
    view = QuietView(stream)
    play(view)
    view.finish(error="the host is gone")
    lines = [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "warning: round 2, client client-1: update refused: leaf is not finite",
        "warning: be careful",
        "error: the host is gone",
    ]


def live(width: int = 120, **options: Any) -> tuple[LiveView, Console, io.StringIO, Clock]:
    stream, clock = Terminal(), Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=30, **options)
    return LiveView(console=console, clock=clock), console, stream, clock


def drawn(view: LiveView, width: int = 120) -> str:
    canvas = Console(file=io.StringIO(), width=width, no_color=True, record=True)
    canvas.print(view.render())
    return canvas.export_text()


def test_live_view_shows_the_state() -> None:
    view, _, stream, clock = live()
    try:
        play(view, clock)
        text = drawn(view)
        for part in (
            "20260131-142501-x",
            "tiny · easy-vqa · nano · fisher",
            "Federated",
            "round 2/2",
            "● client-0",
            "✗ client-1",
            "loss 0.2250 █▁",
            "accuracy 90.0 % ▁█ (zero-shot 69.8 %)",
            "adapters 164 kB up, 164 kB down",
            "activations 24.0 MB up, 18.0 MB down",
            "elapsed 0:04, left 0:00",
        ):
            assert part in text, part
    finally:
        view.finish()
    assert "update refused: leaf is not finite" in stream.getvalue()
    assert "Zero-shot: accuracy 69.8 %" in stream.getvalue()


def test_live_view_estimates_the_time_left() -> None:
    view, _, _, clock = live()
    view.start(INFO)
    view.phase_started("federated", 10)
    assert view.seconds_left() is None
    view.round_started(1, ["a", "b"])
    clock.now += 3
    assert view.seconds_left() is None
    view.client_done("a", loss=1.0)
    assert view.seconds_left() == pytest.approx(3 / 0.5 * 9.5)
    view.client_done("b", loss=1.0)
    view.round_done(1, loss=1.0)
    clock.now += 3
    assert view.seconds_left() == pytest.approx(6 * 9)
    view.finish()


def test_live_view_redraws_at_most_five_times_a_second() -> None:
    """Drawing is counted, not promised: a thousand events must not make a thousand frames."""
    view, _, _, _ = live()
    frames, render = 0, view.render

    def counted() -> Any:
        nonlocal frames
        frames += 1
        return render()

    view.render = counted  # type: ignore[method-assign]
    view.start(INFO)
    view.phase_started("federated", 1000)
    pause, began = threading.Event(), time.monotonic()
    for number in range(1, 101):
        view.round_started(number, ["a"])
        view.client_done("a", loss=1.0)
        view.round_done(number, loss=1.0, bytes={"adapter_up": 1})
        pause.wait(0.01)
    view.finish()
    seconds = time.monotonic() - began  # about one, more on a busy machine
    assert 2 <= frames <= 5 * seconds + 3  # the first frame, at most five a second, the last


def test_live_view_survives_threads_and_ends_once(summary_fields: Fields) -> None:
    view, _, stream, _ = live()
    view.start(INFO)
    view.phase_started("federated", 5)
    view.round_started(1, [str(k) for k in range(40)])
    threads = [
        threading.Thread(target=view.client_done, args=(str(k),), kwargs={"loss": 1.0}) for k in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "and 16 more" in drawn(view)
    view.finish(Summary(**summary_fields()), report=Path("r.html"))
    view.finish(error="twice")
    assert stream.getvalue().count("Accuracy, federated") == 1
    assert "twice" not in stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_live_view_fits_any_terminal(width: int) -> None:
    view, _, _, clock = live(width)
    play(view, clock)
    assert all(len(line) <= width for line in drawn(view, width).splitlines())
    view.finish()


def test_no_colour_is_respected(monkeypatch: pytest.MonkeyPatch, summary_fields: Fields) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for no_colour in (False, True):
        if no_colour:
            monkeypatch.setenv("NO_COLOR", "1")
        stream = Terminal()
        view = LiveView(stream)
        view.start(INFO)
        view.message("x", "error")
        view.finish(Summary(**summary_fields()))
        colours = re.findall(r"\x1b\[[\d;]*3[1-7][\d;]*m", stream.getvalue())
        assert bool(colours) is not no_colour


def test_make_view(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view(stream=Terminal()), LiveView)
    assert isinstance(make_view(stream=io.StringIO()), PlainView)
    assert isinstance(make_view("live", stream=io.StringIO()), LiveView)
    assert isinstance(make_view("plain", stream=Terminal()), PlainView)
    assert isinstance(make_view("quiet"), QuietView)
    with pytest.raises(ConfigError, match="auto, live, plain, quiet"):
        make_view("loud")


def test_final_table_says_everything(summary_fields: Fields) -> None:
    fields = summary_fields()
    fields["accuracy"] |= {"local_only": 0.4}
    summary = Summary(**fields, status="interrupted")
    rows = dict(final_rows(summary, Path("runs/x/report.html")))
    assert rows == {
        "Accuracy, zero-shot": "50.0 %",
        "Accuracy, federated": "75.0 %  (+25.0 points)",
        "Accuracy, local only": "40.0 %  (-10.0 points)",
        "Rounds": "10 with 5 clients (interrupted)",
        "Adapter, a client and round": "41.0 kB up, 41.0 kB down",
        "Activations, a sample and step": "20.0 kB up, 18.0 kB down",
        "Parameters": "2.35 M model, 900 k on the edge, 10.2 k trainable",
        "Wall time": "64 s",
        "Report": "runs/x/report.html",
    }
    stream = io.StringIO()
    print_final_table(summary, Path("/" + "x" * 300), console=Console(file=stream, width=60))
    assert "x" * 300 in stream.getvalue()  # a path stays in one piece


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (40_960, "41.0 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (2.5, "2.50 B"), (1.234e10, "12.3 GB"), (5e18, "5000 PB")],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_other_numbers() -> None:
    assert [format_count(n) for n in (0, 9_999, 10_240, 2_350_000, 7e9)] == [
        "0",
        "9,999",
        "10.2 k",
        "2.35 M",
        "7.00 G",
    ]
    assert [format_seconds(s) for s in (0, 59.4, 75.2, 3675, float("inf"), -1)] == [
        "0:00",
        "0:59",
        "1:15",
        "1:01:15",
        "-",
        "0:00",
    ]
    assert format_percent(0.93124) == "93.1 %"
    assert [phase_title(p) for p in ("local-only", "local_only", "my_own-phase")] == [
        "Local only",
        "Local only",
        "my own phase",
    ]
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline([0, 7, float("nan"), 3.5]) == "▁█▅"
