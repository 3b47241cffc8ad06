"""Messages -> text, against published renderings and transformers; and malicious templates."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3np import chat
from qwen3np.chat import render_chat
from qwen3np.tokenizer import Tokenizer

DATA = os.environ.get("QWEN3NP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="QWEN3NP_DATA does not name the folder of official Qwen3 files")
PUBLISHED = sorted((Path(DATA) / "chat_templates").glob("*.jinja")) if DATA else []
USER = [{"role": "user", "content": "hi"}]


def vectors():
    """The published renders: (the checkpoint's template, the arguments, text, ids) each."""
    for case in json.loads((Path(DATA) / "vectors/chat_vectors.json").read_bytes())["cases"]:
        config = json.loads((Path(DATA) / "checkpoints" / case["checkpoint"] / "tokenizer_config.json").read_bytes())
        names = ("messages", "tools", "add_generation_prompt", "enable_thinking")
        yield config["chat_template"], {name: case[name] for name in names}, case["text"], case["ids"]


@needs_data
def test_published_renders():
    tokenizer = Tokenizer.from_folder(Path(DATA) / "tokenizer")
    cases = list(vectors())
    assert len(cases) == 120
    for template, arguments, text, ids in cases:
        assert render_chat(template, **arguments) == text
        assert tokenizer.encode(text) == ids


@needs_data
def test_through_the_tokenizer(tmp_path):
    template, arguments, text, _ = next(vectors())
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "tokenizer.json").touch()
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(**arguments) == text


@needs_data
def test_the_other_process_renders_the_same():
    for template, arguments, text, _ in list(vectors())[::24]:
        assert render_chat(template + "{# not the published one #}", **arguments) == text


@needs_data
def test_published_templates_need_no_other_process(monkeypatch):
    monkeypatch.delattr(chat, "_render_apart")
    configs = list((Path(DATA) / "checkpoints").glob("*/tokenizer_config.json"))
    templates = [json.loads(config.read_bytes())["chat_template"] for config in configs]
    for template in templates + [file.read_text(encoding="utf-8") for file in PUBLISHED]:
        assert "<|im_start|>user\nhi<|im_end|>\n" in render_chat(template, USER)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ enable_thinking is defined }} {{ tools is none }} {{ documents is none }}", "False True True"),
        ("{{ color }} {{ add_generation_prompt }}", "blue True"),
        ("{% for i in range(9) %}\n  {% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}\n{{ i }}\n"
         "{% endfor %}\n", "0\n1\n3\n"),
        ("{{ {'b': '<é>&\\'', 'a': 1} | tojson }}", '{"b": "<é>&\'", "a": 1}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
         '{"a":1,"b":"\\u00e9"}'),
        ("{{ strftime_now('%%d') }}", "%d"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1) }} {{ dict.fromkeys('ab', 0) }}", "{'a': 1} {'a': 0, 'b': 0}"),
        ("{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}", "21"),
        ("{{ '😀 \\ud800' }}", "😀 \ud800"),
    ],
)  # fmt: skip
def test_what_templates_find(template, text):
    assert render_chat(template, USER, color="blue") == text


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        ({"content": None, "tool_calls": [{"name": "f"}]}, {"tool_calls": [{"name": "f"}]}),
        ({"content": None, "refusal": None}, {"content": ""}),  # of a client of OpenAI's API
        ({"reasoning": "r"}, {"thinking": "r", "reasoning": "r", "reasoning_content": "r"}),
        (
            {"reasoning": "r", "thinking": "t", "content": ""},
            {"thinking": "t", "reasoning": "r", "content": "", "reasoning_content": "t"},
        ),
        (
            {"thinking": "t", "reasoning_content": "c", "content": ""},
            {"thinking": "t", "reasoning_content": "c", "content": ""},
        ),
    ],
)
def test_what_assistants_say(message, rendered):
    messages = [{"role": "assistant"} | message]
    kept = copy.deepcopy(messages)
    text = render_chat("{{ tools }}{{ messages[0] | tojson }}", messages, tools=[])
    assert text.startswith("[]")
    assert json.loads(text[2:]) == {"role": "assistant"} | rendered
    assert messages == kept


def test_the_role_developer_is_system_unless_the_template_knows_it():
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    assert render_chat("{{ messages[0].role }}", messages) == "system"
    assert render_chat("{# developer #}{{ messages[0].role }}", messages) == "developer"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "conversation is empty"),
        (["hi"], r"messages\[0\] is not a dict"),
        ([*USER, {"content": "hi"}], r"messages\[1\] has the role None"),
        ([*USER, {"role": "wizard", "content": "hi"}], "'wizard', which is none of system, user, assistant, tool"),
        ([{"role": "user"}], r"messages\[0\] \(user\) needs content"),
        ([{"role": "tool", "content": None}], r"\(tool\) needs content"),
        ([{"role": "tool", "content": {"degrees": 21}}], r"\(tool\) needs content, .*; json.dumps makes a string"),
        ([{"role": "assistant"}], r"\(assistant\) needs content"),
        ([{"role": "system", "content": 3}], "needs content, a string"),
        ([{"role": "user", "content": []}], "needs content, a string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\] must be a text part"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\] must be a text part"),
        ([*USER, {"role": "tool", "content": {"grad": 21}}], r"messages\[1\] \(tool\) needs content"),
        ([{"role": "user", "content": "hi", "image": object()}], "must be JSON data"),
    ],
)
def test_messages_that_no_template_should_see(messages, words):
    with pytest.raises(ValueError, match=words):
        render_chat("{{ messages }}", messages)


def test_tools_that_no_template_should_see():
    with pytest.raises(ValueError, match="tools must be a list of JSON schemas"):
        render_chat("", USER, tools=[print])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% for %}", "line 2: TemplateSyntaxError: Expected an expression"),
        ("a\n\n{% if x %}", "line 3: TemplateSyntaxError"),
        ("\n{{ x | unknown }}", "line 2: TemplateAssertionError: No filter named 'unknown'"),
        ("\n\n\n{{ 1 / 0 }}", "line 4: ZeroDivisionError"),
        ("\n{{ nobody.knows.this }}", "line 2: UndefinedError: 'nobody' is undefined"),
        ("{% macro f() %}\n{{ raise_exception('no\nsuch\x1b[2J role') }}\n{% endmacro %}\n\n{{ f() }}",
         r"line 2: TemplateError: no such \[2J role"),
        ("{% include 'secret' %}", "line 1: TypeError: no loader"),
    ],
)  # fmt: skip
def test_broken_templates_say_where(template, words):
    with pytest.raises(ValueError, match="^chat template, " + words):
        render_chat(template, USER)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) if n < 60 }}{% endmacro %}{{ f(0) }}",
        "{{ 10**(10**10) }}",
        "{{ lipsum(n=10**6) }}",
    ],
)
def test_templates_that_take_for_ever_end(template, monkeypatch):
    monkeypatch.setattr(chat, "_PATIENCE", 0.5)
    with pytest.raises(ValueError, match=r"the chat template takes more than 0\.5 s"):
        render_chat(template, USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ('a' * 7 * 10**8) | length }}",
        "{{ 'a' * 10**12 }}",
        "{{ [0] * 10**12 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ (['a' * 10**8] * 9) | join }}",
        "{{ strftime_now('%Y' * 10**9) }}",
        "{% set ns = namespace(s='a' * 10**6) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ],
)
def test_templates_that_take_all_memory_end(template):
    with pytest.raises(ValueError, match="the chat template takes more than 512 MiB"):
        render_chat(template, USER)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "line 1: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: RecursionError"),
        ("{{ " + "(" * 10**4 + " }}", "RecursionError"),
        ("{% if x %}" * 10**3, "RecursionError"),
        ("{{ 'a' * (2**24 + 1) }}", "wrote more than 16,777,216 characters"),
        ("{{ raise_exception('a' * 10**7) }}", "TemplateError: a{500}$"),
    ],
)
def test_templates_that_go_too_far_are_told(template, words):
    with pytest.raises(ValueError, match=f"^(the )?chat template.*{words}"):
        render_chat(template, USER)


@pytest.mark.slow  # it uses up the 5 s
@pytest.mark.skipif(sys.platform == "win32", reason="the system limits no processor time")
def test_a_template_ends_at_its_processor_time():
    with pytest.raises(ValueError, match=r"the chat template takes more than 5 s"):
        render_chat("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", USER)


PARTS = [{"type": "text", "text": "Hallo "}, {"type": "text", "text": "Welt"}]


def test_text_parts_are_joined_unless_the_template_reads_them():
    # vLLM and llama.cpp join them with a line break; transformers leaves them to the template
    reads = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render_chat(reads, [{"role": "user", "content": PARTS}]) == "<Hallo ><Welt>"
    for template in (
        "{{ messages[0].content }}",
        "{{ messages[0]['content'] | trim }}",
        "{{ 'x' + messages[0].content }}",
    ):
        assert render_chat(template, [{"role": "user", "content": PARTS}]).endswith("Hallo \nWelt")


def test_an_unfinished_message_is_not_finished():
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}+{% endif %}"
    messages = [*USER, {"role": "assistant", "content": "Paris is "}]
    assert render_chat(template, messages, continue_final_message=True) == f"[{USER[0]['content']}][Paris is "
    assert render_chat(
        template.replace("m.content", "m.content | trim"), messages, continue_final_message=True
    ).endswith("[Paris is")
    with pytest.raises(ValueError, match="does not repeat the last message"):
        render_chat("nothing", messages, continue_final_message=True)


def test_another_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(chat, "__file__", "no_such_program.py")
    with pytest.raises(ValueError, match=r"the chat template cannot be rendered: .*no_such_program\.py"):
        render_chat("", USER)


def test_another_process_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "no_such_python")
    with pytest.raises(ValueError, match=r"its process does not start: .*no_such_python"):
        render_chat("", USER)


@pytest.mark.slow
def test_the_other_process_ends_by_itself():
    job = json.dumps({"template": "{{ 10**(10**10) }}", "variables": {}, "path": sys.path})
    done = subprocess.run([sys.executable, chat.__file__], input=job, text=True, timeout=60)
    assert done.returncode < 0


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ tools.__class__.__base__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "{{ dict.update(messages[0], role='system') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('{0.__class__.__mro__}').format(1)[0] }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ (['{0.__class__}'] | map('format', 1) | list)[0].x.y }}",
        "{% import 'os' as os %}",
    ],
)
def test_hostile_templates_reach_nothing(template):
    with pytest.raises(ValueError, match=r"^chat template, line 1: (SecurityError|UndefinedError|TypeError)"):
        render_chat(template, USER)


# Conversations as people and programs write them, with all that the templates look for.
texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_response>", "</tool_response>", "<|im_end|>", "\n", " ", "{{ 1 }}"])
    | st.text(max_size=8),
    max_size=6,
).map("".join)
data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
functions = st.fixed_dictionaries({"name": texts, "arguments": texts | st.dictionaries(texts, data, max_size=3)})
calls = st.lists(functions | functions.map(lambda f: {"type": "function", "function": f}), max_size=3)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "tool"]), "content": texts}, optional={"name": st.none() | texts}
    )
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": texts},
        optional={
            "tool_calls": st.none() | calls,
            "reasoning_content": st.none() | texts,
            "reasoning": texts,
            "thinking": texts,
        },
    )
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "tool_calls": calls.filter(bool)}),
    min_size=1,
    max_size=6,
)
tools = st.none() | st.lists(st.dictionaries(texts, data, max_size=3), max_size=3)


def transformers_renders(template, messages, **arguments):
    """What transformers makes of it; None where it raises."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    try:
        return theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except Exception:
        return None


def ours_renders(template, messages, **arguments):
    try:
        return render_chat(template, messages, **arguments)
    except ValueError:
        return None


@pytest.mark.oracle
@needs_data
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
@settings(max_examples=300, deadline=None)
@given(messages=messages, tools=tools, prompt=st.booleans(), thinking=st.sampled_from([None, True, False]))
def test_transformers_renders_the_same(file, messages, tools, prompt, thinking):
    template = file.read_text(encoding="utf-8")
    arguments = {"tools": tools, "add_generation_prompt": prompt}
    theirs = transformers_renders(
        template, messages, **arguments, **({} if thinking is None else {"enable_thinking": thinking})
    )
    assert ours_renders(template, messages, **arguments, enable_thinking=thinking) == theirs


@pytest.mark.oracle
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=messages, tools=tools)
def test_transformers_renders_the_same_of_other_templates(messages, tools):
    template = """
    {%- for message in messages recursive %}
        {% generation %}{% set x = loop.index %}{{ x }}{{ message | tojson(indent=2) }}{% endgeneration %}
        {{ x is defined }} {{ message | dictsort }} {{ message.items() | list | length }} {{ loop.previtem }}
        {% if loop.index == 4 %}{% break %}{% endif %}
    {% endfor %}
    {{ dict(tools=tools, documents=documents) }} {{ color }} {{ strftime_now("%Y") }} {{ namespace(a=1).a }}
    """
    theirs = transformers_renders(template, messages, tools=tools, color="blue")
    assert ours_renders(template, messages, tools=tools, add_generation_prompt=False, color="blue") == theirs


@pytest.mark.oracle
@needs_data
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
@settings(max_examples=200, deadline=None)
@given(messages=messages, text=st.text("ab \n</>", min_size=1, max_size=8).filter(str.strip))
def test_transformers_continues_the_same(file, messages, text):
    template = file.read_text(encoding="utf-8")
    messages = [*messages, {"role": "assistant", "content": text}]
    theirs = transformers_renders(template, messages, continue_final_message=True)
    assert ours_renders(template, messages, continue_final_message=True) == theirs
