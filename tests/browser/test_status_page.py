"""The status page in a real browser: what a person sees, with eyes, keyboard or a screen reader."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.scene import CHROMIUM, browser, refusals, scene
from tests.integration.harness import Mesh, eventually

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
    ),
    pytest.mark.timeout(120),
]

HOSTILE = "/<img/src=x/onerror=document.title=1>"


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with scene(tmp_path) as found:
        yield found


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as found:
        yield found


class Seen:
    """A page that is open, and what its browser complained of or asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        page.on("console", lambda said: self._note(said.type, said.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda asked: self.asked.add(asked.url))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    async def text(self, selector: str) -> str:
        return await self.page.inner_text(selector)

    async def until(self, condition: str) -> None:
        # From here: what Playwright would wait with inside the page, its policy does not allow.
        async with asyncio.timeout(20):
            while True:
                if await self.page.evaluate(condition):
                    return
                await asyncio.sleep(0.05)

    async def until_updated(self) -> None:
        """Wait for the second answer from now on: what it shows was asked for after this call."""
        await self.page.evaluate("window.seenAnswers = 0")
        await self.page.evaluate(
            "new MutationObserver(() => { window.seenAnswers += 1; })"
            ".observe(document.getElementById('updated'), {childList: true})"
        )
        await self.until("window.seenAnswers >= 2")


async def see(chromium: Browser, one: Mesh, **options: str) -> Seen:
    seen = Seen(await chromium.new_page(**options))  # type: ignore[arg-type]
    await seen.page.goto(f"http://{one.admin('billing')}/")
    await seen.until("document.body.dataset.state !== 'loading'")
    return seen


async def test_it_answers_an_operators_questions(one: Mesh, chromium: Browser) -> None:
    shop, billing = one.app_id("shop"), one.app_id("billing")
    seen = await see(chromium, one)
    for _ in range(3):
        assert (await one.call("shop", "billing")).status == 200
    assert (await one.call("billing", "shop")).status == 200
    assert (await one.call("intruder", "billing", "POST", HOSTILE + "?token=x")).status == 403
    await refusals(one)
    await eventually(lambda: len(one.sidecars["billing"].journal.incidents()) >= 6)
    await seen.until_updated()

    # Is my mesh healthy, who am I, when does my certificate renew?
    assert await seen.text("#verdict") == "Healthy"
    assert await seen.text("#app-id") == billing
    # At two thirds of a day, less a tenth of that at most by jitter.
    assert re.match(r"Renews in 1[45] h", await seen.text("#renews"))
    assert "✓" in await seen.text("#checks")
    # Whom do I talk to, and who talks to me?
    assert f"{shop[:8]}…" in await seen.text("#targets")
    assert "tls_failed" in await seen.text("#targets")
    callers = await seen.text("#callers")
    assert [f"{one.app_id(name)[:8]}…" in callers for name in ("shop", "intruder", "ledger")] == [
        True,
        True,
        False,
    ]
    # What was refused, and why?
    incidents = await seen.text("#incidents")
    for said in ("policy_denied", "client_cert_required", "handshake_failed", "bad_target"):
        assert said in incidents
    assert "is not among the apps that may call this one" in incidents
    assert f"POST {HOSTILE}" in incidents, "what a stranger sent is text"
    assert "token" not in incidents
    assert await seen.page.locator("#incidents img").count() == 0

    await seen.until_updated()
    assert seen.complaints == []
    origin = f"http://{one.admin('billing')}/"
    assert {url for url in seen.asked if not url.startswith("data:")} == {origin, f"{origin}status"}


async def test_nothing_that_is_not_the_pages_own_runs(one: Mesh, chromium: Browser) -> None:
    seen = await see(chromium, one)
    await seen.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = document.createElement("img");
            image.setAttribute("onerror", "window.ran = true");
            image.src = "http://127.0.0.1:9/x";
            document.body.append(image);
        }"""
    )
    await seen.until_updated()
    assert await seen.page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in text for text in seen.complaints)


async def test_a_keyboard_and_a_screen_reader_get_about(one: Mesh, chromium: Browser) -> None:
    await one.call("shop", "billing")
    await refusals(one)
    seen = await see(chromium, one)
    page = seen.page
    await seen.until_updated()
    for role in ("banner", "main", "contentinfo"):
        assert await page.get_by_role(role).count() == 1  # type: ignore[arg-type]
    for name in ("Identity", "Targets", "Callers", "Refused and failed"):
        assert await page.get_by_role("region", name=name).count() >= 1
    headers = await page.get_by_role("columnheader").all_inner_texts()
    assert {"App", "Requests", "Code", "Reason"} <= set(headers)
    assert await page.get_by_role("rowheader").count() >= 5
    charts = await page.locator("svg.chart").all()
    assert all([await chart.get_attribute("aria-label") for chart in charts])

    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await page.locator(f"#callers button[title='{one.app_id('shop')}']").focus()
    for _ in range(3):  # which makes it the busiest: its row moves up
        await one.call("shop", "billing")
    await seen.until_updated()
    assert await page.locator("#callers button").first.get_attribute("title") == one.app_id("shop")
    label = await page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == f"Copy app-id {one.app_id('shop')}", "the refresh does not take the focus away"
    await page.keyboard.press("Shift+Tab")
    outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus can be seen"
    await page.locator("#pause").press("Enter")
    assert await page.get_attribute("#pause", "aria-pressed") == "true"
    before = await seen.text("#updated")
    await page.wait_for_timeout(2500)
    assert await seen.text("#updated") == before


async def test_a_mesh_that_goes_away_and_comes_back(one: Mesh, chromium: Browser) -> None:
    seen = await see(chromium, one)
    admin = str(one.admin("billing"))
    await one.sidecars["billing"].stop()
    await seen.until("document.body.dataset.state === 'away'")
    assert await seen.text("#verdict") == "No answer"
    assert "has given no answer since" in await seen.text("#away")
    assert await seen.page.get_by_role("alert").count() == 1
    assert (await seen.text("#announce")).startswith("No answer")
    assert await seen.text("#app-id") == one.app_id("billing"), "what was known stays"
    await one.start("billing", MESH_ADMIN_LISTEN=admin, MESH_BACKEND="127.0.0.1:9")
    await seen.until("document.body.dataset.state === 'warn'")
    assert await seen.text("#verdict") == "Ready, but the backend is not"
    assert not await seen.page.is_visible("#away")


async def test_a_mesh_without_an_identity_says_so(one: Mesh, chromium: Browser) -> None:
    await one.app("ledger").agent.aclose()
    await one.start_closed("ledger", MESH_ADMIN_LISTEN="127.0.0.1:0")
    await eventually(lambda: one.sidecars["ledger"].identity.failed > 0)
    seen = Seen(await chromium.new_page())
    await seen.page.goto(f"http://{one.admin('ledger')}/")
    await seen.until("document.body.dataset.state === 'bad'")
    assert await seen.text("#verdict") == "Not ready"
    assert "identity:" in await seen.text("#verdict-reason")
    assert await seen.text("#no-app-id") == "no certificate yet"
    assert seen.complaints == []


async def test_dark_and_light(one: Mesh, chromium: Browser) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        seen = await see(chromium, one, color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        ground = await seen.page.evaluate(f"{style}.backgroundColor")
        text = await seen.page.evaluate(f"{style}.color")
        assert ground != text
        grounds.append(ground)
    assert grounds[0] != grounds[1]


async def test_a_narrow_window_has_no_sideways_scroll(one: Mesh, chromium: Browser) -> None:
    await refusals(one)
    seen = await see(chromium, one)
    for width in (1280, 768, 400):
        await seen.page.set_viewport_size({"width": width, "height": 800})
        await seen.until_updated()
        over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await seen.page.evaluate(over) <= 0, width


async def test_a_web_site_whose_name_leads_here_reads_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as one, browser("--host-resolver-rules=MAP * 127.0.0.1") as evil:
        page = await evil.new_page()
        port = one.admin("billing").port
        for path in ("/", "/status"):
            response = await page.goto(f"http://evil.example:{port}{path}")
            assert response is not None
            assert response.status == 421
            assert one.app_id("billing") not in await response.text()
