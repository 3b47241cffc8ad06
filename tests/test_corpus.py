"""The corpus of the built-in checkpoint: held-out material is not in the training set, and all statements are true."""

import calendar
import json
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise

import pytest

from qwen3np.training import corpus as corpus_module
from qwen3np.training.corpus import Corpus, main, make_corpus
from qwen3np.training.documents import read_documents
from qwen3np.training.facts import CAPITALS, COLOURS, LEGS, OPPOSITES, PLURALS, RELATIONS

UNKNOWN = "I don't know that."
OPENING = re.compile(
    r"^(please tell me|quick question|question|i have a question|hello|hi|hey|ok|now tell me|one more question)[:!.] "
)


@cache
def corpus() -> Corpus:
    return make_corpus()


def plain(text):
    """A question as it is compared here: without case, opening, please and end mark."""
    return OPENING.sub("", text.lower()).rstrip(" ?.!").removesuffix(", please")


@cache
def conversations():
    return [document for document in corpus().training if not isinstance(document, str)]


@cache
def asked():
    """Every user message of training, plain, with the answers it got as the first of its conversation."""
    answers = defaultdict(set)
    for messages in conversations():
        turns = [message for message in messages if message["role"] != "system"]
        for i, (user, assistant) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            answers[plain(user["content"])] |= {assistant["content"]} if i == 0 else set()
    return answers


@cache
def said():
    """Every sentence of the plain text of training, with how often it is said."""
    texts = (document for document in corpus().training if isinstance(document, str))
    return Counter(sentence for text in texts for sentence in re.split(r"(?<=\.)[ \n]", text))


def text_of(document):
    return document if isinstance(document, str) else "\n".join(message["content"] for message in document)


def pattern(template):
    return re.compile(".+".join(re.escape(part) for part in re.split(r"{.*?}", template)), re.IGNORECASE)


def test_a_seed_is_a_corpus():
    assert make_corpus() == corpus()
    assert make_corpus(1).training != corpus().training


def test_sizes():
    assert 15_000 <= len(corpus().training) <= 40_000
    assert 300 <= len(corpus().held_out) <= 600
    characters = sum(len(json.dumps(document)) for document in corpus().training)
    assert 4e6 < characters < 8e6
    kinds = Counter(question.kind for question in corpus().questions)
    assert kinds["phrasing"] >= 400
    assert kinds["pair"] >= 200
    assert kinds["two turns"] >= 100
    assert kinds["unknown"] >= 100
    assert sum(len(relation.facts) for relation in RELATIONS) > 1000


def test_documents_are_well_formed():
    for document in corpus().training + corpus().held_out:
        if isinstance(document, str):
            assert document == document.strip()
            assert re.fullmatch(r"[A-Z0-9].*\.", document, re.DOTALL)
        else:
            roles = [message["role"] for message in document]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert all(message["content"].strip() == message["content"] != "" for message in document)
        assert not re.search(r"[{}]|  ", text_of(document))


def test_no_held_out_phrasing_is_in_training():
    for relation in RELATIONS:
        assert len(relation.held_out_questions) >= 2
        for template in relation.held_out_questions:
            form = pattern(template.rstrip("?.!"))
            assert not [text for text in asked() if form.fullmatch(text)], template
        assert len(relation.held_out_statements) >= 2 or not relation.statements
        for template in relation.held_out_statements:
            form = pattern(template)
            assert not [text for text in said() if form.fullmatch(text)], template


def test_held_out_phrasings_are_of_words_that_training_knows():
    known = {word for document in corpus().training for word in re.findall(r"[a-z']+", text_of(document).lower())}
    for relation in RELATIONS:
        for template in relation.held_out_questions + relation.held_out_statements:
            assert set(re.findall(r"[a-z']+", re.sub(r"{.*?}", "", template).lower())) <= known, template


def test_no_question_is_in_training():
    dialogues = {
        (plain(a["content"]), plain(b["content"]))
        for messages in conversations()
        for a, b in pairwise([message for message in messages if message["role"] == "user"])
    }
    for question in corpus().questions:
        if isinstance(question.prompt, str):
            assert not [text for text in said() if text.startswith(question.prompt + " ")], question
            continue
        users = [plain(message["content"]) for message in question.prompt if message["role"] == "user"]
        if question.kind == "two turns":
            assert tuple(users) not in dialogues, question
        else:
            assert users[-1] not in asked(), question


def test_no_held_out_document_is_in_training():
    for document in corpus().held_out:
        if isinstance(document, str):
            assert document not in said()
        else:
            assert plain(document[-2]["content"]) not in asked()


def test_no_two_questions_are_alike():
    prompts = [
        q.prompt if isinstance(q.prompt, str) else tuple(plain(m["content"]) for m in q.prompt if m["role"] == "user")
        for q in corpus().questions
    ]
    assert len(set(prompts)) == len(prompts)


def test_no_question_has_two_answers():
    answers = defaultdict(set, {text: set(found) for text, found in asked().items()})
    for question in corpus().questions:
        if question.kind != "two turns" and not isinstance(question.prompt, str):
            answers[plain(question.prompt[-1]["content"])].add(question.answer)
    assert {text: found for text, found in answers.items() if len(found) > 1} == {}


def test_no_statement_goes_on_in_two_ways_where_its_answer_begins():
    rest = defaultdict(set)
    for relation in RELATIONS:
        for template in {relation.answer, *relation.statements, *relation.held_out_statements}:
            for fact in relation.facts if relation.statements else ():
                answer = list(fact)[-1]
                prompt, end = (part.format_map(fact) for part in template.split(f"{{{answer}}}"))
                if prompt.strip():
                    rest[prompt[0].upper() + prompt[1:]].add(fact[answer] + end)
    goes_on = {prompt: set(ends) for prompt, ends in rest.items()}
    for sentence in said():
        for match in re.finditer(" ", sentence):
            if sentence[: match.end()] in rest:
                goes_on[sentence[: match.end()]].add(sentence[match.end() :])
    assert {prompt: ends for prompt, ends in goes_on.items() if len(ends) > 1} == {}
    assert goes_on["The capital of France is "] == {"Paris."}
    assert goes_on["The opposite of hot is "] == {"cold."}
    assert goes_on["Seven plus five is "] == {"twelve."}
    assert goes_on["The day after Monday is "] == {"Tuesday."}
    assert said().keys() >= {"The capital of France is Paris.", "The opposite of hot is cold."}
    assert said().keys() >= {"Seven plus five is twelve.", "The day after Monday is Tuesday."}


def test_each_fact_is_often_in_training():
    answers = Counter(
        message["content"] for messages in conversations() for message in messages if message["role"] == "assistant"
    )
    for relation in RELATIONS:
        for fact in relation.facts:
            sentence = relation.answer.format_map(fact)
            sentence = sentence[0].upper() + sentence[1:]
            assert answers[sentence] >= 13, sentence
            if relation.statements:
                forms = {relation.answer, *relation.statements}
                filled = [form.format_map(fact) for form in forms]
                count = sum(said()[text[0].upper() + text[1:]] for text in filled)
                assert answers[sentence] + count >= 25, sentence


def test_answers_are_one_sentence_of_the_tables():
    sentences = {UNKNOWN}
    for relation in RELATIONS:
        for fact in relation.facts:
            text = relation.answer.format_map(fact)
            sentences.add(text[0].upper() + text[1:])
    for messages in [*conversations(), *(d for d in corpus().held_out if not isinstance(d, str))]:
        for message in messages:
            assert message["role"] != "assistant" or message["content"] in sentences, message
    statements = set()
    for relation in RELATIONS:
        for template in {relation.answer, *relation.statements, *relation.held_out_statements}:
            filled = [template.format_map(fact) for fact in relation.facts]
            statements |= {text[0].upper() + text[1:] for text in filled}
    for question in corpus().questions:
        if isinstance(question.prompt, str):
            assert question.prompt + question.answer in statements
            assert re.fullmatch(r" [^.]+\.", question.answer)
        else:
            assert question.answer in sentences


def test_what_is_said_of_days_and_months_is_true():
    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    text = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
    ordinals = text.split()
    found = Counter()
    for sentence in said().keys() | {answer for answers in asked().values() for answer in answers}:
        for kind, names in (("day", days), ("month", months)):
            if match := re.fullmatch(rf"The {kind} (after|before) (\w+) is (\w+)\.", sentence):
                step = 1 if match[1] == "after" else -1
                assert names[(names.index(match[2]) + step) % len(names)] == match[3]
                found[kind] += 1
        if match := re.fullmatch(r"(\w+) is the (\w+) month of the year\.", sentence):
            assert months.index(match[1]) == ordinals.index(match[2])
            found["number"] += 1
        if match := re.fullmatch(r"The (\w+) month of the year is (\w+)\.", sentence):
            assert ordinals.index(match[1]) == months.index(match[2])
            found["number"] += 1
    assert found == {"day": 2 * 7, "month": 2 * 12, "number": 2 * 12}


def test_what_is_said_of_numbers_is_true():
    ones = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four"""
    value = {word: n for n, word in enumerate(ones.split())} | {str(n): n for n in range(100)}
    found = Counter()
    for sentence in said().keys() | {answer for answers in asked().values() for answer in answers}:
        text = sentence.lower()
        for name, form, truth in (
            ("sum", r"(\S+) (?:\+|plus|and) (\S+) (?:=|is|equals|make) (\S+)\.", lambda a, b: a + b),
            ("difference", r"(\S+) (?:-|minus) (\S+) (?:=|is|equals) (\S+)\.", lambda a, b: a - b),
            ("add", r"if you add (\S+) and (\S+), you get (\S+)\.", lambda a, b: a + b),
            ("take", r"if you (?:take|subtract) (\S+) from (\S+), you get (\S+)\.", lambda a, b: b - a),
            ("left", r"taking (\S+) from (\S+) leaves (\S+)\.", lambda a, b: b - a),
        ):
            if match := re.fullmatch(form, text):
                a, b, c = (value[group] for group in match.groups())
                assert truth(a, b) == c, sentence
                found[name] += 1
        if match := re.fullmatch(r"the number (after|before) (\S+) is (\S+)\.", text):
            assert value[match[3]] - value[match[2]] == (1 if match[1] == "after" else -1)
            found["beside"] += 1
        if (match := re.fullmatch(r"in (?:words|digits), (\S+) is (\S+)\.", text)) and match[1] in value:
            assert value[match[1]] == value.get(match[2], value[match[1]])
            found["words"] += 1
    assert min(found[name] for name in ("sum", "difference", "add", "take", "left", "beside", "words")) > 40


def test_tables_have_no_two_answers_for_one_subject():
    for relation in RELATIONS:
        subjects = Counter(tuple(fact.values())[:-1] for fact in relation.facts)
        assert max(subjects.values()) == 1, relation.name
    countries = [country for table in CAPITALS.values() for country, _ in table]
    assert len(countries) == len(set(countries)) >= 145


def test_well_known_facts():
    capitals = dict(row for table in CAPITALS.values() for row in table)
    expected = {
        "France": "Paris",
        "Australia": "Canberra",
        "Canada": "Ottawa",
        "Turkey": "Ankara",
        "Brazil": "Brasilia",
    }
    assert expected.items() <= capitals.items()
    assert ("France", "Paris") in CAPITALS["Europe"]
    assert {("hot", "cold"), ("cold", "hot"), ("left", "right")} <= set(OPPOSITES)
    assert "right" not in dict(OPPOSITES)  # of left, or of wrong
    assert {("mouse", "mice"), ("cat", "cats"), ("city", "cities")} <= set(PLURALS)
    assert {("snow", "white"), ("grass", "green")} <= set(COLOURS)
    assert {("spider", "eight"), ("ant", "six"), ("snake", "no")} <= set(LEGS)


def test_opposites_hold_in_both_directions_where_both_are_said():
    table = dict(OPPOSITES)
    for word, opposite in OPPOSITES:
        assert table.get(opposite, word) == word


def test_unknown_and_small_talk_are_a_share_of_the_conversations():
    answers = Counter(messages[-1]["content"] for messages in conversations())
    assert 0.08 < answers[UNKNOWN] / answers.total() < 0.25
    assert len([text for text, found in asked().items() if found == {UNKNOWN}]) > 1000


def test_the_command_writes_what_can_be_read_again(tmp_path, monkeypatch, capsys):
    small = Corpus(corpus().training[:20], corpus().held_out[:5], [])
    monkeypatch.setattr(corpus_module, "make_corpus", lambda: small)
    main([str(tmp_path / "new")])
    assert read_documents(tmp_path / "new" / "training.jsonl") == small.training
    assert read_documents(tmp_path / "new" / "held_out.jsonl") == small.held_out
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "new")])
    assert exit_.value.code == 2
    assert "exists" in capsys.readouterr().err
