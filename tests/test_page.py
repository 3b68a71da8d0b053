"""The page in a real browser: Chromium, driven by Playwright, and the model that ships."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import uvicorn

from leapasr.audio import SAMPLE_RATE, read_audio
from leapasr.decoding import DecodingOptions
from leapasr.serving.app import build_app
from leapasr.serving.limits import Limits
from leapasr.serving.service import Service
from leapasr.subtitles import render
from leapasr.transcriber import Transcriber, load

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")

OPTIONS = DecodingOptions(draft_length="full")
SAMPLE = Path(str(importlib.resources.files("leapasr"))) / "samples" / "austen-0870.flac"
TIMEOUT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return load(device="cpu")


@pytest.fixture(scope="module")
def address(transcriber) -> Iterator[str]:
    service = Service(transcriber, name="leapasr-tiny", options=OPTIONS, batch_size=4, limits=Limits(audio_seconds=60))
    server = uvicorn.Server(uvicorn.Config(build_app(service, api_key="secret"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a network but the loopback, and with a microphone that hears the sample."""
    speech = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(speech, read_audio(SAMPLE), SAMPLE_RATE)
    flags = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={speech}%noloop",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, with the key given; whatever it loads from elsewhere, and errors of scripts, fail the test."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    requested, errors = [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((address, "blob:", "data:")) for url in requested), requested


def give_key(page) -> None:
    page.evaluate("document.getElementById('key').value = 'secret'")


def test_a_file_is_transcribed_and_explained(page, transcriber, tmp_path):
    result = transcriber.transcribe(SAMPLE, OPTIONS, word_times=True)
    give_key(page)
    page.get_by_text("Model: leapasr-tiny.").wait_for()
    page.locator("#file").set_input_files(SAMPLE)
    page.get_by_role("status").get_by_text("Done:").wait_for()
    assert " ".join(page.locator("#text").inner_text().split()) == result.text
    assert page.locator("#text .step").count() <= result.decoder_calls
    assert (
        page.locator("#saved")
        .inner_text()
        .startswith(
            f"{result.decoder_calls} decoder calls for {result.num_tokens} tokens, "
            f"{result.num_tokens - result.decoder_calls} saved"
        )
    )
    sources = page.locator("#sources td").all_inner_texts()
    assert sum(map(int, sources)) == result.num_tokens
    (segment,) = result.segments
    drafted = [record for record in segment.trace[: len(segment.tokens)] if record.source == "ctc"]
    assert page.locator("#text .source-ctc").count() == len(drafted)
    lengths = page.locator("#lengths tbody tr").all_inner_texts()
    assert sum(int(length) * int(calls) for length, calls in map(str.split, lengths)) == result.num_tokens
    for name in ("SRT", "WebVTT", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {name}").click()
        suffix = {"WebVTT": "vtt"}.get(name, name.lower())
        assert download.value.suggested_filename == f"transcript.{suffix}"
        text = Path(download.value.path()).read_text()
        if suffix == "json":
            assert json.loads(text)["text"] == result.text
        else:
            assert text == render(result, suffix, audio="")


def test_words_light_up_as_the_audio_plays(page, transcriber):
    give_key(page)
    page.locator("#file").set_input_files(SAMPLE)
    page.get_by_role("status").get_by_text("Done:").wait_for()
    for word in transcriber.transcribe(SAMPLE, OPTIONS, word_times=True).segments[0].words[::6]:
        page.evaluate("time => { document.getElementById('audio').currentTime = time }", (word.start + word.end) / 2)
        page.locator(".word.lit").get_by_text(word.text, exact=False).first.wait_for()
        assert page.locator(".word.lit").all_inner_texts() == [word.text]


def test_the_microphone_by_keyboard_alone(page):
    give_key(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "record"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop, and transcribe").wait_for()
    page.wait_for_timeout(4000)
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("Done:").wait_for()
    assert "Dashwood" in page.locator("#text").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"


def test_what_goes_wrong_is_said(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    alert = page.get_by_role("alert")
    alert.get_by_text("this server wants an API key").wait_for()
    page.get_by_label("API key of this server").fill("secret")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    alert.get_by_text("cannot be read as audio").wait_for()
    assert page.locator("#result").is_hidden()
    page.locator("#file").set_input_files(SAMPLE)
    page.get_by_role("status").get_by_text("Done:").wait_for()
    assert alert.inner_text() == ""
