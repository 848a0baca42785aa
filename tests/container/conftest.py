from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.container.docker import ADDRESSES, EXAMPLE, IMAGE, Stack, build_images, need_docker


@pytest.fixture(scope="session")
def image() -> str:
    """The image, built from this work tree."""
    need_docker()
    build_images()
    return IMAGE


@pytest.fixture(scope="session", params=["embedded", "nginx"])
def stack(image: str, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The example as its readers start it, in each inbound mode; one for all tests in turn."""
    one = Stack(f"mesh-test-{request.param}", request.param, files=(EXAMPLE, ADDRESSES))
    one.down()  # of a run that was killed
    try:
        one.up()
        yield one
    finally:
        one.down()
