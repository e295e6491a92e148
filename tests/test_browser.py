"""A real browser opens TensorBoard on a run and finds the run's data on every dashboard.

Needs Chromium and its driver (Debian: apt install chromium chromium-driver); skipped by name where
they are missing.
"""

import re
import shutil
import subprocess
import sys
import time

import pytest

import tfloop

CHROMIUM = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium or chromedriver is not installed"
)

TEXTS = """
const found = [];
function walk(node) {
  if (node.nodeType === Node.TEXT_NODE) { found.push(node.textContent.trim()); return; }
  if (["STYLE", "SCRIPT", "NOSCRIPT"].includes(node.tagName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
}
walk(document.documentElement);
return found.filter(text => text).join("\\n");
"""
ELEMENTS = """
const found = [];
function walk(root) {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments_[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
}
const arguments_ = arguments;
walk(document);
return found;
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """TensorBoard's address, on two runs: digits-001 without and digits-002 with L2."""
    folder = tmp_path_factory.mktemp("runs")
    for l2 in (0.0, 0.001):
        tfloop.train(
            tfloop.Config.make(
                "digits",
                epochs=2,
                l2=l2,
                validation_size=100,
                summaries="full",
                quiet=True,
                logdir=str(folder),
            )
        )
    process = subprocess.Popen(
        [sys.executable, "-m", "tfloop", "tensorboard", str(folder), "--port=0"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    yield re.search(r"http://127.0.0.1:\d+/", process.stdout.readline()).group()
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1500,1000",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
    ):  # WebGL without a GPU, for the projector
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def dashboard(board, browser):
    """dashboard(tab): opens it; the function that comes back waits until texts are seen, and
    returns all that is."""

    def open_tab(tab):
        browser.switch_to.default_content()
        browser.get("about:blank")
        browser.get(f"{board}#{tab}")

        def see(*texts, seconds=30):
            deadline = time.monotonic() + seconds
            while True:
                shown = browser.execute_script(TEXTS)
                missing = [text for text in texts if text not in shown]
                if not missing:
                    return shown
                assert time.monotonic() < deadline, (
                    f"{tab} does not show {missing}, but: {shown[:3000]}"
                )
                time.sleep(0.2)

        return see

    return open_tab


@pytest.mark.parametrize(
    "tab, texts",
    [
        (
            "scalars",
            [
                "digits-001/train",
                "digits-002/test",
                "epoch_accuracy",
                "learning_rate",
                "gradient_norm",
                "memory",
                "speed",
                "tensors",
            ],
        ),
        (
            "timeseries",
            ["digits-001/validation", "accuracy", "epoch_accuracy", "epoch_loss"],
        ),
        (
            "custom_scalars",
            [
                "accuracy and loss",
                "accuracy (digits-001/train)",
                "accuracy (digits-001/test)",
                "loss/total (digits-002/test)",
            ],
        ),
        ("histograms", ["tensors/activations/conv1", "digits-001/test"]),
        ("distributions", ["tensors/activations/conv1", "digits-001/test"]),
        ("text", ["classification_report", "macro avg", "digits-001/train"]),
        ("pr_curves", ["class_0/pr_curves", "class_9", "digits-001/test is at"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_dashboard_shows_the_runs(dashboard, tab, texts):
    dashboard(tab)(*texts)


def test_images_are_loaded(dashboard, browser):
    see = dashboard("images")
    see("pictures/confusion", "pictures/feature_maps/conv1", "digits-001/test")
    deadline = time.monotonic() + 30
    while True:
        sizes = [
            browser.execute_script("return arguments[0].naturalWidth", image)
            for image in browser.execute_script(ELEMENTS, "img")
        ]
        if sum(size > 100 for size in sizes) >= 4:
            break
        assert time.monotonic() < deadline, sizes
        time.sleep(0.2)


def test_the_compiled_step_and_the_conceptual_graph_are_drawn(dashboard, browser):
    see = dashboard("graphs")
    see("digits-001/train", "forward", "backward", "update")
    items = {
        item.get_attribute("textContent").strip(): item
        for item in browser.execute_script(ELEMENTS, "paper-item, paper-radio-button")
    }
    browser.execute_script("arguments[0].click()", items["keras"])
    see("cnn")  # the model, as one box


def test_hparams_lists_every_run_with_its_settings_and_metrics(dashboard):
    shown = dashboard("hparams")(
        "digits-001", "digits-002", "test accuracy", "TABLE VIEW", "learning_rate"
    )
    assert len(re.findall(r"0\.\d{4,}", shown)) >= 4  # metrics of both runs


def test_the_projector_shows_embeddings_with_their_labels(dashboard, browser):
    dashboard("projector")
    deadline = time.monotonic() + 60
    shown = ""
    while "Points: 360" not in shown.replace("\n", " "):
        assert time.monotonic() < deadline, shown[:2000]
        time.sleep(0.3)
        browser.switch_to.default_content()
        while frames := browser.find_elements(
            "css selector", "iframe"
        ):  # it lives in a frame in a frame
            browser.switch_to.frame(frames[0])
        shown = browser.execute_script(TEXTS)
    browser.switch_to.default_content()


def test_the_profile_dashboard_is_there_with_its_plugin(dashboard):
    pytest.importorskip("xprof", reason="the profile plugin, xprof, is not installed")
    dashboard("profile")("Profile")
