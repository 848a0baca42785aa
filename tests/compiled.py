"""Which tests can be run with the compiled package: `make compiled`.

A compiled class cannot be the base of one that is not, and its methods cannot be replaced. Tests
that put fakes in such places are for plain Python, and that is what they are run with.

`python -m tests.compiled` gives what to call pytest with.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "tests/tools",
    "tests/integration",
    "tests/http",
    "tests/inbound",
    "tests/outbound",
    "tests/policy",
    "tests/wire",
)
FAKES = "its fakes are of the relay's base classes"
PATCHES = "it replaces what a compiled module has by name"
NEEDS_PYTHON: dict[str, str] = {
    "tests/http/test_requests.py::test_any_pieces_give_the_same_result": FAKES,
    "tests/http/test_responses_in_memory.py": FAKES,
    "tests/http/test_rules.py::test_answers_not_mixed": FAKES,
    "tests/http/test_rules.py::test_answers_not_mixed_among_many_clients": FAKES,
    "tests/http/test_rules.py::test_answers_not_mixed_by_the_pool": FAKES,
    "tests/http/test_rules.py::test_limit_connections": FAKES,
    "tests/http/test_rules.py::test_limit_head_time": FAKES,
    "tests/http/test_rules.py::test_limit_head_time_of_a_second_request": FAKES,
    "tests/http/test_rules.py::test_limit_idle_time": FAKES,
    "tests/http/test_rules.py::test_pipelining_bounded": FAKES,
    "tests/http/test_rules.py::test_pipelining_order": FAKES,
    "tests/http/test_rules.py::test_pipelining_order_across_connections": FAKES,
    "tests/http/test_rules.py::test_pool_after_error_by_an_early_answer": FAKES,
    "tests/http/test_rules.py::test_pool_after_error_by_leaving": FAKES,
    "tests/http/test_rules.py::test_pool_after_error_in_a_body": FAKES,
    "tests/http/test_rules.py::test_refusal_closes": FAKES,
    "tests/http/test_rules.py::test_refusal_closes_behind_a_body": FAKES,
    "tests/http/test_rules.py::test_refusal_lingers": FAKES,
    "tests/http/test_rules.py::test_retry_only_idempotent": FAKES,
    "tests/http/test_rules.py::test_upgrade_accepted": FAKES,
    "tests/inbound/test_listener.py": FAKES,
    "tests/inbound/test_terminator.py": FAKES,
    "tests/outbound/test_connect.py": FAKES,
    "tests/outbound/test_proxy.py": FAKES,
    "tests/wire/test_body.py::test_the_work_for_small_chunks_grows_with_their_number_only": FAKES,
    "tests/wire/test_take_apart.py::test_python_does_it_where_there_is_none": PATCHES,
    "tests/wire/test_take_apart.py::test_the_compiled_module_is_used_where_there_is_one": PATCHES,
    "tests/wire/test_usual.py::test_heads_of_other_forms_are_for_the_long_way": PATCHES,
}
"""Files of these folders, or tests of theirs, that cannot, and why."""


def arguments() -> list[str]:
    """Give pytest's arguments: the files that can, without those of their tests that cannot."""
    found = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("test_*.py"))
    ]
    tests = [f"--deselect={name}" for name in NEEDS_PYTHON if "::" in name]
    return [*(name for name in found if name not in NEEDS_PYTHON), *tests]


if __name__ == "__main__":
    print(*arguments())  # noqa: T201 - what it is for
