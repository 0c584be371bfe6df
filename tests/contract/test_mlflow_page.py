"""MLflow's page, in a headless Chromium, on what `track` has logged: two runs beside each other."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from contract import config
from contract.tracking import track

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=2000,1500"
)
SETTINGS = {"small": {"train.lr": "0.003", "loss.bpr": "0.5"}, "large": {"train.lr": "0.001", "loss.bpr": "0.5"}}
SECONDS = 240  # for the server to start or the page to show something, on a machine that is busy


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(tracking URI, {name: run id}) of two trainings that differ in one setting, with curves and a report each."""
    folder = tmp_path_factory.mktemp("store")
    file, uri, ids = folder / "c.toml", f"sqlite:///{folder / 'mlflow.db'}", {}
    file.write_text(f'[tracking]\nuri = "{uri}"\nsystem_every = 0\n')
    for name, settings in SETTINGS.items():
        one = config.load(str(file), settings | {"name": name, "work": str(folder / "work")})
        with track(one, "train") as run:
            for step in range(20, 101, 20):
                run.metrics({"train/loss": 3 - step * one.train.lr, "valid/recall@10": step * one.train.lr / 10}, step)
            report = folder / "report.html"
            report.write_text(f"<html><body><h1>What {name} learned</h1></body></html>")
            run.artifact(report)
            ids[name] = run.run_id
    return uri, ids


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    """The address of `make mlflow` on the store."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "mlflow", "ui", "--backend-store-uri", store[0], "--workers", "1", "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=stream, stderr=subprocess.STDOUT)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    try:
        while not answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"mlflow ui did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(SECONDS)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address).close()
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")]
    if None in programs:
        pytest.fail("this test needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def comparison(browser, server, store):
    """The browser on the page that compares the two runs."""
    ids = list(store[1].values())
    browser.get("about:blank")  # else only the fragment changes, and the page keeps its state
    browser.get(f'{server}/#/compare-runs?runs=["{ids[0]}","{ids[1]}"]&experiments=["1"]')
    found(browser, "//*[@artifact-name='report.html']")  # what it shows last
    return browser


def found(browser, path: str) -> list:
    """The elements of an XPath, once there are some."""
    try:
        return WebDriverWait(browser, SECONDS).until(lambda driver: driver.find_elements(By.XPATH, path))
    except TimeoutException:
        pytest.fail(f"nothing at {path} of the page:\n{text(browser)}")


def text(browser) -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def test_settings_that_differ_are_shown_alone(comparison):
    (switch,) = found(comparison, "//button[@aria-label='Parameters - Show diff only']")
    assert re.search(r"^cf\.dim 64 64$", text(comparison), re.M)
    switch.click()
    WebDriverWait(comparison, SECONDS).until(lambda driver: "cf.dim" not in text(driver))
    shown = text(comparison).partition("Show diff only\n")[2].partition("\nMetrics\n")[0].splitlines()
    assert shown == ["name small large", "train.lr 0.003 0.001"]


def test_a_metric_leads_to_the_curves_of_both_runs(comparison):
    found(comparison, "//a[text()='train/loss']")[0].click()
    found(comparison, "//*[text()='small/train (train/loss)']")
    page = text(comparison)
    assert re.search(r"^Step$", page.partition("Download data")[2], re.M)  # the axis
    assert "large/train (train/loss)" in page
    assert re.search(r"large/train 2\.9 \(step=100\) 2\.9 \(step=100\) 2\.98 \(step=20\)", page)


def test_reports_are_shown_beside_each_other(comparison):
    found(comparison, "//*[@artifact-name='report.html']")[0].click()
    found(comparison, "(//iframe)[2]")
    titles = []
    for frame in comparison.find_elements(By.TAG_NAME, "iframe"):
        comparison.switch_to.frame(frame)
        titles.append(found(comparison, "//h1")[0].text)
        comparison.switch_to.default_content()
    assert titles == ["What small learned", "What large learned"]


def test_the_page_of_a_run_shows_its_report(browser, server, store):
    browser.get("about:blank")
    browser.get(f"{server}/#/experiments/1/runs/{store[1]['large']}/artifacts/report.html")
    browser.switch_to.frame(found(browser, "//iframe")[0])
    assert found(browser, "//h1")[0].text == "What large learned"
