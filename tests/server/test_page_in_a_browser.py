"""The page in a real headless Chromium, if QUIRE_BROWSER_TESTS=1."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading

import httpx
import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("QUIRE_BROWSER_TESTS") != "1",
    reason="QUIRE_BROWSER_TESTS=1 installs Debian's Chromium and Selenium, which needs root, and runs them",
)


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def installed():
    """Chromium with its driver, and Selenium."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        run("apt-get", "update")
        run("apt-get", "install", "--yes", "--no-install-recommends", "chromium", "chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        run(sys.executable, "-m", "pip", "install", "--quiet", "selenium")
        importlib.invalidate_caches()


@pytest.fixture
def browser(installed):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(browser, condition, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def of(browser, selector):
    return browser.find_elements("css selector", selector)


def ask(browser, text):
    browser.find_element("id", "text").send_keys(text)
    browser.find_element("id", "send").click()


def test_a_chat_with_everything(browser, server, tmp_path):
    browser.get(server)
    until(browser, lambda: "quire-tiny" in browser.find_element("id", "model").text)
    ask(browser, "What is 27+45?")
    until(browser, lambda: browser.find_element("id", "speed").text)
    assert [turn.text for turn in of(browser, ".turn")] == ["What is 27+45?", "72"]
    browser.find_element("id", "thinking").click()
    ask(browser, "What is 31+14?")
    until(browser, lambda: len(of(browser, ".assistant")) == 2 and browser.find_element("id", "send").is_displayed())
    (thought,) = of(browser, "details")
    assert thought.get_attribute("open") is None
    assert of(browser, ".assistant")[1].text.endswith("45")
    others = [
        threading.Thread(
            target=httpx.post,
            args=(f"{server}/v1/completions",),
            kwargs={"json": {"prompt": f"{i} and on", "max_tokens": 700, "ignore_eos": True}, "timeout": 60},
        )
        for i in range(6)
    ]
    for other in others:
        other.start()
    until(browser, lambda: int(browser.find_element("id", "running").text) >= 3)
    coloured = """
        const c = document.getElementById("grid"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let n = 0;
        for (let i = 0; i < d.length; i += 4) n += d[i] !== d[i + 1];
        return n;
    """
    until(browser, lambda: browser.execute_script(coloured) > 500)
    until(browser, lambda: int(browser.find_element("id", "rate").text) > 0)
    until(browser, lambda: len(of(browser, "#queue li")) >= 6)
    assert "running: " in of(browser, "#queue li")[0].text
    assert browser.execute_script(coloured.replace('"grid"', '"steps"')) > 50
    browser.execute_script("document.querySelector('aside').scrollTop = 0")
    browser.save_screenshot(os.environ.get("QUIRE_SCREENSHOT", str(tmp_path / "page.png")))
    for other in others:
        other.join()
    found = [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"]
    assert [entry for entry in found if "favicon" not in entry["message"]] == []


def test_stop_and_errors(browser, server):
    browser.get(server)
    browser.find_element("id", "max_tokens").send_keys("99999999")
    ask(browser, "hello")
    until(browser, lambda: of(browser, ".error"))
    assert "maximum context length" in of(browser, ".error")[0].text
    browser.find_element("id", "clear").click()
    assert of(browser, ".turn") == []


def test_the_description_of_the_api(browser, server):
    browser.get(f"{server}/docs")
    until(browser, lambda: len(of(browser, "section")) > 10)
    assert "post /v1/chat/completions" in [heading.text.lower() for heading in of(browser, "h2")]
    assert any("temperature" in cell.text for cell in of(browser, "td"))
