"""A server of a really trained model: under load, and its page in a real browser."""

import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets

from benchmarks.serve_load import server
from raytrain2p.data.reading import read_records
from raytrain2p.inference.predictor import Predictor

ROOT = Path(__file__).parents[2]
CHROMIUM = Path("/usr/bin/chromium")
QUESTION = "What does the picture show?"
ELEMENT = "document.getElementById('{}')"
DROP = """
(() => {
  const bytes = Uint8Array.from(atob("%s"), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "drawing.png", { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
})()
"""


@pytest.mark.timeout(1800)
def test_200_clients_lose_no_answer_and_crash_nothing(quickstart_model: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serve_load", str(quickstart_model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    for figures in result["servers"]:
        assert figures["lost"] == figures["malformed_with_another_answer"] == 0
        assert figures["memory_mb"]["at_most"] < 2 * figures["memory_mb"]["at_first"]
    assert result["answers_per_second_ratio"] > 1


class Browser:
    """A page of Chromium, through its DevTools protocol. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, connection: Any) -> None:
        self.connection, self.count, self.events = connection, 0, list[dict[str, Any]]()

    async def call(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        await self.connection.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while (message := json.loads(await self.connection.recv())).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    async def value(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> Any:
        async with asyncio.timeout(seconds):
            while not (value := await self.value(expression)):
                await asyncio.sleep(0.05)
        return value


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Within, a headless Chromium; yields the address of its DevTools."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen([CHROMIUM, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield next(found[1] for line in process.stderr if (found := re.search(r"DevTools listening on (ws://\S+)", line)))
    finally:
        process.terminate()
        process.wait(20)


async def drive(devtools: str, address: str, image: bytes, token: str, screenshot: Path) -> tuple[str, set[str], list[Any]]:
    """Drop an image on the page, ask, and read the answer. Returns it, the texts that were seen on the way, and what went wrong."""
    async with websockets.connect(devtools, max_size=None) as connection:
        browser = Browser(connection)
        target = (await browser.call("Target.createTarget", url="about:blank"))["targetId"]
    async with websockets.connect(f"{devtools.partition('/devtools')[0]}/devtools/page/{target}", max_size=None) as connection:
        browser = Browser(connection)
        await browser.call("Runtime.enable")
        await browser.call("Log.enable")
        await browser.call("Emulation.setDeviceMetricsOverride", width=760, height=470, deviceScaleFactor=2, mobile=False)
        await browser.call("Page.navigate", url=address)
        await browser.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        await browser.until("!document.getElementById('locked').hidden")
        await browser.value(f"{ELEMENT.format('question')}.value = {json.dumps(QUESTION)}")
        await browser.value(f"{ELEMENT.format('ask')}.click()")
        await browser.until(f"{ELEMENT.format('answer')}.classList.contains('error')")
        assert "token" in await browser.value(f"{ELEMENT.format('answer')}.textContent")
        await browser.value(f"{ELEMENT.format('token')}.value = {json.dumps(token)}")
        await browser.value(f"{ELEMENT.format('token')}.dispatchEvent(new Event('change'))")
        await browser.until(f"{ELEMENT.format('model')}.textContent")
        await browser.value(DROP % base64.b64encode(image).decode())
        await browser.until(f"!{ELEMENT.format('image')}.hidden && {ELEMENT.format('image')}.naturalWidth")
        await browser.value(f"{ELEMENT.format('token')}.parentNode.hidden = true")
        await browser.value(
            f"window.seen = new Set(); new MutationObserver(() => seen.add({ELEMENT.format('answer')}.textContent))"
            f".observe({ELEMENT.format('answer')}, {{ childList: true }})"
        )
        errors = [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
        await browser.value(f"{ELEMENT.format('ask')}.click()")
        await browser.until(f"/tokens/.test({ELEMENT.format('note')}.textContent)")
        answer = await browser.value(f"{ELEMENT.format('answer')}.textContent")
        seen = set(await browser.value("[...seen]"))
        picture = (await browser.call("Page.captureScreenshot", format="png"))["data"]
        screenshot.write_bytes(base64.b64decode(picture))
        errors += [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
        errors += [event for event in browser.events if "Content Security Policy" in json.dumps(event)]
        return answer, seen, errors


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium in /usr/bin")
def test_a_person_drops_an_image_on_the_page_and_reads_the_answer(
    quickstart_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = next(one for one in read_records("emoji:test_drawing", 2) if one.question == QUESTION)
    (image,) = record.media()
    (expected,) = Predictor(quickstart_model, device="cpu").answers([record], 1, 256)
    token = "typed into the page".replace(" ", "-")
    monkeypatch.setenv("RAYTRAIN2P_SERVE_TOKEN", token)
    with server(str(quickstart_model)) as (_, port), chromium(tmp_path / "profile") as devtools:
        address, screenshot = f"http://127.0.0.1:{port}/", tmp_path / "serve.png"
        answer, seen, errors = asyncio.run(drive(devtools, address, image.read(), token, screenshot))
    assert errors == []
    assert answer == expected
    assert len(seen) > 2, "the answer is read while it is written"
    assert screenshot.stat().st_size > 10_000
