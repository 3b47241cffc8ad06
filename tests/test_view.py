"""The page of `qwen3np view`: its numbers, its text, its file; and its behaviour in Chromium."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from browsing import contrast, luminance, press, require_names, set_theme, text

from qwen3np import NonFiniteError, forward
from qwen3np.cli import main
from qwen3np.sampling import processed_logits
from qwen3np.study.view import CANDIDATES, MAX_TOKENS, Observation, observe, page, visible

PROMPT = "The capital of France is Paris. The opposite of hot is"
# <think> is one token, which HTML would take for a tag
HOSTILE = "<think></script><script>hacked=1</script>\"'><img src=x onerror=hacked=1><!-- {{ 7*7 }} \u202e\u200b\n\t你"


class Elements(HTMLParser):
    """Collects the tags of a page with their attributes, and the data of its script."""

    def __init__(self, html):
        super().__init__()
        self.found, self.data = [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.data is None and self.found and self.found[-1][1].get("id") == "data":
            self.data = json.loads(data)


@pytest.fixture(scope="module")
def seen(builtin):
    return observe(builtin.weights, builtin.config, builtin.tokenizer.encode(PROMPT))


def test_what_is_not_finite_is_named(builtin):
    name = "model.layers.2.mlp.up_proj.weight"
    broken = {**builtin.weights, name: np.full_like(builtin.weights[name], np.nan)}
    with pytest.raises(NonFiniteError, match=r"^model.layers.2.mlp.up_proj is NaN or infinite at position 0 "):
        observe(broken, builtin.config, [1, 2])


@pytest.fixture(scope="module")
def html(seen, builtin):
    return page(seen, builtin.tokenizer, "a <model>")


@pytest.fixture(scope="module")
def data(html):
    return Elements(html).data


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_seen_is_what_forward_records(builtin, config, weights, tied):
    weights, config = (builtin.weights, builtin.config) if tied else (weights, config)
    ids = [5, 17, 3, 60, 99, 8, 17]
    points = {}
    logits = forward(weights, config, ids, numerics="float64", trace=points.__setitem__)[0]
    seen = observe(weights, config, ids, numerics="float64")
    states = [points["model.embed_tokens"][0]]
    states += [points[f"model.layers.{layer}"][0] for layer in range(config.num_hidden_layers)]
    norm, head = (
        np.asarray(weights[name], np.float64)
        for name in ("model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight")
    )
    for row, x in enumerate(states):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * norm
        truth = softmax(x @ head.T)
        order = np.argsort(-truth, axis=-1)[:, : seen.guesses.shape[-1]]
        assert np.array_equal(seen.guesses[row], order)
        np.testing.assert_allclose(seen.probabilities[row], np.take_along_axis(truth, order, -1), rtol=1e-12)
    assert np.array_equal(seen.logits, logits)
    for name, x in points.items():
        layer, point = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", name).groups() if "layers" in name else (None, name)
        by_token = np.swapaxes(x[0], 0, 1) if point.endswith(("rope", "scores", "probs")) else x[0]
        for t, numbers in enumerate(by_token):
            numbers = numbers[:, : t + 1] if point.endswith(("scores", "probs")) else numbers
            size = seen.layer_sizes[point or "output"][int(layer), t] if layer else seen.sizes[name][t]
            assert size == pytest.approx(np.linalg.norm(numbers) / np.sqrt(numbers.size), rel=1e-12), name
        if point == "self_attn.probs":
            assert np.array_equal(seen.attention[int(layer)], x[0])


def test_the_page_holds_what_is_seen(seen, data):
    tokens = len(seen.ids)
    assert data["ids"] == seen.ids
    assert np.array_equal(data["lens"]["ids"], seen.guesses)
    np.testing.assert_allclose(data["lens"]["probabilities"], seen.probabilities, rtol=5e-5)
    packed = np.frombuffer(base64.b64decode(data["attention"]["weights"]), np.uint8)
    heads = packed.reshape(data["attention"]["layers"], data["attention"]["heads"], -1)
    for q in range(tokens):
        rows = heads[..., q * (q + 1) // 2 :][..., : q + 1] / 255
        np.testing.assert_allclose(rows, seen.attention[..., q, : q + 1], atol=1 / 510 + 1e-6)
    for (name, _), values in zip(data["sizes"]["points"], data["sizes"]["values"], strict=True):
        np.testing.assert_allclose(values, seen.layer_sizes[name], rtol=5e-3)
    assert np.array_equal(np.argsort(-seen.logits, kind="stable")[:, :CANDIDATES], data["next"]["ids"])


@pytest.mark.parametrize(("temperature", "error"), [(1, 6e-5), (0.5, 2e-4), (2, 2e-4)])
def test_groups_stand_for_the_rest_of_the_vocabulary(seen, data, temperature, error):
    """At temperature 1 only the four decimals are lost; at others a group's variance counts (measured: 1.2e-4)."""
    nexts = data["next"]
    assert CANDIDATES + sum(nexts["group_sizes"]) == seen.logits.shape[1]
    for token, logits in enumerate(seen.logits.astype(np.float64)):
        total = np.exp(np.array(nexts["logits"][token]) / temperature).sum()
        total += (nexts["group_sizes"] * np.exp(np.array(nexts["group_logits"][token]) / temperature)).sum()
        assert total == pytest.approx(np.exp(logits / temperature).sum(), rel=error)


def test_every_character_of_a_token_can_be_seen(builtin):
    assert visible("a b\r\n\t\u202e\u200b\xa0<é你🙂".encode()) == "a␣b␍↵⇥\\u202e\\u200b\\xa0<é你🙂"
    parts = [visible(builtin.tokenizer.token_bytes(i)) for i in builtin.tokenizer.encode("你")]
    assert parts == ["\\xe4", "\\xbd", "\\xa0"]  # English is all that the built-in tokenizer has learned
    assert builtin.tokenizer.token_bytes(builtin.tokenizer.token_to_id("<|im_end|>")) == b"<|im_end|>"
    assert builtin.tokenizer.token_bytes(2**31) == b""


def test_the_page_needs_nothing_else(html):
    policy = [attributes["content"] for tag, attributes in Elements(html).found if "http-equiv" in attributes]
    assert policy[0].startswith("default-src 'none';")
    for tag, attributes in Elements(html).found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", html)


def test_a_hostile_prompt_stays_text(builtin):
    ids = builtin.tokenizer.encode(HOSTILE)
    elements = Elements(page(observe(builtin.weights, builtin.config, ids), builtin.tokenizer, HOSTILE))
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "img" not in [tag for tag, _ in elements.found]
    said = "".join(elements.data["texts"][str(i)] for i in ids)
    assert said.startswith(HOSTILE.split(" \u202e")[0].replace(" ", "␣"))


def test_the_size_of_a_large_page(builtin):
    """28 layers of 16 heads, 64 tokens: below 5 MB, for whatever numbers."""
    rng = np.random.default_rng(0)
    layers, heads, tokens, vocabulary = 28, 16, 64, 151936
    names = [f"self_attn.point_{n}" for n in range(16)] + ["output", "self_attn.o_proj", "mlp.down_proj"]
    seen = Observation(
        ids=rng.integers(0, vocabulary, tokens).tolist(),
        guesses=rng.integers(0, vocabulary, (layers + 1, tokens, 5)),
        probabilities=rng.random((layers + 1, tokens, 5)),
        attention=rng.random((layers, heads, tokens, tokens)),
        sizes={},
        layer_sizes={name: rng.random((layers, tokens)) for name in names},
        logits=rng.standard_normal((tokens, vocabulary), np.float32),
    )
    assert len(page(seen, builtin.tokenizer, "").encode()) < 5e6


def test_the_chart_draws_the_sizes(seen, html):
    pytest.importorskip("matplotlib", reason="the chart needs the extra `study`")
    for point in ("output", "self_attn.o_proj", "mlp.down_proj"):
        lines = re.findall(rf'<g id="line-{point}-(\d+)">\s*<path d="([^"]*)"', html)
        assert [int(token) for token, _ in lines] == list(range(len(seen.ids)))
        heights = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)] for _, path in lines]
        drawn, sizes = np.ravel(heights), np.log(seen.layer_sizes[point].T.ravel())
        assert np.corrcoef(drawn, sizes)[0, 1] < -0.999999  # up is larger, on a logarithmic axis


def test_without_matplotlib_the_chart_alone_is_missing(seen, html, builtin, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plain = page(seen, builtin.tokenizer, "a <model>")
    assert "<svg" not in plain
    assert Elements(plain).data == Elements(html).data


def test_the_command_writes_one_whole_page(tmp_path, capsys):
    main(["view", PROMPT, "-o", str(tmp_path / "view.html")])
    out, err = capsys.readouterr()
    assert out == ""
    assert "view.html: 13 tokens, 0.1 MB" in err
    assert [file.name for file in tmp_path.iterdir()] == ["view.html"]
    assert Elements((tmp_path / "view.html").read_text(encoding="utf-8")).data["texts"]


def test_the_command_opens_a_browser_for_someone_at_a_terminal(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    main(["view", PROMPT])  # no terminal: a script does not want one
    assert not opened
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    main(["view", PROMPT, "--no-open"])
    assert not opened
    main(["view", PROMPT])
    (url,) = opened
    assert url.startswith("file://")
    assert url.endswith("/view.html")
    assert "opened in the browser" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "out", "message"),
    [
        ("", "old.html", "empty; a prompt needs at least one token"),
        (" is" * (MAX_TOKENS + 1), "old.html", f"129 tokens, but a view shows at most {MAX_TOKENS}: attention"),
        (PROMPT, "missing/view.html", "there is no folder"),
        (PROMPT, ".", "is a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(prompt, out, message, tmp_path, capsys):
    (tmp_path / "old.html").write_text("old")
    with pytest.raises(SystemExit) as end:
        main(["view", prompt, "-o", str(tmp_path / out)])
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert end.value.code == 2
    assert len(said) == 1
    assert message in said[0]
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# ----- in a browser


@pytest.fixture
def opened(browser, html, tmp_path):
    """Open a page in the browser; afterwards its console must be empty, and it must have asked for nothing."""

    def open_page(html=html):
        (tmp_path / "view.html").write_text(html, encoding="utf-8")
        set_theme(browser)
        browser.get((tmp_path / "view.html").as_uri())
        return browser

    yield open_page
    # "rendering" is advice on how the tests read the picture
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, None, 1), (0, None, 1), (0.7, 5, 1), (1.5, None, 0.6), (2, 3, 0.5), (0.6, 20, 0.95), (2, None, 0.99)],
)
def test_the_sliders_sample_as_the_package_does(opened, seen, temperature, top_k, top_p):
    browser = opened()
    token = 6  # after "Paris": not sure of anything
    script = """
    document.querySelectorAll('#tokens input')[arguments[0]].click();
    for (const [id, value] of Object.entries(arguments[1])) document.getElementById(id).value = value;
    document.getElementById('temperature').dispatchEvent(new Event('input', {bubbles: true}));
    return distribution(arguments[0], ...Object.values(arguments[1]));
    """
    values = {"temperature": temperature, "top-k": top_k or CANDIDATES + 1, "top-p": top_p}
    found = browser.execute_script(script, token, values)
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    scores = processed_logits(seen.logits[token], parameters).astype(np.float64)
    truth = softmax(scores)[np.argsort(-seen.logits[token], kind="stable")]
    # four decimals of two logits at temperature 0.6, and at 2 what the groups lose
    np.testing.assert_allclose(found["probabilities"][:CANDIDATES], truth[:CANDIDATES], rtol=3e-4)
    assert found["kept"] == pytest.approx(np.isfinite(scores).sum(), rel=5e-3)
    shown = text(browser, "#next-table tbody").splitlines()
    assert shown[0].split("\t")[2].strip(" >") in (f"{100 * truth[0]:.1f} %", "100 %", "99.9 %")
    assert f"{found['kept']:,} token" in text(browser, "#kept")


def test_a_click_picks_a_token_everywhere(opened, seen, html, builtin):
    browser = opened()
    browser.execute_script("document.querySelectorAll('#tokens label')[3].click()")
    assert text(browser, ".picked span").split() == ["Token", "4", "of", "13:", "␣France"]
    best = visible(builtin.tokenizer.token_bytes(seen.guesses[-1, 3, 0]))
    assert text(browser, "#next-table tbody th").removesuffix(" ✓") == best
    assert text(browser, "#lens-detail bdi") == best
    assert text(browser, "#lens-table thead .on") == "4 ␣France"
    weights = seen.attention[0].mean(0)[3, :4]
    most = int(np.argmax(weights))
    said = text(browser, "#row-table tbody tr").split("\t")
    assert said[0].startswith(f"{most + 1} ")
    assert abs(float(said[1].split()[0]) - 100 * weights[most]) <= 0.5 + 100 / 510
    assert text(browser, "#sizes-table tbody td") == f"{seen.layer_sizes['input_layernorm'][0, 3]:.3g}"
    on = browser.execute_script("return [...document.querySelectorAll('.chart .on')].map((line) => line.id)")
    assert all(name.endswith("-3") for name in on)
    assert len(on) == (3 if "<svg" in html else 0)
    browser.find_element("id", "following").click()
    assert text(browser, "#picked-text") == "␣is"


def test_the_picture_says_what_is_under_the_pointer_and_a_click_pins_it(opened, seen):
    from selenium.webdriver import ActionChains

    browser = opened()
    browser.execute_script(
        "document.querySelectorAll('#heads input')[2].click(); $('layer').value = 3; $('layer').oninput()"
    )
    picture = browser.find_element("id", "picture")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    side, cell, margin = browser.execute_script("return [$('picture').offsetWidth, CELL, MARGIN]")

    def at(q, k):
        return [round(margin + (x + 0.5) * cell - side / 2) for x in (k, q)]

    ActionChains(browser).move_to_element_with_offset(picture, *at(9, 7)).perform()
    said = text(browser, "#picture-detail")
    share = float(re.sub("< 1", "0", re.search(r"gives (.*) % of its attention to token 8 “\.”", said)[1]))
    assert said.startswith("Token 10 “")
    assert abs(share - 100 * seen.attention[3, 1, 9, 7]) <= 0.5 + 100 / 510
    ActionChains(browser).move_to_element_with_offset(picture, *at(2, 7)).perform()
    assert "cannot see token 8" in text(browser, "#picture-detail")
    ActionChains(browser).move_to_element_with_offset(picture, *at(9, 7)).click().perform()
    assert text(browser, "#picked-number") == "10"
    assert text(browser, "#picture-title").startswith("Layer 3, head 1: where token 10 ")


def test_the_keyboard_reaches_everything(opened, seen, builtin):
    browser = opened()
    browser.execute_script("document.querySelector('#tokens input:checked').focus()")
    press(browser, "ARROW_LEFT", "ARROW_LEFT")
    assert text(browser, "#picked-number") == "11"
    browser.execute_script("document.querySelector('#lens-table [tabindex=\"0\"]').focus()")
    press(browser, "ARROW_UP", "ARROW_LEFT")  # from the last layer to the one before
    guess = visible(builtin.tokenizer.token_bytes(seen.guesses[-2, 9, 0]))
    assert text(browser, "#lens-detail bdi") == guess
    assert browser.switch_to.active_element.get_attribute("aria-label").startswith(f"{guess} ")
    press(browser, "ENTER")
    assert text(browser, "#picked-number") == "10"
    browser.execute_script("$('picture').focus()")
    press(browser, "ARROW_UP", "ARROW_LEFT")
    assert text(browser, "#picture-detail").startswith("Token 9 “")
    press(browser, "ENTER")
    assert text(browser, "#picked-number") == "9"
    browser.execute_script("document.body.focus(); document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(25):
        press(browser, "TAB")
        reached.append(browser.execute_script("return document.activeElement.id || document.activeElement.name"))
    assert {"token", "previous", "temperature", "top-k", "top-p", "layer", "head", "picture"} <= set(reached)


def test_screen_readers_get_a_name_for_everything(opened):
    browser = opened()
    roles = require_names(browser)
    assert {"radiogroup", "radio", "slider", "grid", "columnheader", "rowheader", "status", "application"} <= roles


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(opened, theme):
    """Text on what it stands on: a contrast of 4.5 at least (WCAG 2.2, 1.4.3)."""
    browser = opened()
    set_theme(browser, theme)
    names = ("text", "muted", "back", "panel", "heat", "pick", "pick-back", "hidden")
    colours = browser.execute_script("return arguments[0].map((name) => colour(`--${name}`))", names)
    light = dict(zip(names, map(luminance, colours), strict=True))
    assert (light["back"] > 0.5) == (theme == "light")
    on = {"text": ("back", "panel", "heat", "pick-back"), "muted": ("back", "panel"), "pick": ("back", "pick-back")}
    for front, backs in on.items():
        for back in backs:
            assert contrast(light[front], light[back]) >= 4.5, (front, back)
    last = "return [...$('picture').getContext('2d').getImageData(MARGIN + (S - 0.5) * CELL, MARGIN + 5, 1, 1).data]"
    from selenium.webdriver.support.wait import WebDriverWait

    def redrawn(_: object) -> bool:  # when the browser comes to it
        return abs(luminance(browser.execute_script(last)[:3]) - light["hidden"]) < 1e-3

    WebDriverWait(browser, 10).until(redrawn)


def test_layers_need_not_have_the_same_points(opened, seen, builtin):
    """In a model whose layers are dense and sparse by turns."""
    sparse, dense = (
        np.where(np.arange(4)[:, None] % 2 == n, seen.layer_sizes["mlp.down_proj"], np.nan) for n in (0, 1)
    )
    mixed = replace(seen, layer_sizes=seen.layer_sizes | {"mlp.experts": sparse, "mlp.down_proj": dense})
    browser = opened(page(mixed, builtin.tokenizer, ""))
    shown = text(browser, "#sizes-table tbody tr:last-child").split("\t")[1:]
    assert [cell != "" for cell in shown] == [True, False, True, False]


def test_a_hostile_prompt_runs_nothing(opened, builtin):
    ids = builtin.tokenizer.encode(HOSTILE)
    browser = opened(page(observe(builtin.weights, builtin.config, ids), builtin.tokenizer, HOSTILE))
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    shown = browser.execute_script("return [...document.querySelectorAll('#tokens bdi')].map((e) => e.textContent)")
    assert "".join(shown).startswith(HOSTILE.split(" \u202e")[0].replace(" ", "␣"))
