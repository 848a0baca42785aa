"""The targets by name, each with the modules of the mesh that it is about."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "fuzz" / "corpus"
WORK = ROOT / "build" / "fuzz"
FINDINGS = WORK / "findings"

_HEADS = ("wire.take_apart", "wire.usual", "wire.fields", "wire.framing")
_REQUESTS = ("wire.request_line", "wire.request", *_HEADS)
_RESPONSES = ("wire.response", "wire.translate", *_HEADS)
_RELAY = ("relay.downstream", "relay.exchange", "relay.upstream", "wire.body", "wire.translate")


@dataclass(frozen=True)
class Target:
    """One module of this package: its `run` is given bytes, and raises where a promise is broken.

    Its `SEEDS` are inputs to begin with.
    """

    name: str
    about: tuple[str, ...]
    """Modules below `dstack_mesh` that are instrumented, and whose coverage is told."""
    max_length: int = 4096
    """Of an input, in bytes."""

    def load(self) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
        """Import the target's module; give its `run` and its `SEEDS`."""
        module = importlib.import_module(f"fuzz.{self.name}")
        return module.run, module.SEEDS

    def committed(self) -> list[Path]:
        """Give the files of the corpus, in a fixed order."""
        return _files(CORPUS / self.name)

    def found(self) -> list[Path]:
        """Give what earlier runs added on this machine."""
        return _files(WORK / self.name)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_file())


TARGETS = {
    target.name: target
    for target in (
        Target("request_head", _REQUESTS, 20_000),
        Target("take_apart", ("wire.take_apart", "wire.fields"), 2048),
        Target("response_head", (*_RESPONSES, "wire.body")),
        Target("request_body", ("wire.body", "wire.fields"), 2048),
        Target("response_body", ("wire.body", "wire.fields", "wire.translate"), 2048),
        Target("certificate_extension", ("identity.extension",), 1024),
        Target("certificate_chain", ("identity.chain", "identity.leaf", "identity.extension"), 256),
        Target("escaped_pem", ("identity.escaped_pem",), 2048),
        Target("target", ("outbound.target", "gateway_domain"), 1024),
        Target("gateway_domain", ("gateway_domain",), 512),
        Target("outbound_proxy", (*_RELAY, "outbound.proxy", "outbound.connect"), 1024),
        Target("inbound_proxy", (*_RELAY, "inbound.terminator"), 1024),
    )
}
