"""Credentials from the guest agent and from files, and what is said where there are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography import x509
from tests.identity.conftest import CERTS, Issued, Kms

from dstack_mesh.identity import extension
from dstack_mesh.identity.source import AgentSource, FileSource, SourceError

NOW = 1_700_000_000.9


class FakeAgent:
    """Answers with what it was made with, or fails with it."""

    def __init__(self, key: str, chain: list[str], failure: SourceError | None = None) -> None:
        self.key, self.chain, self.failure = key, chain, failure
        self.asked: list[tuple[str, int]] = []

    async def get_tls_key(self, *, subject: str, not_after: int) -> tuple[str, list[str]]:
        self.asked.append((subject, not_after))
        if self.failure is not None:
            raise self.failure
        return self.key, self.chain


def agent_of(issued: Issued) -> FakeAgent:
    return FakeAgent(issued.key_pem.decode(), [pem.decode() for pem in issued.chain_pem])


def agent_of_vector(name: str) -> FakeAgent:
    return FakeAgent("key", [(CERTS / f"{name}.chain.pem").read_text()])


async def test_the_agent_is_asked_for_the_lifetime_and_gives_chain_and_root(kms: Kms) -> None:
    leaf = kms.leaf()
    agent = agent_of(leaf)
    source = AgentSource(agent, 3600.0, description="guest agent X", clock=lambda: NOW)
    credentials = await source.fetch()
    assert agent.asked == [("dstack-mesh", 1_700_003_600)]
    assert credentials == leaf.credentials
    assert source.description == "guest agent X"


async def test_the_subject_can_be_chosen(kms: Kms) -> None:
    agent = agent_of(kms.leaf())
    await AgentSource(agent, 3600.0, "mesh of billing").fetch()
    assert agent.asked[0][0] == "mesh of billing"


@pytest.mark.parametrize("name", ["leaf-a", "leaf-a-appinfo", "leaf-b"])
async def test_a_chain_in_one_text_is_read_too(name: str) -> None:
    credentials = await AgentSource(agent_of_vector(name), 60.0).fetch()
    assert len(credentials.chain_pem) == 3
    assert credentials.root_pem == (CERTS / "kms1-root.pem").read_bytes()


@pytest.mark.parametrize("name", ["leaf-local-provider", "leaf-noappid"])
async def test_a_machine_without_app_id_is_told_why_in_these_words(name: str) -> None:
    with pytest.raises(SourceError) as error:
        await AgentSource(agent_of_vector(name), 60.0).fetch()
    assert error.value.detail.startswith(
        "this machine's keys come from a local key provider: its certificate carries no app-id, "
        "so it can't be a member of a mesh."
    )
    assert "KMS" in error.value.detail


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([], "no certificate in it"),
        (["nonsense"], "no certificate in it"),
        (
            ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"],
            "leaf cannot be parsed",
        ),
    ],
)
async def test_an_agents_nonsense_is_told(chain: list[str], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        await AgentSource(FakeAgent("key", chain), 60.0).fetch()


async def test_a_leaf_alone_is_told(kms: Kms) -> None:
    agent = agent_of(kms.leaf())
    agent.chain = agent.chain[:1]
    with pytest.raises(SourceError, match="its leaf alone"):
        await AgentSource(agent, 60.0).fetch()


async def test_a_malformed_app_id_is_not_taken_for_a_local_key_provider(kms: Kms) -> None:
    odd = x509.UnrecognizedExtension(extension.OID_APP_ID, b"\x04\x00")
    with pytest.raises(SourceError, match="leaf: the app-id extension holds 0 bytes"):
        await AgentSource(agent_of(kms.leaf(extensions=[odd])), 60.0).fetch()


async def test_the_agents_failure_goes_through() -> None:
    failure = SourceError("guest agent unix:/x: no answer")
    with pytest.raises(SourceError) as error:
        await AgentSource(FakeAgent("", [], failure), 60.0).fetch()
    assert error.value is failure


def write(folder: Path, issued: Issued, *, with_root: bool = True) -> FileSource:
    chain = issued.chain_pem if with_root else issued.chain_pem[:-1]
    (folder / "cert.pem").write_bytes(b"".join(chain))
    (folder / "key.pem").write_bytes(issued.key_pem)
    (folder / "ca.pem").write_bytes(b"# the KMS\n" + issued.chain_pem[-1])
    return FileSource(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")


@pytest.mark.parametrize("with_root", [True, False])
async def test_files_are_read(kms: Kms, tmp_path: Path, with_root: bool) -> None:
    leaf = kms.leaf()
    source = write(tmp_path, leaf, with_root=with_root)
    credentials = await source.fetch()
    assert credentials.chain_pem == (leaf.chain_pem if with_root else leaf.chain_pem[:-1])
    assert (credentials.key_pem, credentials.root_pem) == (leaf.key_pem, leaf.chain_pem[-1])
    assert all(name in source.description for name in ("cert.pem", "key.pem", "ca.pem"))


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
async def test_a_missing_file_is_named(kms: Kms, tmp_path: Path, name: str) -> None:
    source = write(tmp_path, kms.leaf())
    (tmp_path / name).unlink()
    with pytest.raises(SourceError, match=f"cannot read .*{name}: No such file"):
        await source.fetch()


async def test_what_is_not_a_file_is_named(kms: Kms, tmp_path: Path) -> None:
    source = write(tmp_path, kms.leaf())
    (tmp_path / "key.pem").unlink()
    os.mkfifo(tmp_path / "key.pem")  # reading it would wait for a writer for ever
    with pytest.raises(SourceError, match=r"key\.pem is not a file"):
        await source.fetch()


async def test_a_huge_file_is_named(kms: Kms, tmp_path: Path) -> None:
    source = write(tmp_path, kms.leaf())
    with (tmp_path / "cert.pem").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(SourceError, match=r"cert\.pem is over 1048576 bytes"):
        await source.fetch()


async def test_a_file_without_certificate_is_named(kms: Kms, tmp_path: Path) -> None:
    source = write(tmp_path, kms.leaf())
    (tmp_path / "cert.pem").write_bytes(kms.leaf().key_pem)
    with pytest.raises(SourceError, match=r"cert\.pem has no PEM certificate"):
        await source.fetch()


@pytest.mark.parametrize("count", [0, 2])
async def test_the_ca_file_holds_one_root(kms: Kms, tmp_path: Path, count: int) -> None:
    source = write(tmp_path, kms.leaf())
    (tmp_path / "ca.pem").write_bytes(kms.root.chain_pem[0] * count)
    with pytest.raises(SourceError, match=rf"ca\.pem has {count} PEM cert.* expected one"):
        await source.fetch()


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
async def test_every_kind_of_change_is_seen(kms: Kms, tmp_path: Path, name: str) -> None:
    source = write(tmp_path, kms.leaf())
    assert source.changed(), "never read yet"
    await source.fetch()
    assert not source.changed()

    path, other = tmp_path / name, tmp_path / "other"
    stat = path.stat()
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)  # the same size and time, another file
    assert source.changed()
    await source.fetch()
    assert not source.changed()

    path.write_bytes(path.read_bytes() + b"\n")
    assert source.changed()
    await source.fetch()

    path.unlink()
    assert source.changed()
    with pytest.raises(SourceError):
        await source.fetch()
    assert not source.changed(), "still the same: missing"


async def test_a_change_while_reading_is_seen_afterwards(
    kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, kms.leaf())
    from dstack_mesh.identity import source as module

    def read_and_replace(path: Path) -> bytes:
        content = path.read_bytes()
        if path.name == "key.pem":
            path.write_bytes(content + b"\n")
        return content

    monkeypatch.setattr(module, "_read", read_and_replace)
    await source.fetch()
    assert source.changed()
