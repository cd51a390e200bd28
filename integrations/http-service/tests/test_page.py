"""The page in a real Chromium: by mouse, by keyboard, on a narrow screen, with a token."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "" if importlib.util.find_spec("playwright") else "playwright is not installed"
MISSING = MISSING or ("" if CHROMIUM else "no chromium is installed")
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]
PICTURES = os.environ.get("AMOEBA_PICTURES", "")  # a directory for what the page looks like
WIDE, NARROW = {"width": 1200, "height": 800}, {"width": 360, "height": 740}
SLOW = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SLOW)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab that fails on errors of scripts, and on anything that it asks of another host."""
    context = browser.new_context(viewport=WIDE)
    found, wrong = context.new_page(), []
    found.set_default_timeout(SLOW)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on(
        "request",
        lambda request: (
            wrong.append(request.url)
            if "127.0.0.1" not in request.url and not request.url.startswith("data:")
            else None
        ),
    )
    yield found
    context.close()
    assert wrong == []


def pictured(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def met(page: Any, words: str) -> None:
    page.locator("#model", has_text=words).wait_for()


def answered(page: Any, count: int) -> Any:
    from playwright.sync_api import expect

    expect(page.locator(".answer")).to_have_count(count, timeout=SLOW)
    expect(page.locator(".running")).to_have_count(0, timeout=SLOW)
    return page.locator(".answer").nth(count - 1)


def test_a_question_is_answered_with_what_it_got_beside_it(server: Any, page: Any):
    page.goto(server.url)
    met(page, "9 shapes")
    page.fill("#most", "8")
    page.fill("#question", "What is <b>it</b>?")
    page.click("#send")
    answer = answered(page, 1)
    assert page.locator(".question").inner_text() == "What is <b>it</b>?"  # a text, no markup
    got = answer.locator(".got").inner_text()
    assert answer.locator(".got dd").first.inner_text() == "4x1"
    assert "tokens kept" in got
    assert got.count(" ms") == 4  # promised and measured
    assert answer.locator(".prompt summary").inner_text() == "The prompt, nothing left out"
    page.locator("#target").fill("70")
    assert "70 % of the whole model's time" in page.locator("#means").inner_text()
    page.fill("#question", "And now?")
    page.click("#send")
    second = answered(page, 2)
    assert second.locator(".got dd").first.inner_text() != "4x1"
    pictured(page, "wide")
    assert answer.bounding_box()["width"] > 600
    text, beside = second.locator(".text").bounding_box(), second.locator(".got").bounding_box()
    assert beside["x"] >= text["x"] + text["width"]  # beside it


def test_all_of_it_is_reached_by_the_keyboard_on_a_narrow_screen(server: Any, page: Any):
    page.set_viewport_size(NARROW)
    page.goto(server.url)
    met(page, "shapes")
    reached = []
    for _ in range(9):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert reached[:6] == ["question", "target", "effort", "most", "send", "clear"]
    page.focus("#target")
    page.keyboard.press("Home")
    assert "10 % of the whole model's time" in page.locator("#means").inner_text()
    assert "no shape is so fast" in page.locator("#means").inner_text()
    page.focus("#most")
    page.keyboard.press("Control+A")
    page.keyboard.type("6")
    page.focus("#question")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answer = answered(page, 1)
    assert page.locator(".question").inner_text() == "One\ntwo"
    assert "below its target" in answer.locator(".got").inner_text()
    pictured(page, "narrow")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    text, below = answer.locator(".text").bounding_box(), answer.locator(".got").bounding_box()
    assert below["y"] >= text["y"] + text["height"] - 1  # below it


def test_an_answer_is_stopped_and_a_chat_begun_anew(server: Any, page: Any):
    page.goto(server.url)
    met(page, "shapes")
    page.fill("#most", "400")
    page.fill("#question", "What is it?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .got dd")
    page.keyboard.press("Escape")
    answer = answered(page, 1)
    assert "stopped" in answer.inner_text()
    server.until(lambda: server.figure("amoeba_queue_requests") == 0)
    page.click("#clear")
    assert page.locator(".answer").count() == 0


def test_what_was_left_out_is_grey_and_a_token_is_asked_for(strict: Any, page: Any):
    page.goto(strict.url)
    page.wait_for_selector("#locked:not([hidden])")
    assert "AMOEBA_SERVE_TOKEN" in page.locator("#model").inner_text()
    page.fill("#token", strict.token)
    page.keyboard.press("Tab")
    met(page, "9 shapes")
    page.locator("summary").first.click()
    page.fill("#context", "The moon \U0001f319 is an old stone.")
    page.fill("#most", "6")
    page.fill("#question", "What is it?")
    page.keyboard.press("Enter")
    answer = answered(page, 1)
    prompt = answer.locator(".prompt p").first
    gone = prompt.locator("del").all_inner_texts()
    assert gone
    assert answer.locator(".prompt summary").inner_text().endswith("tokens left out")
    assert prompt.inner_text() == "system: The moon \U0001f319 is an old stone."  # every character once
    assert answer.locator(".prompt p").nth(1).locator("del").count() == 0  # the question
    colours = [
        page.evaluate("e => getComputedStyle(e).color", each.element_handle())
        for each in (prompt, prompt.locator("del").first)
    ]
    assert colours[0] != colours[1]
    pictured(page, "dropped")


def test_where_there_is_no_chat_template_earlier_turns_are_context(strict: Any, page: Any):
    def without_chats(route: Any) -> None:
        told = route.fetch()
        models = told.json()
        for each in models.get("data", []):
            each["amoeba"]["chat"] = False
        route.fulfill(response=told, json=models)

    page.route("**/v1/models", without_chats)
    page.goto(strict.url)
    page.wait_for_selector("#locked:not([hidden])")
    page.fill("#token", strict.token)
    page.keyboard.press("Tab")
    met(page, "9 shapes")
    page.fill("#most", "4")
    for count, question in enumerate(("Red is", "A stone is"), start=1):
        page.fill("#question", question)
        page.keyboard.press("Enter")
        answer = answered(page, count)
    context, prompt = (each.inner_text() for each in answer.locator(".prompt p").all())
    assert context.startswith("context: Red is")
    assert prompt == "prompt: A stone is"
    assert answer.locator(".prompt p").first.locator("del").count() > 0
    assert answer.locator(".prompt p").nth(1).locator("del").count() == 0
