from __future__ import annotations

import io

import pytest
from rich.console import Console

from dstack_mesh.demo.play import PARTS, suggestions
from dstack_mesh.demo.table import TableDisplay
from tests.demo.fakes import FakeStage, result

ACTS = [act for acts in PARTS.values() for act in acts]
WIDTHS = [20, 40, 63, 64, 80, 99, 100, 120, 400]


def shown(width: int, *, failing: str = "", keep: bool = False, terminal: bool = False) -> str:
    """Give what is written for a whole demo in which the act `failing` fails."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, highlight=False, force_terminal=terminal, color_system=None
    )
    stage = FakeStage()
    with TableDisplay(console) as display:
        display.begin(stage)
        for act in ACTS:
            display.playing(act)
            bad = act.name == failing
            display.played(result(act, ok=not bad, happened="0 of 7" if bad else "200 as asked"))
        display.end(1.26)
        if keep:
            display.keep(stage)
    return out.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    assert max(map(len, shown(width).splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_everything_is_there_at_each_width(width: int) -> None:
    text = " ".join(shown(width).split())
    for part in PARTS:
        assert part in text
    assert text.count("✓") == len(ACTS)
    assert text.count("200 as asked") == len(ACTS)
    assert f"All {len(ACTS)} went as they should, in 1.3 s." in text
    assert "aaaaaaaa…aaaa" in text


def test_what_is_expected_stands_between_act_and_outcome_where_there_is_room() -> None:
    lines = [line for line in shown(120).splitlines() if "shop calls billing" in line]
    assert lines[0].split("  ")[1].strip() == "✓"
    act, expected, happened = (lines[0].find(t) for t in ("shop", "200, and", "200 as asked"))
    assert 0 < act < expected < happened


def test_failure_is_marked_and_counted() -> None:
    text = shown(120, failing="impostor")
    (line,) = [line for line in text.splitlines() if "✗" in line]
    assert "502 peer_untrusted: the handshake" in line
    assert "0 of 7" in line
    assert f"1 of {len(ACTS)} did not go as they should" in text


def test_lines_to_try_are_never_broken() -> None:
    lines = shown(40, keep=True).splitlines()
    for what, line in suggestions(FakeStage()):
        assert line in lines
        assert f"# {what}" in lines


def test_terminal_is_told_what_is_tried_now_and_left_as_it_was() -> None:
    text = shown(80, terminal=True)
    assert "starting a KMS" in text
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h"), "the cursor is hidden, then shown"
    assert shown(80).count("\x1b") == 0


def test_cursor_comes_back_after_an_error() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with pytest.raises(KeyError), TableDisplay(console):
        raise KeyError
    assert "\x1b[?25h" in out.getvalue()
