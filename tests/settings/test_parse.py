from __future__ import annotations

import pytest

from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.settings import parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8091", TcpAddress("127.0.0.1", 8091)),
        ("0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("[::1]:443", TcpAddress("::1", 443)),
        ("[0:0::1]:443", TcpAddress("::1", 443)),
        ("localhost:80", TcpAddress("localhost", 80)),
        ("backend_app.internal:80", TcpAddress("backend_app.internal", 80)),
        ("unix:/run/mesh.sock", UnixAddress("/run/mesh.sock")),
        ("off", None),
    ],
)
def test_listen_reads_every_form(text: str, address: object) -> None:
    assert parse.listen(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "8091", "localhost", ":80", "host:", "host:65536", "host:-1", "host:+1", "host:8 0",
        "host:٨٠", "::1:443", "[::1]", "[::g]:1", "256.0.0.1:80", "1.2.3:80", "-a:80", "a..b:80",
        "a b:80", f"{'a' * 64}:80", f"{'a.' * 127}a:80", "unix:", "unix:relative", "unix:/",
        f"unix:/{'p' * 107}", "unix:/a\nb", "OFF", "http://host:80", "host:1234567890",
    ],
)  # fmt: skip
def test_listen_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse.listen(text)


def test_a_unix_path_may_be_as_long_as_a_socket_address_holds() -> None:
    path = "/" + "p" * 106
    assert parse.unix(f"unix:{path}") == UnixAddress(path)


@pytest.mark.parametrize("text", ["app:8080", "http://app:8080", "http://app:8080/"])
def test_backend_takes_a_host_and_a_url(text: str) -> None:
    assert parse.backend(text) == TcpAddress("app", 8080)


def test_backend_takes_a_unix_socket() -> None:
    assert parse.backend("unix:/run/app.sock") == UnixAddress("/run/app.sock")


@pytest.mark.parametrize("text", ["app", "app:0", "https://app:1", "http://app", "http://a:1/x"])
def test_backend_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse.backend(text)


def test_http_base_wants_a_scheme() -> None:
    assert parse.http_base("http://[::1]:8090") == TcpAddress("::1", 8090)
    with pytest.raises(ValueError):
        parse.http_base("localhost:8090")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("24h", 86400), ("7", 7), ("0.5", 0.5)],
)
def test_durations_are_read_in_seconds(text: str, seconds: float) -> None:
    assert parse.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1s", "1 s", "1d", "s", "1e3", "nan", "inf", ".5", "1S"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse.duration_or_none(text)


@pytest.mark.parametrize("text", ["0", "0s", "0.0ms", "0.000001ms"])
def test_zero_is_a_duration_only_where_it_means_none(text: str) -> None:
    assert parse.duration_or_none(text) == 0
    with pytest.raises(ValueError):
        parse.duration(text)


@pytest.mark.parametrize("text", ["0", "250ms", "30s", "90s", "5m", "24h", "0.5ms", "1500ms"])
def test_a_shown_duration_reads_the_same(text: str) -> None:
    seconds = parse.duration_or_none(text)
    assert parse.duration_or_none(parse.show_duration(seconds)) == seconds


def test_durations_are_shown_in_the_largest_whole_unit() -> None:
    shown = [parse.show_duration(seconds) for seconds in (0, 0.25, 90, 300, 86400)]
    assert shown == ["0", "250ms", "90s", "5m", "24h"]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "1_000", "9999999999"])
def test_count_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse.count(text)


def test_count_reads_whole_numbers() -> None:
    assert parse.count("10000") == 10000


@pytest.mark.parametrize("text", ["", "a\nb", "a\0b", "\udc80"])
def test_path_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse.path(text)


def test_path_is_kept_as_written() -> None:
    assert parse.path("certs/ä b.pem") == "certs/ä b.pem"


@pytest.mark.parametrize("text", ["unix:/run/a.sock", "http://[::1]:1", "http://h:80"])
def test_a_shown_base_reads_the_same(text: str) -> None:
    assert parse.show_base(parse.http_base(text)) == text


def test_listen_on_takes_what_listen_takes_but_off() -> None:
    assert parse.listen_on("127.0.0.1:0") == TcpAddress("127.0.0.1", 0)
    assert parse.listen_on("unix:/a.sock") == UnixAddress("/a.sock")
    with pytest.raises(ValueError):
        parse.listen_on("off")


@pytest.mark.parametrize("text", ["_", "example.com", "*.example.com", "a.b c.d *.e", "10.0.0.1"])
def test_server_names(text: str) -> None:
    assert parse.server_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a  b",
        "a ",
        "a;",
        "a\nb",
        "a\tb",
        "~^x",
        "*",
        "*.",
        "$host",
        '"a"',
        "a{",
        "ä",
        ".a",
    ],
)
def test_what_is_no_server_name(text: str) -> None:
    with pytest.raises(ValueError):
        parse.server_name(text)
