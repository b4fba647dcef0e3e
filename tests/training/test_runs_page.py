"""The runs as a person finds them: in a real browser, on the pages of a real MLflow server."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import free_port, installing, mlflow_server

from spark_dist.evaluation.metrics import read_cases
from spark_dist.training.mlflow_client import make_client

PACKAGES = ("chromium", "chromium-driver")
PATIENCE = 300
"""Seconds that a page may take on a busy machine."""
SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 8, "--slices", "labelled")
TAUGHT = ("--teacher", "unet", "--teacher-width", 0.05, "--student-width", 0.25, "--method", "kd")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Debian's chromium, without a window."""
    log = tmp_path_factory.mktemp("browser") / "apt.log"
    with installing():
        if not shutil.which("chromedriver"):
            if os.geteuid() or not shutil.which("apt-get"):
                pytest.skip(f"no {' and '.join(PACKAGES)}; installing them takes root and apt-get")
            line = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            with open(log, "w") as output:
                failed = subprocess.run(["sh", "-c", line], env=environment, stdout=output, stderr=output).returncode
            if failed:
                pytest.skip(f"{' and '.join(PACKAGES)} can't be installed: {log.read_text()[-300:]}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=2400,1200"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def trained(jobs, tiny_store, tmp_path_factory):
    """The folder of a student alone and of one with its teacher, and the address that their jobs print."""
    folder, port = tmp_path_factory.mktemp("pages"), free_port()
    with mlflow_server(folder / "server", port):
        common = ("--dataset", tiny_store, *SMALL, "--epochs", 1, "--tracking-uri", f"http://127.0.0.1:{port}")
        alone = ("train", *common, "--network", "enet", "--width", 0.25, "--out", "alone")
        for line in (alone, ("distill", *common, *TAUGHT, "--out", "distilled")):
            codes, log = jobs(*line, folder=folder)
            assert codes == [0], log
        yield folder, re.search(r"The runs in a browser: (http\S+)", log)[1]


def wait(browser, found):
    """What a function finds on a page, once it finds something."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    patient = WebDriverWait(browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
    return patient.until(lambda _: found())


def click(browser, selector):
    """Click on the first such element, though it may still be moving, or lie below what goes away."""
    (element, *_) = wait(browser, lambda: browser.find_elements("css selector", selector))
    browser.execute_script("arguments[0].click()", element)


def row(browser, name):
    """The texts of a row of a grid, by column; a run's is called by its id, and its name stands below its colour."""
    cells = browser.find_elements("css selector", f'[row-id="{name}"] [role="gridcell"]')
    return {cell.get_attribute("col-id"): cell.text.rpartition("\n")[2] for cell in cells}


def compared(browser, metric):
    """The values of a metric in the view that compares runs, whose tables show what is scrolled to."""
    return browser.execute_script(
        """
        const names = [...document.querySelectorAll("a[title='Plot chart']")], name = arguments[0];
        const found = names.find(link => link.textContent == name);
        if (!found) { names.at(-1)?.scrollIntoView(); return []; }
        const {top} = found.parentElement.style;
        return [...document.querySelectorAll("div")].filter(d => top && d.style.top == top).map(d => d.textContent);
        """,
        metric,
    )


@pytest.mark.slow
def test_a_person_finds_the_runs_and_compares_them(trained, browser):
    folder, address = trained
    server = address.partition("/#")[0]
    client = make_client(server)
    (experiment,) = re.findall(r"/experiments/(\d+)/runs\?workflowType=machine_learning", address)
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    alone, distilled, student = (runs[name] for name in ("alone enet", "distilled", "kd enet"))

    browser.get(address)
    shown = [(run, wait(browser, lambda run=run: row(browser, run.info.run_id))) for run in (alone, distilled)]
    for run, cells in shown:
        assert cells["attributes.`Run Name`"] == run.info.run_name
        for metric in ("test_dice", "best_val_dice", "parameters", "gflops"):
            assert float(cells[f"metrics.`{metric}`"]) == run.data.metrics[metric]
    assert not row(browser, student.info.run_id)
    click(browser, f'[row-id="{distilled.info.run_id}"] button')  # which unfolds its stages
    assert wait(browser, lambda: row(browser, student.info.run_id))["attributes.`Run Name`"] == "kd enet"
    assert row(browser, runs["teacher unet"].info.run_id)["attributes.`Run Name`"] == "teacher unet"

    for run in (alone, distilled):
        click(browser, f'[row-id="{run.info.run_id}"] .ag-checkbox-input')
    click(browser, "[data-testid=runs-compare-button]:enabled")
    values = wait(browser, lambda: compared(browser, "best_val_dice"))
    for run in (alone, distilled):
        assert f"{run.data.metrics['best_val_dice']:.3f}".rstrip("0") in values

    browser.get(address)
    click(browser, "input[name=runs-view-mode][value=ARTIFACT]")
    dice = {
        run.info.run_id: {case: found["dice"] for case, found in read_cases(folder / stage / "test_cases.json").items()}
        for run, stage in ((alone, "alone/network"), (distilled, "distilled/student"))
    }
    cases = wait(browser, lambda: row(browser, "case_00008")) and ("case_00008", "case_00009")
    for case in cases:
        cells = row(browser, case)
        assert cells.pop("case") == case
        assert {run: float(text) for run, text in cells.items()} == {run: found[case] for run, found in dice.items()}
