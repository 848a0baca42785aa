from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.outbound.agent_calls import agent_path, exposed


@pytest.mark.parametrize(
    ("path", "call"),
    [
        # interface.md's own examples
        ("/info", "/Info"),
        ("/get_quote", "/GetQuote"),
        ("/get-quote", "/GetQuote"),
        ("/getQuote", "/GetQuote"),
        ("/GetQuote", "/GetQuote"),
        ("/prpc/get-quote", "/prpc/GetQuote"),
        # The agent's calls, in spellings that its users have
        ("/get_tls_key", "/GetTlsKey"),
        ("/GetTLSKey", "/GetTlsKey"),
        ("/GPUInfo", "/GpuInfo"),
        ("/INFO", "/Info"),
        ("/emit event", "/EmitEvent"),
        # How heck splits words
        ("/XMLHttpRequest", "/XmlHttpRequest"),
        ("/XMLHttp", "/XmlHttp"),
        ("/SHOUTY_SNAKE", "/ShoutySnake"),
        ("/MixedUP_CamelCase", "/MixedUpCamelCase"),
        ("/aBC", "/ABc"),
        ("/ABc", "/ABc"),
        ("/aB", "/AB"),
        ("/a", "/A"),
        ("/__a__b__", "/AB"),
        # Digits keep the case mode of the letter before them
        ("/FIELD_NAME11", "/FieldName11"),
        ("/FieldNamE11", "/FieldNamE11"),
        ("/99BOTTLES", "/99bottles"),
        ("/abc123def456", "/Abc123def456"),
        ("/abc123DEF456", "/Abc123Def456"),
        ("/abc123Def456", "/Abc123Def456"),
        ("/abc123DEf456", "/Abc123DEf456"),
        ("/ABC123def456", "/Abc123def456"),
        ("/ABC123DEF456", "/Abc123def456"),
        ("/ABC123Def456", "/Abc123Def456"),
        ("/ABC123DEf456", "/Abc123dEf456"),
        ("/1A2b", "/1a2b"),
        ("/1Ab", "/1ab"),
        ("/aAAb", "/AAAb"),
        ("/aA1Ab", "/AA1Ab"),
        # Only the last segment is a call's name
        ("/Get_Info/get_info", "/Get_Info/GetInfo"),
        ("//info", "//Info"),
        ("/info/", "/info/"),
        ("/", "/"),
        ("/Tappd.DeriveKey", "/TappdDeriveKey"),
        ("/..", "/"),
        # Encoded unreserved characters are those characters; what else is encoded names no call
        ("/%69nfo", "/Info"),
        ("/get%5fquote", "/GetQuote"),
        ("/get%5Fquote", "/GetQuote"),
        ("/get%2Dquote", "/GetQuote"),
        ("/info%2Fx", "/info%2Fx"),
        ("/info%00", "/info%00"),
        ("/%2569nfo", "/%2569nfo"),
        ("/%%36%39nfo", "/%%36%39nfo"),
        ("/info%", "/info%"),
        ("/infö", "/infö"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_the_last_segment_is_turned_to_pascal_case(path: str, call: str) -> None:
    assert agent_path(path.encode()) == call.encode()


@given(st.text("aAbB19_-./", max_size=12))
def test_letters_and_digits_stay_and_nothing_joins_them(text: str) -> None:
    path = f"/{text}".encode()
    folder, _, segment = path.rpartition(b"/")
    made_folder, _, made = agent_path(path).rpartition(b"/")
    assert made_folder == folder
    assert made.lower() == bytes(byte for byte in segment.lower() if chr(byte).isalnum())
    assert not made[:1].islower()


@given(st.binary() | st.text().map(lambda text: f"/{text}".encode("utf-8", "surrogatepass")))
def test_any_bytes_keep_all_before_the_last_segment(path: bytes) -> None:
    made = agent_path(path)
    assert made.count(b"/") == path.count(b"/")
    assert made.rpartition(b"/")[0] == path.rpartition(b"/")[0]


@pytest.mark.parametrize("path", ["/Info", "/Version"])
def test_info_and_version_are_exposed_as_info(path: str) -> None:
    assert exposed(path.encode(), "info")
    assert exposed(path.encode(), "all")
    assert not exposed(path.encode(), "none")


@pytest.mark.parametrize(
    "path",
    ["/GetKey", "/GetQuote", "/", "", "*", "//Info", "/Info/", "/prpc/Info", "/info", "/Inf"],
)
def test_nothing_else_is(path: str) -> None:
    assert not exposed(path.encode(), "info")
    assert not exposed(path.encode(), "none")
    assert exposed(path.encode(), "all")


def test_any_spelling_that_leads_there_is() -> None:
    assert all(exposed(agent_path(path), "info") for path in (b"/info", b"/_INFO", b"/%56ersion"))
    assert not exposed(agent_path(b"/info%2f..%2fGetKey"), "info")
    assert not exposed(agent_path(b"/GetKey/../info"), "info")
