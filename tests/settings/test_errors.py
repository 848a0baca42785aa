from __future__ import annotations

from dstack_mesh.settings.errors import one_line, shown


def test_a_value_is_quoted_on_one_line() -> None:
    assert shown('a\n"b"') == '"a\\n\\"b\\""'
    assert shown(True) == "True"


def test_a_long_value_is_shortened() -> None:
    assert shown("x" * 100) == '"' + "x" * 77 + '..."'


def test_a_key_that_was_given_for_a_path_is_not_shown() -> None:
    assert shown("-----BEGIN PRIVATE KEY-----\nMIG") == "[redacted]"
    assert shown(["-----BEGIN EC PRIVATE KEY-----"]) == "[redacted]"


def test_one_line_escapes_only_what_breaks_it() -> None:
    assert one_line("mësh.toml") == "mësh.toml"
    assert one_line("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
