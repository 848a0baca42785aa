"""The fuzz targets without the fuzzer: their corpus, some mutations, and oracles that can fail."""

from __future__ import annotations

import ast
import random

import pytest
from fuzz.targets import CORPUS, ROOT, TARGETS

from fuzz import corpus

MUTATIONS = {"certificate_chain": 100, "inbound_proxy": 100, "outbound_proxy": 100}
"""Where an execution is dear; else 300."""

EACH = pytest.mark.parametrize("name", TARGETS)


def words() -> list[bytes]:
    lines = (ROOT / "fuzz" / "http.dict").read_text().splitlines()
    return [ast.literal_eval(f"b{line}") for line in lines if line.startswith('"')]


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """Do to an input what the fuzzer does, without its sight."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(made))
        match dice.randrange(5):
            case 0:
                made[at:at] = dice.choice(words())
            case 1:
                del made[at : at + dice.randint(1, 4)]
            case 2:
                made[at : at + 1] = bytes((dice.randrange(256),))
            case 3:
                made[at:at] = bytes((dice.randrange(256),))
            case _:
                other = dice.choice(others)
                start = dice.randint(0, len(other))
                made[at:at] = other[start : start + dice.randint(1, 40)]
    return bytes(made)


@EACH
def test_the_corpus_holds(name: str) -> None:
    run, seeds = TARGETS[name].load()
    kept = [path.read_bytes() for path in TARGETS[name].committed()]
    assert kept, f"fuzz/corpus/{name} is empty"
    for data in (*seeds, *kept):
        run(data)


@EACH
def test_mutations_hold(name: str) -> None:
    run, seeds = TARGETS[name].load()
    inputs = [*seeds, *(path.read_bytes() for path in TARGETS[name].committed())]
    dice = random.Random(name)
    for _ in range(MUTATIONS.get(name, 300)):
        run(mutated(dice.choice(inputs), inputs, dice))


@EACH
def test_the_corpus_stays_small(name: str) -> None:
    paths = TARGETS[name].committed()
    assert len(paths) <= corpus.MAX_FILES
    assert sum(path.stat().st_size for path in paths) <= corpus.MAX_BYTES


def test_every_file_of_the_corpus_is_of_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
