"""The corpus of the built-in checkpoint: facts stated and asked in many ways, some of them held out for testing.

`python -m qwen3np.training.corpus FOLDER` writes it as training.jsonl and held_out.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from qwen3np.training.documents import Document
from qwen3np.training.facts import RELATIONS, Fact, Relation, a, fill, number_words, possessive, words

T = TypeVar("T")
Message: TypeAlias = dict[str, str]  # "role", "content"
Phrased: TypeAlias = tuple[Fact, str]  # a fact, and the template to state it or ask for it

UNKNOWN_ANSWER = "I don't know that."
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions in one short sentence.",
    "You are a very small language model.",
    "Answer the question. If you do not know the answer, say so.",
    "You know a few simple facts.",
)
OPENINGS = (
    "Please tell me: ",
    "Quick question: ",
    "Question: ",
    "I have a question: ",
    "Hello! ",
    "Hi! ",
    "Hey! ",
    "OK. ",
    "Now tell me: ",
    "One more question: ",
)

STATEMENTS_PER_FACT, QUESTIONS_PER_FACT = 18, 13  # in training, at least; each phrasing in turn
STATEMENTS_PER_RELATION, QUESTIONS_PER_RELATION = 300, 300  # more of each fact where a relation has few
SMALL_TALK = 70  # and at most this many of each: it matters for small talk, relations of one fact
UNKNOWN = 3800  # turns
TURNS, SENTENCES = (5, 3, 2, 1), (12, 2, 1, 1)  # how frequent documents of 1, 2, 3, 4 are, before follow-ups
FOLLOW_UPS, MOST_TURNS = 0.25, 4
HELD_OUT_PAIRS = 0.05  # of the pairs of a fact and a phrasing
PHRASING_QUESTIONS, PAIR_QUESTIONS = 12, 6  # per relation, as many chat questions as completions
TWO_TURN_QUESTIONS, UNKNOWN_QUESTIONS = 120, 150
HELD_OUT_DOCUMENTS = 400


@dataclass(frozen=True)
class Question:
    """A question for a trained checkpoint, and its only right answer.

    kind: "phrasing" and "pair" are held out of training as whole phrasings, or as pairs of a fact and a phrasing;
    "unknown" has no answer in the facts; "two turns" asks two things one after the other, the answer is the second's.
    """

    kind: str
    relation: str
    prompt: str | list[Message]  # text to complete up to the full stop, or a conversation to answer
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents to measure the loss on, and questions to ask."""

    training: list[Document]
    held_out: list[Document]
    questions: list[Question]


class Turn(NamedTuple):
    """A question of a user and its answer."""

    relation: Relation
    question: str
    answer: str


# ----------------------------------------------------------------------------------------------------------------------
# Unknown questions: templates, in which each {slot} is filled from the words below or made (_MADE). Templates behind a
# `*` are held out of training, and so are the words after the `*` of a list.

_UNKNOWN = """
Why is {the noun} {adjective}?
Why do {plural} {verb}?
Why does {person} {verb}?
Why is the sky so {adjective}?
Who wrote {title}?
Who painted {title}?
Who invented {the noun}?
Who discovered {substance}?
Who is {person}?
Who was {person}?
Who is the president of {country}?
Who is the king of {country}?
Who won the {sport} match?
Who is your favourite {job}?
When was {person} born?
When did {person} die?
When was {the noun} invented?
When does the {event} start?
When was {country} founded?
Where does {person} live?
Where can I buy {plural}?
Where is my {noun}?
Where is {place}?
What is the population of {country}?
What is the highest mountain in {country}?
What is the longest river in {country}?
What is the flag of {country}?
What is the national anthem of {country}?
What is the largest city in {country}?
What is the weather like in {place}?
What is the time in {place}?
What is the meaning of {noun}?
What is the meaning of life?
What is the price of {a noun}?
What is {a noun} made of?
What is {substance}?
What is {subject}?
What is inside {the noun}?
What is a synonym of {adjective}?
What rhymes with {noun}?
What is the French word for {noun}?
What is the past tense of {verb}?
What is the square root of {number}?
What is {small} times {small}?
What is {small} * {small}?
What is {small} divided by {small}?
What is {small} x {small}?
What is {number} percent of {number}?
What is {big} + {number}?
What is {small} + {big}?
What is {big} plus {small}?
{big} + {big}
{big}+{big}
{small}+{big}
{small} + {big}
{big} - {small}
{big} - {big}
What is {big} minus {number}?
What is {big words} plus {small words}?
What is {small words} plus {big words}?
What is {small words} times {small words}?
What is {small} - {small}?
What is {small} minus {small}?
{small} - {small}
What is {small words} minus {small words}?
What is {small} + {small} + {small}?
{small} + {small} + {small}
{small} + {small} - {small}
{small}+{small}+{small}
{big words} plus {big words}
How much is {big} + {small}?
{small} * {small}
{small} / {small}
{small} times {small}
What do {plural} eat?
What does {person} like?
What should I cook with {substance}?
What should I wear to the {event}?
What happened in {year}?
What is the best {noun}?
What is your favourite {noun}?
What are the rules of {sport}?
What did {person} say about {plural}?
Which is better, {a noun} or {a noun}?
Which {noun} should I buy?
Which team won the {sport} game in {year}?
How do I {verb} {a noun}?
How do {plural} {verb}?
How does {a noun} work?
How far is it from {place} to {place}?
How old is {person}?
How tall is {person}?
How many people live in {country}?
How many {plural} are there in {place}?
How many {plural} are there in the world?
How much does {a noun} cost?
How much does {a noun} weigh?
How long does it take to {verb} {a noun}?
How fast is {a noun}?
How do you say {noun} in {language}?
Can you {verb} {a noun}?
Can {plural} {verb}?
Can you speak {language}?
Do {plural} {verb}?
Do you like {plural}?
Do you love me?
Does {person} have {a noun}?
Is {person} {adjective}?
Is {substance} {adjective}?
Is it going to rain in {place}?
Will it be {adjective} tomorrow?
Will {person} win the {event}?
Should I {verb} my {noun}?
Tell me a joke.
Tell me a joke about {plural}.
Tell me a story about {a noun} and {a noun}.
Tell me about {subject}.
Tell me about {person}.
Tell me the history of {place}.
Tell me something {adjective} about {plural}.
Write a poem about {the noun}.
Write a story about {person}.
Write a letter to my {job}.
Write a song about {plural} and {plural}.
Write a Python function that finds {plural}.
Write code to sort {plural}.
Write a program for {subject}.
Explain {subject}.
Explain {subject} to a child.
Explain how {a noun} works.
Translate "{the noun} is {adjective}" to {language}.
Translate {noun} into {language}.
Summarise {title}.
Recommend a film about {adjective} {plural}.
Recommend a book about {subject}.
Give me a recipe for {substance}.
Give me a list of {plural}.
Give me advice about {subject}.
Find {a noun} near {place}.
Book a table in {place}.
Play {title}.
Sing a song about {substance}.
Draw {a noun}.
Describe {the noun}.
Compare {plural} and {plural}.
I want to {verb} {a noun}.
I need {a noun} for the {event}.
I am {adjective} today.
I feel {adjective}.
My {noun} is {adjective}.
My {job} says that {plural} are {adjective}.
My name is {person}.
{person} is {adjective}.
{plural} are {adjective}.
{noun}
{adjective} {noun}
{noun} {noun} {noun}
{verb} {plural}
{person}
{gibberish}
{gibberish} {gibberish}
{gibberish} {gibberish} {gibberish}?
What is {gibberish}?
What does {gibberish} mean?
{foreign}
{foreign}
{foreign}
{foreign}
* Why are {plural} so {adjective}?
* Who built {the noun}?
* Who is the president of {place}?
* What is the largest river in {country}?
* What is the price of {substance}?
* How many {plural} does {person} have?
* Tell me a story about {adjective} {plural}.
* Write a poem about {plural}.
* Explain to me how {plural} work.
* Do you know {person}?
* I like {plural}.
* Translate {adjective} into {language}.
"""

_WORDS = {
    "noun": """
bridge, computer, telephone, engine, mountain, river, cloud, candle, mirror, letter, bottle, ladder, wheel, carpet,
jacket, castle, tunnel, museum, forest, island, planet, rocket, camera, guitar, piano, violin, ticket, wallet,
umbrella, blanket, pillow, kettle, fridge, oven, hammer, needle, basket, bucket, helmet, market, office, airport,
hotel, hospital, library, factory, bakery, kitchen, garage, cellar, volcano, desert, glacier, magnet, battery,
printer, robot, satellite, telescope, compass, calendar, dictionary, newspaper, password, keyboard, screen, website,
contract, tax, holiday, wedding, passport, suitcase, bicycle, tractor, lorry, ship, submarine, parachute, balloon,
feather, shadow, dream, secret, puzzle, treasure, dragon, ghost, wizard, giant, elevator, clock, lamp, shoe, sofa,
spoon, stone, stamp
* lantern, scooter, microscope, fountain, trumpet, envelope, staircase, blender
""",
    "plural": """
bridges, computers, telephones, mountains, rivers, clouds, candles, letters, bottles, planets, rockets, cameras,
tickets, volcanoes, magnets, batteries, robots, satellites, newspapers, passwords, keyboards, websites, taxes,
holidays, shoes, clocks, stones, dragons, ghosts, wizards, giants, dreams, secrets, puzzles, numbers, words, lions,
dogs, cats, horses, bees, spiders, whales, birds, snakes, elephants, cows, doctors, artists, farmers, soldiers,
pirates, films, songs, poems, novels, games, cakes, noodles, mushrooms, onions, grapes, walnuts, vegetables,
dinosaurs, viruses, atoms, stars, comets, storms, earthquakes, glaciers, diamonds, coins, banks, trains, planes,
bicycles, people, friends
* lanterns, trumpets, envelopes, potions, tigers, carpenters
""",
    "adjective": """
tired, hungry, angry, bored, nervous, lonely, proud, jealous, curious, famous, popular, important, dangerous, useful,
useless, healthy, sick, red, green, purple, round, square, flat, heavy, bright, sticky, salty, bitter, spicy, frozen,
broken, hidden, ancient, electric, magnetic, digital, wooden, golden, invisible, noisy, gentle, funny, serious,
strange, scary, expensive, comfortable, crowded, foggy, rainy, sunny, windy, stormy, hot, cold, big, small
* fluffy, mysterious, delicious, transparent
""",
    "verb": """
sing, dance, swim, fly, sleep, paint, repair, clean, cook, bake, build, carry, climb, close, collect, cut, decorate,
drive, fold, freeze, grow, hide, measure, melt, move, open, park, plant, print, read, sell, send, steal, study, test,
tie, wash, watch, wear, weigh, wrap, write, boil, break, bend, borrow, install, record, recycle
* polish, sharpen, juggle, assemble
""",
    "substance": """
water, gold, iron, oxygen, electricity, rice, bread, soup, honey, sand, glass, paper, wood, plastic, oil, cheese,
wine, tea, pasta, garlic, cinnamon, vanilla, steel, copper, mercury, uranium, penicillin, radium, gravity, pepper,
yoghurt, pizza, curry, salad, porridge, marble, concrete, silk, wool, leather
* helium, caramel, rubber
""",
    "subject": """
quantum physics, photosynthesis, democracy, inflation, the French Revolution, the Roman Empire, algebra, black holes,
evolution, climate change, machine learning, neural networks, the stock market, philosophy, chess openings,
the Middle Ages, the solar system, grammar, poetry, jazz, football, gardening, computer science, the internet,
economics, genetics, chemistry, the Second World War, mythology, architecture, psychology, artificial intelligence,
blockchain
* astronomy, the Stone Age, relativity, opera
""",
    "person": """
Shakespeare, Napoleon, Einstein, Mozart, Beethoven, Cleopatra, Julius Caesar, Newton, Darwin, Picasso,
Leonardo da Vinci, Marie Curie, Galileo, Columbus, Gandhi, Lincoln, Aristotle, Plato, Homer, Dante, Goethe, Tolstoy,
Jane Austen, Charles Dickens, Mark Twain, Elvis Presley, Michael Jackson, Madonna, Batman, Superman, Harry Potter,
Sherlock Holmes, Santa Claus, Robin Hood, Cinderella, Peter, Maria, Anna, Tom, John, Mary, Paul, Lucy, Emma, Oliver,
Sophie, Ali, Fatima, Wei, Yuki, Carlos, Ivan, Olga, Hans, Pierre, my mother, my brother, my neighbour, the president
* Vincent van Gogh, Nikola Tesla, Pippi Longstocking, Sarah, my uncle, Ludwig
""",
    "title": """
Hamlet, Faust, War and Peace, Moby Dick, the Mona Lisa, the Bible, Romeo and Juliet, Don Quixote, the Odyssey,
the Iliad, Dracula, Frankenstein, Robinson Crusoe, Alice in Wonderland, the Magic Flute, Star Wars,
The Lord of the Rings, Pride and Prejudice, Les Miserables, The Starry Night, Guernica, Yesterday, Let It Be, Titanic
* Macbeth, Pinocchio, Great Expectations
""",
    "place": """
New York, Los Angeles, Chicago, Boston, Texas, California, Florida, Sydney, Melbourne, Toronto, Vancouver, Hamburg,
Munich, Cologne, Bavaria, Milan, Venice, Naples, Sicily, Barcelona, Seville, Catalonia, Lyon, Marseille, Nice,
Normandy, Brittany, Manchester, Liverpool, Glasgow, Oxford, Cambridge, Istanbul, Mumbai, Kolkata, Shanghai, Hong Kong,
Osaka, Kyoto, Rio de Janeiro, Sao Paulo, Casablanca, Lagos, Johannesburg, Zurich, Geneva, Basel, Antwerp, Rotterdam,
Gothenburg, Bergen, Krakow, Saint Petersburg, Siberia, Hawaii, Alaska, Bali, Java, Crete, Corsica, Tibet, Greenland,
the Moon, Mars, Jupiter, Hollywood, Yorkshire, Cornwall, Lapland, Transylvania, the Sahara, the Alps, my town, London,
Paris, Tokyo, Rome, Berlin, Madrid, Cairo, Vienna
* Dubai, Nevada, Porto, Salzburg, Alberta, Bordeaux, Venus, Ibiza
""",
    "country": """
France, Spain, Germany, Italy, Japan, China, India, Brazil, Canada, Mexico, Egypt, Kenya, Norway, Sweden, Poland,
Greece, Turkey, Russia, Australia, Argentina, Peru, Chile, Cuba, Iran, Iraq, Nepal, Vietnam, Thailand, Portugal,
the Netherlands, the United States, the United Kingdom, Ireland, Iceland, Finland, Denmark, Austria, Hungary, Nigeria
* Morocco, Switzerland, Colombia
""",
    "language": """
French, German, Spanish, Italian, Latin, Greek, Japanese, Chinese, Korean, Arabic, Hebrew, Russian, Polish, Turkish,
Swahili, Hindi, Finnish, Dutch, Esperanto, Klingon
* Welsh, Sanskrit
""",
    "job": """
doctor, teacher, boss, dentist, plumber, baker, lawyer, singer, actor, writer, painter, scientist, pilot, nurse,
engineer, landlord, professor, politician
* butcher, tailor
""",
    "sport": """
football, tennis, chess, basketball, hockey, golf, cricket, rugby, boxing, volleyball
* baseball, fencing
""",
    "event": """
meeting, concert, party, election, race, wedding, festival, exam, match, lesson, show, World Cup, Olympics
* interview, funeral
""",
    "foreign": """
Wie geht es dir?, Wie spät ist es?, Guten Tag, Ich verstehe das nicht., Was ist die Hauptstadt von Frankreich?,
Wer bist du?, Was kostet das?, Wo ist der Bahnhof?, Wie heißt du?, Erzähl mir einen Witz., Ich habe Hunger.,
Danke schön, Bonjour, Comment ça va ?, Quelle heure est-il ?, Où est la gare ?, Je ne comprends pas., Qui es-tu ?,
Merci beaucoup, Quelle est la capitale de la France ?, Raconte-moi une histoire., Hola, ¿Cómo estás?, ¿Qué hora es?,
Muchas gracias, ¿Dónde está la playa?, No entiendo nada., ¿Cuál es la capital de España?, ¿Quién eres?, Buenos días,
Ciao, Come stai?, Che ore sono?, Non capisco., Dove si trova la stazione?, Qual è la capitale dell'Italia?,
Grazie mille, Olá, Tudo bem?, Onde fica a praia?, Obrigado, Hoe gaat het?, Ik begrijp het niet., Waar is het station?,
Hej, Hur mår du?, Jag vet inte., Tak, Hvordan har du det?, Mitä kuuluu?, Kiitos, Dzień dobry, Jak się masz?,
Dobrý den, Jak se máš?, Nasılsın?, Merhaba, Привет, Как дела?, Кто ты?, Где находится вокзал?, Γεια σου, Τι κάνεις;,
你好, 你是谁？, 法国的首都是哪里？,
今天天气怎么样？, こんにちは, あなたは誰ですか？, 안녕하세요, مرحبا, كيف حالك؟, שלום, नमस्ते, สวัสดี
* Wie wird das Wetter?, Guten Morgen, Où habites-tu ?, ¿Cómo te llamas?, Come ti chiami?, Что это такое?, 谢谢,
Hur gammal är du?
""",
}

# Subjects that the facts do not know, by slot; names of other lists stand for any of their words.
_STRANGE = {
    "country": """
place, name, name, name, Atlantis, Narnia, Mordor, Wakanda, Neverland, Utopia, Middle-earth, Gotham City, Babylon,
Prussia, Yugoslavia, the Soviet Union, Europe, Asia, Africa, South America, Antarctica, the world, the universe,
my heart, the Roman Empire, Oz, Disneyland, Minecraft
* name, name, El Dorado, Camelot, Westeros, Persia, the sea
""",
    "capital": """
place, name, name, name, Atlantis, Gotham City, Camelot, Springfield
* name, name, Minas Tirith, Emerald City, Troy
""",
    "word": """
noun, adjective, adjective, verb, plural, person, gibberish, blue, green, yellow, Monday, seven, music, water, bread,
paper, purple, idea, television, Tuesday, Europe, mathematics, eleven, wood, elephant, cat
* gibberish, orange, thunder, river bank, geometry
""",
    "one": """
noun, noun, substance, gibberish, name, lanternfish, snowboard, quark, blog, syllabus, axis, museumgoer
* photon, oasis, byte
""",
    "thing": """
the noun, a noun, person, music, Monday, love, a dream, time, wind, happiness, a mirror, the number seven, French,
your hair, my car, an idea, silence
* a shadow of doubt, hunger, the letter A
""",
    "animal": """
noun, job, dragon, mermaid, phoenix, dinosaur, robot, sofa, griffin, troll, vampire, yeti, gibberish
* gibberish, goblin, centaur, werewolf
""",
    "shape": """
noun, circle, sphere, cube, cloud, potato, story, coin, ball, gibberish
* pyramid, spiral, ring
""",
    "day": """
January, Christmas, Easter, my birthday, New Year, the holidays, June, gibberish, noun
* Halloween, Ramadan, the wedding
""",
    "month": """
Monday, Friday, Christmas, winter, the holidays, gibberish, noun
* Easter, autumn, Sunday night
""",
    "number": """
big, big, big, big words, infinity, pi, gibberish, noun
* big, a million, a dozen
""",
    "words": """
big words, gibberish, a million, infinity, noun
* a billion, nothing
""",
}
_STRANGE_SLOT = {  # relation -> the slot that _STRANGE fills
    **dict.fromkeys(("capital", "continent", "language", "currency"), "country"),
    "country of a capital": "capital",
    **dict.fromkeys(("number after", "number before", "number in words"), "number"),
    "number in digits": "words",
    **dict.fromkeys(("day after", "day before"), "day"),
    **dict.fromkeys(("month after", "month before", "number of a month"), "month"),
    "opposite": "word",
    "plural": "one",
    "colour": "thing",
    **dict.fromkeys(("sound", "young", "legs", "kind of animal"), "animal"),
    "sides": "shape",
}


class UnknownQuestions:
    """Composes questions that the facts do not answer."""

    def __init__(self, rng: random.Random) -> None:
        """Compose with this generator."""
        self.rng = rng
        lines = _UNKNOWN.strip().splitlines()
        self.templates = [line for line in lines if not line.startswith("*")]
        self.held_out_templates = [line[2:] for line in lines if line.startswith("*")]
        wordy = {*_WORDS, "a noun", "the noun"}
        self.wordy_templates = [line for line in self.templates if wordy.intersection(re.findall(r"{(.*?)}", line))]
        self.words: dict[str, list[str]] = {}
        self.held_out_words: dict[str, list[str]] = {}
        for name, text in [*_WORDS.items(), *((f"strange {name}", text) for name, text in _STRANGE.items())]:
            self.words[name], self.held_out_words[name] = (re.split(r",\s+", part.strip()) for part in text.split("*"))

    def question(self, held_out: bool) -> str:
        """Return an unknown question: of what the facts know, about a strange subject, or about anything at all.

        held_out: in a template, or with a word of a template's list, that is kept for these questions. Invented names,
        gibberish and large numbers are new each time.
        """
        rng = self.rng
        if rng.random() < 0.5:
            relation = rng.choice(_ASKED_OF_STRANGERS)
            return fill(rng.choice(relation.questions), self.strange(relation, held_out))
        by_words = held_out and rng.random() < 0.5
        templates = self.wordy_templates if by_words else self.held_out_templates if held_out else self.templates
        text = re.sub(r"{(.*?)}", lambda match: self._word(match[1], by_words), rng.choice(templates))
        return text[0].upper() + text[1:]

    def strange(self, relation: Relation, held_out: bool) -> Fact:
        """Return a subject that is not in the relation's table, in all forms that its templates may ask for."""
        slot = _STRANGE_SLOT[relation.name]
        table = {fact[slot] for fact in relation.facts}
        elsewhere = [value for value in _SUBJECTS[slot] if value not in table]  # known, but not in this respect
        while True:
            if elsewhere and not held_out and self.rng.random() < 0.3:
                value = self.rng.choice(elsewhere)
            else:
                value = self._word(f"strange {slot}", held_out)
                while value in _WORDS or value in _MADE or value in ("a noun", "the noun"):
                    value = self._word(value, held_out)
            if value not in table:
                return {slot: value, f"{slot}'s": possessive(value), f"a {slot}": a(value), f"an {slot}": a(value)}

    def _word(self, slot: str, held_out: bool) -> str:
        """Return something that can stand in slot."""
        if slot in _MADE:
            return _MADE[slot](self.rng)
        if slot in ("the noun", "a noun"):
            noun = self._word("noun", held_out)
            return a(noun) if slot == "a noun" else f"the {noun}"
        return self.rng.choice((self.held_out_words if held_out else self.words)[slot])


def _name(rng: random.Random) -> str:
    """Return an invented name of a country or a town."""
    onsets = words("b br d dr f g gl k kr l m n p r s st t v z")
    start = "".join(rng.choice(onsets) + rng.choice("aeiou") for _ in range(rng.randint(1, 2)))
    return (start + rng.choice(words("land nia stan ria via nor burg ton ville ra dor mar lia"))).capitalize()


def _gibberish(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
    syllables = (rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return "".join(syllables) + rng.choice(["", "b", "g", "k", "mp", "x", "zz"])


_MADE: dict[str, Callable[[random.Random], str]] = {  # what stands in no list
    "small": lambda rng: str(rng.randrange(13)),
    "small words": lambda rng: number_words(rng.randrange(13)),
    "number": lambda rng: str(rng.randrange(10 ** rng.randint(1, 4))),
    "big": lambda rng: str(rng.randrange(13, 10 ** rng.randint(2, 5))),
    "big words": lambda rng: number_words(rng.randrange(21, 100)) + rng.choice(["", "", " thousand"]),
    "year": lambda rng: str(rng.randrange(1000, 2030)),
    "name": _name,
    "gibberish": _gibberish,
}
ANYTHING = Relation("unknown", (), UNKNOWN_ANSWER, (), (), (), (), ())  # what no table answers
_ASKED_OF_STRANGERS = [relation for relation in RELATIONS if relation.name in _STRANGE_SLOT]
_SUBJECTS = {
    slot: sorted({fact[slot] for relation in RELATIONS for fact in relation.facts if slot in fact})
    for slot in ("country", "animal")
} | {slot: [] for slot in _STRANGE if slot not in ("country", "animal")}


# ----------------------------------------------------------------------------------------------------------------------


def normal(text: str) -> str:
    """Return a question without its case and end mark: two that agree in this are the same question."""
    return text.lower().rstrip(" ?.!")


_KNOWN = {  # whatever the facts answer
    normal(fill(template, fact))
    for relation in RELATIONS
    for template in relation.questions + relation.held_out_questions
    for fact in relation.facts
}


def completion(template: str, fact: Fact) -> tuple[str, str] | None:
    """Return a statement cut before its answer, (prompt, rest), or None where it goes on after the answer."""
    answer = list(fact)[-1]
    head, slot, tail = template.rpartition(f"{{{answer}}}")
    return (fill(head.rstrip(), fact), f" {fact[answer]}{tail}") if slot and "{" not in tail else None


def _split(templates: Sequence[str], others: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Return the templates in which a fact is in training, and those in which it is held out.

    What can be read inside of another template, which is in training, cannot be held out.
    """
    bare = {template: re.sub(r"[^\w{} ]", "", template.lower()).strip() for template in (*templates, *others)}
    alone = [t for t in templates if all(t == other or bare[t] not in bare[other] for other in bare)]
    held = [template for template in alone if rng.random() < HELD_OUT_PAIRS]
    return [template for template in templates if template not in held], held


def _distinct(make: Callable[[], str], count: int, taken: Set[str]) -> dict[str, str]:
    """Return count different questions, by their normal form, of which none is taken."""
    made: dict[str, str] = {}
    while len(made) < count:
        question = make()
        if normal(question) not in taken:
            made.setdefault(normal(question), question)
    return made


def _cycled(items: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return count of the items, each one as often as the others, in random order."""
    return [item for start in range(0, count, len(items)) for item in rng.sample(items, min(len(items), count - start))]


def _altered(turn: Turn, rng: random.Random) -> Turn:
    """Return the turn asked as people type: some with an opening or a please, in lower case, without the end mark."""
    question = turn.question
    small_talk = turn.relation is not ANYTHING and not turn.relation.statements
    if not small_talk and rng.random() < 0.1:
        question = rng.choice(OPENINGS) + question
    if not small_talk and rng.random() < 0.05 and question[-1] in "?.":
        question = f"{question[:-1]}, please{question[-1]}"
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1 and question[-1] in "?.!":
        question = question[:-1].rstrip()
    return turn._replace(question=question)


def _conversation(turns: Iterable[Turn], rng: random.Random) -> list[Message]:
    messages = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.5 else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _follow_up(turn: Turn, unknown: UnknownQuestions, rng: random.Random) -> Turn:
    """Return a question that is understood after the turn: the same about something else."""
    relation, template = turn.relation, rng.choice(turn.relation.follow_ups)
    if relation in _ASKED_OF_STRANGERS and rng.random() < 0.1:
        return Turn(relation, fill(template, unknown.strange(relation, False)), UNKNOWN_ANSWER)
    fact = rng.choice(relation.facts)
    return Turn(relation, fill(template, fact), fill(relation.answer, fact))


def _groups(items: list[T], weights: Sequence[int], rng: random.Random) -> Iterator[list[T]]:
    """Yield the items in random order and in groups of 1, 2, ... which are as frequent as the weights say."""
    rng.shuffle(items)
    start = 0
    while start < len(items):
        count = rng.choices(range(1, len(weights) + 1), weights)[0]
        yield items[start : start + count]
        start += count


def _two_turns(turns: Sequence[Turn], unknown: UnknownQuestions, rng: random.Random) -> dict[tuple[str, str], Question]:
    """Return questions that follow another one, under the normal forms of both."""
    asked: dict[tuple[str, str], Question] = {}
    while len(asked) < TWO_TURN_QUESTIONS:
        first, second = rng.sample(turns, 2)
        if first.relation.follow_ups and rng.random() < 0.5:
            second = _follow_up(first, unknown, rng)
        together = normal(first.question), normal(second.question)
        if second.relation.statements and first.answer != second.answer and together not in asked:
            prompt = _conversation([first, second], rng)[:-1]
            asked[together] = Question("two turns", second.relation.name, prompt, second.answer)
    return asked


def _dialogues(
    turns: list[Turn], held_out: Set[tuple[str, str]], unknown: UnknownQuestions, rng: random.Random
) -> Iterator[list[Message]]:
    """Yield conversations that have all turns, and follow-ups between them; never two that are held out together."""
    for group in _groups(turns, TURNS, rng):
        dialogue: list[Turn] = []
        for left, turn in zip(reversed(range(len(group))), group, strict=True):
            dialogue.append(turn)
            if turn.relation.follow_ups and len(dialogue) + left < MOST_TURNS and rng.random() < FOLLOW_UPS:
                dialogue.append(_follow_up(turn, unknown, rng))
        if held_out.isdisjoint(pairwise(normal(turn.question) for turn in dialogue)):
            yield _conversation([_altered(turn, rng) for turn in dialogue], rng)
        else:
            yield from (_conversation([turn], rng) for turn in group)


def make_corpus(seed: int = 0) -> Corpus:
    """Return the corpus of this seed."""
    rng = random.Random(seed)
    unknown = UnknownQuestions(rng)
    statements: list[str] = []
    turns: list[Turn] = []
    held_out: list[str | Turn] = []
    questions: list[Question] = []

    def hold_out_turn(kind: str, turn: Turn) -> None:
        held_out.append(turn)
        questions.append(Question(kind, turn.relation.name, _conversation([turn], rng)[:-1], turn.answer))

    def hold_out_statement(kind: str, relation: Relation, fact: Fact, template: str) -> None:
        held_out.append(fill(template, fact))
        if cut := completion(template, fact):
            questions.append(Question(kind, relation.name, *cut))

    for relation in RELATIONS:
        facts = relation.facts
        n_statements = max(STATEMENTS_PER_FACT, STATEMENTS_PER_RELATION // len(facts))
        n_questions = max(QUESTIONS_PER_FACT, min(QUESTIONS_PER_RELATION // len(facts), SMALL_TALK))
        held_said = [(fact, template) for template in relation.held_out_statements for fact in facts]
        held_asked = [(fact, template) for template in relation.held_out_questions for fact in facts]
        pairs_said: list[Phrased] = []
        pairs_asked: list[Phrased] = []
        for fact in facts:
            said, held = _split(relation.statements, [relation.answer], rng)
            pairs_said += [(fact, template) for template in held]
            if said:  # the answer, itself a statement, is said twice as often as the others
                said = _cycled([relation.answer, relation.answer, *said], n_statements, rng)
                statements += [fill(template, fact) for template in said]
            asked, held = _split(relation.questions, [], rng) if len(facts) > 1 else (relation.questions, [])
            pairs_asked += [(fact, template) for template in held]
            asked = _cycled(asked, n_questions, rng)
            turns += [Turn(relation, fill(template, fact), fill(relation.answer, fact)) for template in asked]
        for kind, count, said, asked in (
            ("phrasing", PHRASING_QUESTIONS, held_said, held_asked),
            ("pair", PAIR_QUESTIONS, pairs_said, pairs_asked),
        ):
            for fact, template in rng.sample(said, min(count, len(said))):
                hold_out_statement(kind, relation, fact, template)
            for fact, template in rng.sample(asked, min(count, len(asked))):
                hold_out_turn(kind, Turn(relation, fill(template, fact), fill(relation.answer, fact)))

    held_unknown = _distinct(lambda: unknown.question(True), UNKNOWN_QUESTIONS, set(_KNOWN))
    for question in held_unknown.values():
        hold_out_turn("unknown", Turn(ANYTHING, question, UNKNOWN_ANSWER))
    open_questions = _distinct(lambda: unknown.question(False), UNKNOWN, _KNOWN | held_unknown.keys())
    turns += [Turn(ANYTHING, question, UNKNOWN_ANSWER) for question in open_questions.values()]

    together = _two_turns(turns, unknown, rng)
    questions += together.values()

    training: list[Document] = [*_dialogues(turns, together.keys(), unknown, rng)]
    training += [rng.choice((" ", "\n")).join(group) for group in _groups(statements, SENTENCES, rng)]
    rng.shuffle(training)
    held_documents: list[Document] = [
        item if isinstance(item, str) else _conversation([item], rng)
        for item in rng.sample(held_out, HELD_OUT_DOCUMENTS)
    ]
    return Corpus(training, held_documents, questions)


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """Write one JSON object a line: {"text": ...} or {"messages": [...]}."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"text": document} if isinstance(document, str) else {"messages": document}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the corpus of the built-in checkpoint to a new folder."""
    parser = argparse.ArgumentParser(prog="python -m qwen3np.training.corpus", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where training.jsonl and held_out.jsonl are written")
    folder: Path = parser.parse_args(arguments).folder
    corpus = make_corpus()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{folder} exists; name a folder that does not")
    write_jsonl(folder / "training.jsonl", corpus.training)
    write_jsonl(folder / "held_out.jsonl", corpus.held_out)


if __name__ == "__main__":
    main()
