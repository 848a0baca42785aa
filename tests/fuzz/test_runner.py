"""`python -m fuzz`: what it is asked, what it tells, and that a finding ends with status 1."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from fuzz.targets import ROOT, TARGETS, Target

from fuzz import __main__ as command
from fuzz import corpus, fuzzer

TARGET = TARGETS["gateway_domain"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is found out of the working tree."""
    monkeypatch.setattr(fuzzer, "WORK", tmp_path)
    monkeypatch.setattr(fuzzer, "FINDINGS", tmp_path / "findings")
    monkeypatch.setattr(fuzzer, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(corpus, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr("fuzz.targets.WORK", tmp_path)
    monkeypatch.setattr("fuzz.targets.CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz", *arguments])
    return command.main()


def test_executions_are_counted_and_coverage_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("atheris")
    assert run(monkeypatch, "gateway_domain", "--runs", "300", "--seed", "1") == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("│ gateway_domain"))
    assert [cell.strip() for cell in row.split("│")][2] == "300"
    assert row.split("│")[-2].strip() == "none"
    assert row.count("%)") == 2


def test_a_finding_is_kept_and_ends_with_status_1(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("atheris")
    broken = elsewhere / "broken" / "dstack_mesh"
    shutil.copytree(ROOT / "src" / "dstack_mesh", broken)
    text = (broken / "gateway_domain.py").read_text()
    (broken / "gateway_domain.py").write_text(
        text.replace("domain = text.lower()", "domain = text.swapcase()")
    )
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    assert run(monkeypatch, "gateway_domain", "--runs", "3000", "--seed", "1") == 1
    [finding] = (elsewhere / "findings").iterdir()
    assert finding.name.startswith("gateway_domain-crash-")
    said = capsys.readouterr().out
    assert f"findings/{finding.name}" in said
    assert "Uncaught Python exception" in said
    # Here, where the mesh is as it should be, the same input holds.
    assert run(monkeypatch, "gateway_domain", "--replay", str(finding)) == 0


def test_a_fuzzer_that_cannot_start_is_no_success(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "atheris.py").write_text("raise ImportError('broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    outcome = fuzzer.fuzz(TARGET, runs=10, seconds=0, seed=1)
    assert outcome.failed
    assert (outcome.executions, outcome.findings) == (0, [])


def test_replay_raises_what_the_input_finds(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "input").write_bytes(b"g.example")
    monkeypatch.setattr("dstack_mesh.gateway_domain.normalise_base_domain", lambda _: "G")
    with pytest.raises(AssertionError):
        run(monkeypatch, "gateway_domain", "--replay", str(elsewhere / "input"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nothing"], "no target nothing; there are request_head"),
        (["--replay", "file"], "--replay takes the one target"),
    ],
)
def test_wrong_usage_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    why: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_without_atheris_it_says_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(monkeypatch) == 2
    assert "CPython 3.11 to 3.13" in capsys.readouterr().err


def test_merge_keeps_the_seeds_ways_in_few_files(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = elsewhere / TARGET.name
    found.mkdir()
    (found / "new").write_bytes(b"fixed/new.example:77777")
    (found / "same").write_bytes(b"i.example")
    assert run(monkeypatch, TARGET.name, "--merge") == 0
    kept = [path.read_bytes() for path in (elsewhere / "corpus" / TARGET.name).iterdir()]
    _, seeds = TARGET.load()
    everything = corpus.arcs_of(TARGET, [*seeds, b"fixed/new.example:77777"])
    ran = corpus.arcs_of(TARGET, kept)
    assert set().union(*ran.values()) >= set().union(*everything.values())
    assert len(kept) <= len(seeds)


def test_every_target_names_modules_that_are_there() -> None:
    for target in TARGETS.values():
        assert isinstance(target, Target)
        assert len(corpus._files(target)) == len(target.about)
