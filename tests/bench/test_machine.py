from __future__ import annotations

import platform

from bench.machine import cpu_model, describe

from bench import tools


def test_the_processor_is_named() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\n") == "Some CPU @ 2.0GHz"
    assert cpu_model("processor\t: 0\n") == platform.machine()


def test_the_description_has_all_programs() -> None:
    found = describe()

    assert tools.PACKAGES.keys() <= found.keys()
    assert platform.release() in found["system"]
    assert found["cores"][0].isdigit()
    assert all(found.values())


def test_a_missing_program_comes_with_the_command_that_installs_it() -> None:
    text = tools.how_to_install(["h2load", "wrk"])

    assert text.startswith("h2load, wrk not found: apt-get install")
    assert "nghttp2-client wrk" in text


def test_what_is_not_there_is_missing() -> None:
    assert tools.missing(["sh", "no-such-program"]) == ["no-such-program"]
