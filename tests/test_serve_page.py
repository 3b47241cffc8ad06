"""The page at / of `qwen3np serve`: its headers, and its behaviour in Chromium, against a server on loopback."""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browsing import contrast, luminance, press, require_names, set_theme, text

import qwen3np
from qwen3np.files.hub import BUILTIN
from qwen3np.serve.scheduler import Busy
from qwen3np.tokenizer import Tokenizer

serving = pytest.importorskip("serving", reason="the server and its tests need the extra `test`")
http, serve, wait_until = serving.http, serving.serve, serving.wait_until

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=1</script></p>&amp; {{ 7*7 }}'
THOUGHTS, SUM = "Seven and five.\n\n7 + 5 = 12.", "Seven plus five is **twelve**: `7 + 5`.\n\n```python\n7 + 5\n```\n"
ANSWERS = {"Add.": f"{THOUGHTS}\n</think>\n\n{SUM}", "Be hostile.": HOSTILE, "Talk.": "A word. " * 60}
ITALY = "What is the capital of Italy?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The built-in checkpoint; its template knows reasoning, and its generation_config makes it give ANSWERS."""
    folder = tmp_path_factory.mktemp("thinking")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUILTIN / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    model = replace(qwen3np.load(), tokenizer=Tokenizer.from_folder(folder))
    encode, biases = model.text.encode, []
    for question, answer in ANSWERS.items():
        think = "<think>\n" if "</think>" in answer else ""
        asked = encode(f"{question}<|im_end|>\n<|im_start|>assistant\n{think}")
        ids = asked + encode(answer) + encode("<|im_end|>")
        biases += [[ids[: n + 1], 1000.0] for n in range(len(asked), len(ids))]
    settings = {"do_sample": True, "temperature": 0.65, "top_k": 1, "presence_penalty": 0.5, "sequence_bias": biases}
    return replace(model, generation_config={**model.generation_config, **settings})


@pytest.fixture(scope="module")
def server(model):
    with serve(model) as found:
        yield found


class Parts(HTMLParser):
    """The tags of a page with their attributes, and the texts in them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], {}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        tag = self.tags[-1][0] if self.tags else ""
        self.texts.setdefault(tag, data)


# ----- without a browser


def test_the_page_is_for_everybody_who_names_this_host(server):
    address = server[0]
    page = http.get(f"{address}/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert "tiny" not in page.text
    assert http.get(f"{address}/", headers={"Host": "evil.example"}).status_code == 403
    with serve(key="secret") as (address, _):
        assert http.get(f"{address}/").text == page.text
        assert http.get(f"{address}/v1/models").status_code == 401


def test_the_policy_allows_the_pages_own_style_and_script_alone(server):
    page = http.get(f"{server[0]}/")
    parts = Parts(page.text)
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(parts.texts[tag].encode()).digest()).decode()}'"
        for tag in ("style", "script")
    }
    policy = dict(part.split(None, 1) for part in page.headers["Content-Security-Policy"].split("; "))
    assert policy == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'"),
        **{"style-src": hashes["style"], "script-src": hashes["script"], "img-src": "data:", "connect-src": "'self'"},
        "require-trusted-types-for": "'script'",
    }
    assert [tag for tag, _ in parts.tags].count("script") == [tag for tag, _ in parts.tags].count("style") == 1
    for tag, attributes in parts.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "action")], tag
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\(|://(?!www\.w3\.org/)|innerHTML|insertAdjacentHTML|eval\(", page.text)


def test_the_model_says_its_defaults(server):
    found = http.get(f"{server[0]}/v1/models").json()["data"][0]
    assert found["defaults"] == {"temperature": 0.65, "top_k": 1, "presence_penalty": 0.5, "max_tokens": 256}
    assert found["thinking"]
    with serve() as (address, _):
        found = http.get(f"{address}/v1/models").json()["data"][0]
    assert (found["defaults"], found["thinking"]) == ({"temperature": 0.0, "max_tokens": 256}, False)


def test_the_page_is_packaged():
    setup, folder = configparser.ConfigParser(), Path(qwen3np.__file__).parent
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["qwen3np"].split(",")
    packaged = {path.name for pattern in patterns for path in folder.glob(pattern.strip())}
    assert packaged >= {"page.html", "page.css", "page.js"}


# ----- in a browser


@pytest.fixture
def opened(browser, server):
    """Open the page of a server; at the end the console must be empty, and nothing asked of another host."""
    expected, addresses = [], []

    def open_page(address=server[0], *, console=(), width=1280, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        set_theme(browser)
        browser.get(f"{address}/")
        wait(browser, "return Boolean(model) || $('door').open")
        expected.extend(console)
        addresses.append(address)
        return browser

    yield open_page
    log = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in log if not any(part in line for part in expected)] == []
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(addresses[-1]) for name in names)
    browser.execute_script("onpagehide = null; messages = []; chosen = {}; running?.controller.abort()")
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": addresses[-1], "storageTypes": "all"})
    browser.execute_script("model = null")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # the next page gets the window's own size


def wait(browser, script, *arguments):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 10, 0.02).until(lambda _: browser.execute_script(script, *arguments))


def ask(browser, question, *, done=True):
    browser.execute_script("$('question').value = arguments[0]; $('question').focus()", question)
    press(browser, "ENTER")
    if done:
        wait(browser, "return !running")


def click(browser, name, at=-1):
    """Click the button of this name in a message."""
    browser.execute_script(
        "[...document.querySelectorAll('article')].at(arguments[1]).querySelectorAll('button').forEach((button) =>"
        " button.textContent === arguments[0] && button.click())",
        name,
        at,
    )


def said(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('article')].map((one) => one.querySelector(':scope > .text').innerText)"
    )


def switch(browser, name, on):
    browser.execute_script("if ($(arguments[0]).checked !== arguments[1]) $(arguments[0]).click()", name, on)


def change(browser, **settings):
    for name, value in settings.items():
        browser.execute_script("$(arguments[0]).value = arguments[1]; $(arguments[0]).oninput()", name, value)


@contextmanager
def recorded(service):
    """Record the prompts and settings that reach the scheduler."""
    found, answers = [], service.answers

    def record(requests, *options):
        found.append((service.tokenizer.decode(requests[0]["ids"]), requests[0]["settings"]))
        return answers(requests, *options)

    service.answers = record
    try:
        yield found
    finally:
        del service.answers


def turns(*texts):
    """A prompt in the form of the built-in template: (role, text), ..."""
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in texts) + "<|im_start|>assistant\n"


def test_an_answer_streams_and_stops(opened, server):
    browser = opened()
    switch(browser, "thinking", False)
    ask(browser, "Talk.", done=False)
    shown = "return document.querySelector('.running > .text')?.innerText.length > arguments[0]"
    wait(browser, shown, 0)
    first = len(said(browser)[1])
    wait(browser, shown, first)
    assert browser.find_element("id", "stop").is_displayed()
    press(browser, "ESCAPE")
    wait(browser, "return !running")
    assert said(browser)[1] in ANSWERS["Talk."].strip()
    assert len(said(browser)[1]) < 400
    assert text(browser, "article:last-child .note") == "Stopped"
    assert re.match(r"\d+ tokens, \d+\.\d per second$", text(browser, "#status"))
    wait_until(lambda: server[1].scheduler.load["requests_running"] == 0)
    assert not browser.find_element("id", "stop").is_displayed()


def test_the_conversation_is_edited_regenerated_and_continued(opened, server):
    browser = opened()
    switch(browser, "thinking", False)
    browser.execute_script("$('system').value = 'Be brief.'")
    with recorded(server[1]) as sent:
        ask(browser, ITALY)
        click(browser, "Edit", 0)
        browser.execute_script("document.activeElement.value = 'What is the capital of Spain?'")
        press(browser, "ENTER")
        wait(browser, "return !running")
        assert said(browser) == ["What is the capital of Spain?", "The capital of Spain is Madrid."]
        browser.execute_script("$('undo').click()")
        assert said(browser) == [ITALY, "The capital of Italy is Rome."]
        ask(browser, "And of Spain?")
        click(browser, "Edit", 1)
        browser.execute_script("document.activeElement.value = 'Milan.'")
        press(browser, "ENTER")
        assert said(browser)[1] == "Milan."
        click(browser, "Regenerate")
        wait(browser, "return !running")
        change(browser, max_tokens=3)
        click(browser, "Regenerate", 0)
        wait(browser, "return !running")
        cut = said(browser)[1]
        assert text(browser, "article:last-child .note") == "Cut off at the limit of tokens"
        browser.execute_script("$('reset').click()")
        click(browser, "Continue")
        wait(browser, "return !running")
        assert said(browser) == [ITALY, "The capital of Italy is Rome."]
    prompts, start = [prompt for prompt, _ in sent], ("system", "Be brief.")
    assert prompts[0] == turns(start, ("user", ITALY))
    assert prompts[3] == turns(start, ("user", ITALY), ("assistant", "Milan."), ("user", "And of Spain?"))
    assert prompts[4:] == [prompts[0], prompts[0] + cut]


def test_settings_start_as_the_models_and_reach_the_scheduler(opened, server):
    browser = opened()
    values = {"temperature": 0.2, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    values |= {"presence_penalty": -0.5, "frequency_penalty": 0.4, "max_tokens": 2, "seed": 7}
    shown = browser.execute_script("return arguments[0].map((name) => $(name).value)", list(values))
    assert shown == ["0.65", "1", "1", "0", "1", "0.5", "0", "", ""]
    with recorded(server[1]) as sent:
        ask(browser, "Hello.")
        change(browser, **values)
        switch(browser, "thinking", False)
        ask(browser, "Hello.")
    (first, defaults), (second, settings) = sent
    ours = {**values, "max_new_tokens": values["max_tokens"]}
    del ours["max_tokens"]
    assert {name: settings[name] for name in ours} == ours
    assert (defaults["temperature"], defaults["top_k"], "top_p" in defaults) == (0.65, 1, False)
    assert first.endswith("assistant\n<think>\n")
    assert second.endswith("assistant\n")
    browser.refresh()  # settings are kept
    wait(browser, "return Boolean(model)")
    kept = browser.execute_script("return [$('top_k').value, $('seed').value, $('thinking').checked]")
    assert kept == ["3", "7", False]


def test_thoughts_are_folded_and_markdown_is_drawn(opened):
    browser = opened()
    ask(browser, "Add.")
    assert browser.execute_script("return document.querySelector('.assistant details').open") is False
    assert re.fullmatch(r"Thoughts: \d+ tokens", text(browser, ".assistant summary"))
    assert said(browser)[1].startswith("Seven plus five is twelve: 7 + 5.\n")
    assert [text(browser, f"article > .text {tag}") for tag in ("b", "code", "pre")] == ["twelve", "7 + 5", "7 + 5\n"]
    browser.find_element("css selector", ".assistant summary").click()
    assert text(browser, ".assistant details .text") == THOUGHTS
    assert browser.execute_script("return [said(messages[1], true), said(messages[1], false)]") == [THOUGHTS, SUM]
    cases = {"a\n```\nopen": "a<open>", "``` x\n1\n```\n2": "<1\n>2", "# Title\n**b**`c`": "<Title>\n<b><c>"}
    cases |= {text: text for text in ("2 ** 3 ` x", "*a* ```b", "", "#b")}
    script = "return marked(arguments[0]).map((one) => one.tagName ? `<${one.textContent}>` : one).join('')"
    assert [browser.execute_script(script, case) for case in cases] == list(cases.values())


def test_the_pointer_and_arrow_keys_show_probabilities(opened, server, model):
    from selenium.webdriver import ActionChains

    browser = opened()
    switch(browser, "thinking", False)
    ask(browser, ITALY)
    switch(browser, "probabilities", True)
    ids = model.text.encode(turns(("user", ITALY)) + "The capital of Italy is Rome.<|im_end|>")
    answer = ids[len(model.text.encode(turns(("user", ITALY)))) :]
    logits = model(ids)[0].astype(np.float64)[-len(answer) - 1 : -1]
    truth = np.exp(logits - logits.max(-1, keepdims=True))
    truth /= truth.sum(-1, keepdims=True)
    spans = browser.find_elements("css selector", "article > .text span")
    assert [span.text for span in spans] == [model.text.decode([i]) for i in answer]
    tints = browser.execute_script("return arguments[0].map((span) => +span.style.getPropertyValue('--s'))", spans)
    np.testing.assert_allclose(tints, 1 - truth[range(len(answer)), answer], atol=1e-5)
    tip = "return [...document.querySelectorAll('#tip tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
    for n in (0, 3, len(answer) - 1):
        ActionChains(browser).move_to_element(spans[n]).perform()
        rows = browser.execute_script(tip)
        best = np.argsort(-truth[n])[:5]
        assert [row[0] for row in rows] == [model.text.decode([i]).replace(" ", "␣") for i in best]
        shares = [float(row[1].strip("<> %")) for row in rows]
        np.testing.assert_allclose(shares, 100 * truth[n][best], atol=0.11)
    press(browser, "ESCAPE")
    assert not browser.find_element("id", "tip").is_displayed()
    browser.execute_script("document.querySelector('.text[role=group]').focus()")
    press(browser, "ARROW_RIGHT", "ARROW_RIGHT")
    assert text(browser, ".at") == " capital"
    assert text(browser, "#spoken").startswith("␣capital ")


def test_the_keyboard_is_enough(opened):
    browser = opened()
    focus = "return document.activeElement"
    browser.execute_script("$('thinking').focus()")
    press(browser, "SPACE")
    browser.execute_script("$('question').focus()")
    press(browser, *"Who", "ENTER")
    wait(browser, "return !running && messages.length === 2")
    press(browser, "ARROW_UP", "ARROW_UP")
    assert browser.execute_script("return document.activeElement.matches('article.user')")
    press(browser, "e")
    press(browser, "a", "ESCAPE")
    assert said(browser)[0] == "Who"
    press(browser, "ENTER")
    press(browser, *" are you?", "ENTER")
    wait(browser, "return !running")
    assert said(browser)[0] == "Who are you?"
    press(browser, "ARROW_DOWN", "r")
    wait(browser, "return !running")
    assert len(said(browser)) == 2
    press(browser, "ARROW_DOWN")
    assert browser.execute_script(focus).get_attribute("id") == "question"
    shown = "[...document.querySelectorAll('button, input, textarea, summary, a')].filter((x) => x.checkVisibility())"
    wanted = browser.execute_script(f"return {shown}")
    browser.execute_script("document.activeElement.blur(); getSelection().removeAllRanges()")
    outline = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
    reached = []
    for _ in range(len(wanted) + 4):
        press(browser, "TAB")
        reached.append(browser.execute_script(focus))
        style, width = browser.execute_script(outline)
        assert reached[-1].tag_name == "body" or (style != "none" and width >= 2)
    assert set(wanted) <= set(reached)


def test_screen_readers_get_a_name_for_everything(opened):
    browser = opened()
    switch(browser, "probabilities", True)
    ask(browser, "Add.")
    roles = require_names(browser)
    assert {"article", "textbox", "slider", "checkbox", "spinbutton", "status", "complementary", "group"} <= roles
    assert browser.execute_script("return $('spoken').textContent") == SUM


COLOURS = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const paint = (colour) => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };
const pixel = () => [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
const shows = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
return [...document.body.querySelectorAll("*")].filter((one) => shows(one) && one.checkVisibility()).map((one) => {
  const under = [];
  for (let parent = one; parent; parent = parent.parentElement) under.unshift(getComputedStyle(parent).backgroundColor);
  under.forEach(paint);
  const back = pixel();
  paint(getComputedStyle(one).color);
  return [one.outerHTML.slice(0, 80), back, pixel()];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(opened, theme):
    """Every text on what it stands on, as drawn: a contrast of 4.5 at least."""
    browser = opened()
    set_theme(browser, theme)
    checked = browser.execute_script(COLOURS)
    ask(browser, "Add.")
    checked += browser.execute_script(COLOURS)
    browser.execute_script("document.querySelector('.assistant details').open = true")
    change(browser, top_k=9)
    switch(browser, "probabilities", True)
    browser.execute_script("trouble('An error.'); showTip(document.querySelector('article > .text span'))")
    browser.execute_script("document.querySelectorAll('.text span').forEach((one) => one.style.setProperty('--s', 1))")
    checked += browser.execute_script(COLOURS)
    browser.execute_script("edit(document.querySelector('article'), messages[0])")
    browser.execute_script("askForKey(true).catch(() => 0)")
    checked += browser.execute_script(COLOURS)
    assert len(checked) > 100
    assert (luminance(checked[0][1]) > 0.5) == (theme == "light")
    ratios = contrast(*(luminance([colours[n] for colours in checked]) for n in (1, 2)))
    assert ratios.min() >= 4.5, checked[int(ratios.argmin())]


def test_text_never_becomes_html(opened, server):
    browser = opened()
    switch(browser, "thinking", False)
    browser.execute_script("$('system').value = arguments[0]", HOSTILE)
    ask(browser, HOSTILE)
    ask(browser, "Be hostile.")
    assert (said(browser)[0], said(browser)[3]) == (HOSTILE, HOSTILE)
    switch(browser, "probabilities", True)
    assert said(browser)[3].startswith(HOSTILE)
    name, server[1].name = server[1].name, HOSTILE
    try:
        browser.execute_script("trouble(arguments[0]); edit(document.querySelector('article'), messages[0])", HOSTILE)
        browser.refresh()
        wait(browser, "return Boolean(model)")
    finally:
        server[1].name = name
    assert text(browser, "#model") == HOSTILE
    assert browser.execute_script("return [typeof hacked, document.images.length]") == ["undefined", 0]
    blocked = "try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }"
    assert browser.execute_script(blocked) == "TypeError"
    browser.get_log("browser")  # has this violation


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Busy("too many requests are waiting"), "The server is busy: too many requests are waiting."),
        (Busy("the server is stopping"), "The server cannot answer this: the server is stopping."),
        (TimeoutError("the time limit"), "The server cannot answer this: the time limit."),
        (ValueError("<b>no</b>"), "The server cannot answer this: <b>no</b>."),
    ],
)
def test_errors_are_shown_and_tried_again(opened, server, error, message):
    browser, service = opened(console=["Failed to load resource"]), server[1]

    def fails(*request):
        raise error

    switch(browser, "thinking", False)
    service.answers = fails
    try:
        ask(browser, ITALY)
    finally:
        del service.answers
    assert text(browser, "#trouble p").startswith(message)
    assert said(browser) == [ITALY]
    browser.find_element("css selector", "#trouble button").click()
    wait(browser, "return !running")
    assert said(browser)[1] == "The capital of Italy is Rome."
    assert not browser.find_element("id", "trouble").is_displayed()


def test_a_full_context_and_a_server_that_is_gone_are_told(opened):
    with serve() as (address, service):
        browser = opened(address, console=["Failed to load resource"])
        ask(browser, "word " * 300)
        assert re.match(r"The conversation is too long: the prompt has \d+ tokens; ", text(browser, "#trouble p"))
        browser.execute_script("$('new').click()")
        service.timeout = 0.2
        service.scheduler.call(partial(time.sleep, 0.4))
        ask(browser, ITALY)
        assert text(browser, "#trouble p") == "The server gave up: the request waited too long."
    ask(browser, ITALY)
    assert text(browser, "#trouble p").startswith("The server does not answer.")


def test_the_key_is_asked_for(opened):
    with serve(key="secret") as (address, _):
        browser = opened(address, console=["status of 401"])
        for key, note in (("wrong", "The server does not accept this key. Try another one."), ("secret", None)):
            browser.find_element("id", "key").clear()
            browser.find_element("id", "key").send_keys(key)
            press(browser, "ENTER")
            if note:
                wait(browser, "return $('door-note').textContent === arguments[0] && $('door').open", note)
        wait(browser, "return Boolean(model)")
        ask(browser, ITALY)
        assert said(browser)[1] == "The capital of Italy is Rome."
        browser.refresh()
        wait(browser, "return Boolean(model)")
        kept = browser.execute_script("return [sessionStorage.getItem('key'), JSON.stringify(localStorage)]")
        assert (kept[0], "secret" in kept[1]) == ("secret", False)


def test_the_conversation_is_kept_until_a_new_one(opened):
    browser = opened()
    switch(browser, "thinking", False)
    browser.execute_script("$('system').value = 'Be brief.'")
    ask(browser, ITALY)
    browser.refresh()
    wait(browser, "return Boolean(model)")
    assert said(browser) == [ITALY, "The capital of Italy is Rome."]
    assert browser.execute_script("return $('system').value") == "Be brief."
    browser.execute_script("$('new').click()")
    assert said(browser) == []
    browser.execute_script("$('undo').click()")
    assert len(said(browser)) == 2


def test_an_answer_is_copied(opened, browser):
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions})
    opened()
    ask(browser, "Add.")
    click(browser, "Copy")
    wait(browser, "return $('status').textContent === 'Copied'")
    assert browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == SUM


def test_a_phone_scrolls_one_way(opened):
    browser = opened(width=390, height=844)
    width = "return [document.documentElement.scrollWidth, $('log').scrollWidth, $('log').clientWidth]"
    assert browser.execute_script(width) == [390, 390, 390]
    change(browser, max_tokens=1)
    ask(browser, "x" * 100)
    browser.execute_script("$('reset').click()")
    ask(browser, "Add.")
    switch(browser, "probabilities", True)
    browser.execute_script("const all = document.querySelectorAll('.text span'); showTip(all[all.length - 3])")
    assert browser.execute_script(width) == [390, 390, 390]
    left, right = browser.execute_script("const box = $('tip').getBoundingClientRect(); return [box.left, box.right]")
    assert 0 <= left < right <= 390
    browser.find_element("id", "toggle").click()
    assert browser.execute_script(width) == [390, 390, 390]
    assert browser.execute_script("return $('settings').scrollWidth <= $('settings').offsetWidth")
