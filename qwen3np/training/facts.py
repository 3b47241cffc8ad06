"""The world of the built-in checkpoint: tables of facts, and the phrasings in which they are said and asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Fact = dict[str, str]  # slot -> what stands in it; the last slot is the answer, those before it are the subject


@dataclass(frozen=True)
class Relation:
    """Facts of one kind, and templates whose {slots} each fact fills.

    answer is the one sentence that answers every question; a relation that is no plain text has no statements. What
    training never sees has held_out in its name.
    """

    name: str
    facts: tuple[Fact, ...]
    answer: str
    statements: tuple[str, ...]
    held_out_statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    follow_ups: tuple[str, ...]  # after a question of the same relation


def fill(template: str, fact: Fact) -> str:
    """Return the template with its slots filled, beginning with a capital letter."""
    text = template.format_map(fact)
    return text[0].upper() + text[1:]


def _relation(name: str, facts: Iterable[Fact], phrasings: str) -> Relation:
    """Parse phrasings: a line each, `answer`, `say`, `ask` or `follow` before it; `say*` and `ask*` are held out."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ("answer", "say", "say*", "ask", "ask*", "follow")}
    for line in phrasings.strip().splitlines():
        kind, template = line.split(maxsplit=1)
        kinds[kind].append(template)
    (answer,) = kinds["answer"]
    return Relation(
        name,
        tuple(facts),
        answer,
        *(tuple(kinds[kind]) for kind in ("say", "say*", "ask", "ask*", "follow")),
    )


def _table(text: str) -> list[tuple[str, str]]:
    """Parse `key: value, key: value, ...`."""
    pairs = [" ".join(entry.split()).split(": ") for entry in text.split(",")]
    return [(key, value) for key, value in pairs]


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


def _by_value(text: str) -> list[tuple[str, str]]:
    """Parse lines of `value: key, key, ...` into (key, value)."""
    rows = [line.split(":") for line in text.strip().splitlines()]
    return [(key.strip(), value.strip()) for value, keys in rows for key in keys.split(",")]


def a(noun: str) -> str:
    """Return the noun with its article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def possessive(name: str) -> str:
    """Return the possessive form of a name."""
    return name + ("'" if name.endswith("s") else "'s")


def _country(name: str, slot: str, value: str) -> Fact:
    return {"country": name, "country's": possessive(name), slot: value}


def _animal(name: str, slot: str, value: str) -> Fact:
    return {"animal": name, "an animal": a(name), slot: value}


CAPITALS = {
    "Europe": _table("""
Albania: Tirana, Andorra: Andorra la Vella, Austria: Vienna, Belarus: Minsk, Belgium: Brussels,
Bosnia and Herzegovina: Sarajevo, Bulgaria: Sofia, Croatia: Zagreb, the Czech Republic: Prague,
Denmark: Copenhagen, Estonia: Tallinn, Finland: Helsinki, France: Paris, Germany: Berlin, Greece: Athens,
Hungary: Budapest, Iceland: Reykjavik, Ireland: Dublin, Italy: Rome, Latvia: Riga, Liechtenstein: Vaduz,
Lithuania: Vilnius, Luxembourg: Luxembourg, Malta: Valletta, Moldova: Chisinau, Montenegro: Podgorica,
the Netherlands: Amsterdam, North Macedonia: Skopje, Norway: Oslo, Poland: Warsaw, Portugal: Lisbon,
Romania: Bucharest, Serbia: Belgrade, Slovakia: Bratislava, Slovenia: Ljubljana, Spain: Madrid,
Sweden: Stockholm, Switzerland: Bern, Ukraine: Kyiv, the United Kingdom: London, Scotland: Edinburgh,
Wales: Cardiff, England: London
"""),
    "Asia": _table("""
Afghanistan: Kabul, Bahrain: Manama, Bangladesh: Dhaka, Bhutan: Thimphu, Cambodia: Phnom Penh, China: Beijing,
India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Japan: Tokyo, Jordan: Amman,
Kuwait: Kuwait City, Kyrgyzstan: Bishkek, Laos: Vientiane, Lebanon: Beirut, Malaysia: Kuala Lumpur,
Mongolia: Ulaanbaatar, Myanmar: Naypyidaw, Nepal: Kathmandu, North Korea: Pyongyang, Oman: Muscat,
Pakistan: Islamabad, the Philippines: Manila, Qatar: Doha, Saudi Arabia: Riyadh, Singapore: Singapore,
South Korea: Seoul, Syria: Damascus, Tajikistan: Dushanbe, Thailand: Bangkok,
the United Arab Emirates: Abu Dhabi, Uzbekistan: Tashkent, Vietnam: Hanoi
"""),
    "Africa": _table("""
Algeria: Algiers, Angola: Luanda, Botswana: Gaborone, Burkina Faso: Ouagadougou, Cameroon: Yaounde,
the Democratic Republic of the Congo: Kinshasa, Egypt: Cairo, Ethiopia: Addis Ababa, the Gambia: Banjul,
Ghana: Accra, Kenya: Nairobi, Liberia: Monrovia, Libya: Tripoli, Madagascar: Antananarivo, Malawi: Lilongwe,
Mali: Bamako, Mauritius: Port Louis, Morocco: Rabat, Mozambique: Maputo, Namibia: Windhoek, Niger: Niamey,
Nigeria: Abuja, Rwanda: Kigali, Senegal: Dakar, Sierra Leone: Freetown, Somalia: Mogadishu, Sudan: Khartoum,
Tanzania: Dodoma, Tunisia: Tunis, Uganda: Kampala, Zambia: Lusaka, Zimbabwe: Harare
"""),
    "North America": _table("""
the Bahamas: Nassau, Barbados: Bridgetown, Belize: Belmopan, Canada: Ottawa, Costa Rica: San Jose, Cuba: Havana,
the Dominican Republic: Santo Domingo, El Salvador: San Salvador, Guatemala: Guatemala City,
Haiti: Port-au-Prince, Honduras: Tegucigalpa, Jamaica: Kingston, Mexico: Mexico City, Nicaragua: Managua,
Panama: Panama City, Trinidad and Tobago: Port of Spain, the United States: Washington, the USA: Washington
"""),
    "South America": _table("""
Argentina: Buenos Aires, Brazil: Brasilia, Chile: Santiago, Colombia: Bogota, Ecuador: Quito,
Guyana: Georgetown, Paraguay: Asuncion, Peru: Lima, Suriname: Paramaribo, Uruguay: Montevideo,
Venezuela: Caracas
"""),
    "Oceania": _table("""
Australia: Canberra, Fiji: Suva, New Zealand: Wellington, Papua New Guinea: Port Moresby, Tonga: Nuku'alofa
"""),
    "two continents": _table("""
Armenia: Yerevan, Azerbaijan: Baku, Cyprus: Nicosia, Georgia: Tbilisi, Kazakhstan: Astana, Russia: Moscow,
Turkey: Ankara
"""),
}
_OTHER_NAMES = ("England", "the USA")  # of, or within, a country that stands in the table too, with the same capital

LANGUAGES = _by_value("""
French: France
German: Germany, Austria, Liechtenstein
Italian: Italy
Spanish: Spain, Mexico, Argentina, Chile, Colombia, Cuba, Uruguay, Venezuela
Portuguese: Portugal, Brazil, Angola
English: Australia, the United Kingdom, the United States
Arabic: Egypt, Saudi Arabia, Jordan
Polish: Poland
Hungarian: Hungary
Romanian: Romania
Bulgarian: Bulgaria
Greek: Greece
Swedish: Sweden
Norwegian: Norway
Danish: Denmark
Icelandic: Iceland
Dutch: the Netherlands
Turkish: Turkey
Russian: Russia
Ukrainian: Ukraine
Croatian: Croatia
Serbian: Serbia
Slovene: Slovenia
Slovak: Slovakia
Czech: the Czech Republic
Lithuanian: Lithuania
Latvian: Latvia
Estonian: Estonia
Albanian: Albania
Japanese: Japan
Chinese: China
Korean: South Korea, North Korea
Vietnamese: Vietnam
Thai: Thailand
Persian: Iran
Mongolian: Mongolia
Armenian: Armenia
Georgian: Georgia
Khmer: Cambodia
Nepali: Nepal
Bengali: Bangladesh
""")

CURRENCIES = _by_value("""
euro: France, Germany, Italy, Spain, Austria, Belgium, Finland, Greece, Ireland, Portugal, the Netherlands
dollar: the United States, Canada, Australia, New Zealand, Jamaica
pound: the United Kingdom, Egypt
peso: Mexico, Chile, Argentina, Colombia, the Philippines
rupee: India, Pakistan, Nepal
dinar: Iraq, Jordan, Kuwait
krone: Norway, Denmark
krona: Sweden, Iceland
yen: Japan
yuan: China
won: South Korea
franc: Switzerland
zloty: Poland
koruna: the Czech Republic
forint: Hungary
leu: Romania
ruble: Russia
hryvnia: Ukraine
lira: Turkey
baht: Thailand
dong: Vietnam
rupiah: Indonesia
real: Brazil
sol: Peru
naira: Nigeria
shilling: Kenya, Uganda
cedi: Ghana
dirham: Morocco
birr: Ethiopia
ringgit: Malaysia
riyal: Saudi Arabia
taka: Bangladesh
lari: Georgia
tenge: Kazakhstan
""")

_ONES = words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""")
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")


def number_words(n: int) -> str:
    """Return 0 <= n <= 100 in words."""
    if n == 100:
        return "one hundred"
    return _ONES[n] if n < 20 else _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")


NAMED_NUMBERS = [*range(21), 30, 40, 50, 60, 70, 80, 90, 100]
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
_ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")

# `=` holds in both directions; `>` in one, since what stands right of it has another opposite too.
_OPPOSITES = """
hot=cold big=small good=bad happy=sad fast=slow high=low up=down day=night black=white yes=no open=closed full=empty
wet=dry clean=dirty rich=poor strong=weak early=late first=last near=far wide=narrow deep=shallow loud=quiet
true=false above=below inside=outside before=after always=never everything=nothing love=hate win=lose buy=sell
give=take push=pull laugh=cry come=go arrive=leave remember=forget top=bottom front=back north=south east=west
summer=winter morning=evening war=peace life=death alive=dead awake=asleep sharp=blunt cheap=expensive safe=dangerous
same=different brave=cowardly possible=impossible public=private modern=ancient maximum=minimum better=worse
best=worst here=there rise=fall float=sink lock=unlock agree=disagree increase=decrease success=failure entrance=exit
honest=dishonest warm=cool absent=present positive=negative odd=even attack=defend borrow=lend teach=learn throw=catch
horizontal=vertical tiny=huge ugly=beautiful easy=difficult fat=thin left>right wrong>right new>old young>old
long>short tall>short soft>hard dark>light heavy>light
"""
OPPOSITES = [
    pair
    for one, sign, other in re.findall(r"(\w+)([=>])(\w+)", _OPPOSITES)
    for pair in ([(one, other), (other, one)] if sign == "=" else [(one, other)])
]

PLURALS = [
    *(
        (word, word + "s")
        for word in words("""
cat dog book tree house car bird apple banana table chair door window king queen horse cow river song boat train girl
boy friend star flower garden school teacher pen cup hand
""")
    ),
    *_table("""
box: boxes, bus: buses, fox: foxes, dish: dishes, church: churches, glass: glasses, watch: watches, brush: brushes,
peach: peaches, class: classes, tomato: tomatoes, potato: potatoes, hero: heroes, city: cities, baby: babies,
lady: ladies, story: stories, country: countries, party: parties, berry: berries, fly: flies, family: families,
toy: toys, key: keys, monkey: monkeys, leaf: leaves, wolf: wolves, knife: knives, wife: wives, life: lives,
half: halves, shelf: shelves, thief: thieves, loaf: loaves, man: men, woman: women, child: children, foot: feet,
tooth: teeth, goose: geese, mouse: mice, ox: oxen, person: people, sheep: sheep, deer: deer, snowman: snowmen,
grandchild: grandchildren, sandwich: sandwiches, butterfly: butterflies
"""),
]

COLOURS = _by_value("""
green: grass, an emerald, a cucumber, a frog, broccoli, spinach, a lime, a leaf, a pea, a crocodile
white: snow, milk, salt, sugar, flour, chalk, a swan, a polar bear, cotton, ivory
black: coal, a raven, a crow, soot, tar, a panther
red: blood, a strawberry, a tomato, a ruby, a cherry, ketchup, a fire engine, a raspberry
yellow: a lemon, a banana, a canary, mustard, butter, a sunflower, an egg yolk
blue: the sky, the sea, a sapphire, a blueberry
orange: a carrot, a pumpkin, a tangerine
purple: a plum, lavender, an aubergine
pink: a flamingo, a pig
brown: chocolate, coffee, a chestnut
grey: an elephant, ash, cement
""")

SOUNDS = _table("""
dog: woof, cat: meow, cow: moo, pig: oink, sheep: baa, duck: quack, horse: neigh, lion: roar,
rooster: cock-a-doodle-doo, owl: hoot, frog: ribbit, bee: buzz, snake: hiss, mouse: squeak, bird: tweet,
crow: caw, turkey: gobble, wolf: howl, donkey: hee-haw, chick: cheep, dove: coo, goose: honk, bear: growl,
cricket: chirp
""")

YOUNG = _table("""
dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, pig: piglet, goat: kid, duck: duckling,
goose: gosling, chicken: chick, bear: cub, lion: cub, tiger: cub, leopard: cub, deer: fawn, kangaroo: joey,
swan: cygnet, frog: tadpole, owl: owlet, eagle: eaglet, elephant: calf, whale: calf, giraffe: calf, seal: pup,
hare: leveret, eel: elver, spider: spiderling, butterfly: caterpillar, koala: joey, camel: calf, donkey: foal,
zebra: foal, shark: pup, dolphin: calf
""")

LEGS = _by_value("""
four: dog, cat, cow, horse, sheep, pig, goat, lion, tiger, bear, wolf, fox, elephant, zebra, camel, rabbit, frog, lizard
two: bird, chicken, duck, owl, eagle, penguin, ostrich, parrot, crow
six: ant, bee, fly, beetle, butterfly, wasp, mosquito
eight: spider, scorpion
ten: crab, lobster
no: snake, worm, shark, whale, dolphin, eel
""")

CLASSES = _by_value("""
a mammal: dog, cat, cow, horse, pig, lion, elephant, mouse, whale, dolphin, bat, monkey, kangaroo, seal, rabbit
a bird: duck, owl, eagle, penguin, ostrich, parrot, crow, swan, sparrow, chicken
a fish: shark, salmon, trout, cod, tuna, eel, herring
an insect: ant, bee, fly, beetle, butterfly, wasp, mosquito, grasshopper
a reptile: snake, lizard, crocodile, turtle, gecko
an amphibian: frog, toad, newt, salamander
""")

SIDES = _by_value("""
three: triangle
four: square, rectangle, rhombus, trapezium
five: pentagon
six: hexagon
seven: heptagon
eight: octagon
nine: nonagon
ten: decagon
""")


def _numbers_beside(step: int) -> list[Fact]:
    digits = [{"number": str(n), "other": str(n + step)} for n in range(21) if n + step >= 0]
    return digits + [{"number": number_words(n), "other": number_words(n + step)} for n in range(13) if n + step >= 0]


def _beside(names: list[str], slot: str, step: int) -> list[Fact]:
    return [{slot: name, "other": names[(i + step) % len(names)]} for i, name in enumerate(names)]


_COUNTRIES = [(country, capital, continent) for continent, rows in CAPITALS.items() for country, capital in rows]
_SUMS = [(a, b, a + b) for a in range(13) for b in range(13)]
_DIFFERENCES = [(a, b, a - b) for a in range(13) for b in range(a + 1)]

RELATIONS = (
    _relation(
        "capital",
        [_country(country, "capital", capital) for country, capital, _ in _COUNTRIES],
        """
answer The capital of {country} is {capital}.
say The capital city of {country} is {capital}.
say {country's} capital is {capital}.
say {country's} capital city is {capital}.
say In {country}, the capital is {capital}.
say The city that is the capital of {country} is {capital}.
say The name of {country's} capital is {capital}.
say {country} has a capital, and its name is {capital}.
say* The name of the capital of {country} is {capital}.
say* In {country}, the capital city is {capital}.
ask What is the capital of {country}?
ask What's the capital of {country}?
ask Whats the capital of {country}?
ask Tell me the capital of {country}.
ask Which city is {country's} capital?
ask capital of {country}?
ask the capital of {country}
ask What is {country's} capital?
ask {country's} capital?
ask What's {country's} capital?
ask {country} capital
ask Name the capital of {country}.
ask Which city is the capital of {country}?
ask What city is the capital of {country}?
ask Do you know the capital of {country}?
ask Can you tell me the capital of {country}?
ask What is the capital city of {country}?
ask What is the name of the capital of {country}?
ask I want to know the capital of {country}.
ask Could you tell me what the capital of {country} is?
ask* Please name the capital city of {country}.
ask* What is the name of {country's} capital?
ask* Do you know which city is the capital of {country}?
follow And of {country}?
follow And the capital of {country}?
follow And {country}?
follow What about {country}?
follow How about {country}?
""",
    ),
    _relation(
        "country of a capital",
        [{"capital": capital, "country": country} for country, capital, _ in _COUNTRIES if country not in _OTHER_NAMES],
        """
answer {capital} is the capital of {country}.
say {capital} is the capital city of {country}.
say The city of {capital} is the capital of {country}.
say The country whose capital is {capital} is {country}.
say If you are in {capital}, you are in the capital of {country}.
say The country with the capital {capital} is {country}.
say* The country that has {capital} as its capital is {country}.
say* The city of {capital} is the capital city of {country}.
ask Which country has {capital} as its capital?
ask Which country has the capital {capital}?
ask {capital} is the capital of which country?
ask {capital} is the capital of what?
ask {capital} is the capital of?
ask What country is {capital} the capital of?
ask Of which country is {capital} the capital?
ask What is {capital} the capital of?
ask Name the country whose capital is {capital}.
ask Tell me which country has {capital} as its capital.
ask {capital} is the capital of what country?
ask Do you know which country has the capital {capital}?
ask {capital} is the capital city of which country?
ask* Which country is {capital} the capital of?
ask* What country has {capital} as its capital?
ask* Tell me the country whose capital is {capital}.
follow And {capital}?
follow What about {capital}?
follow How about {capital}?
""",
    ),
    _relation(
        "continent",
        [_country(country, "continent", name) for country, _, name in _COUNTRIES if name != "two continents"],
        """
answer {country} is in {continent}.
say {country} is a country in {continent}.
say The continent of {country} is {continent}.
say {country's} continent is {continent}.
say You can find {country} in {continent}.
say If you go to {country}, you are in {continent}.
say The continent on which you find {country} is {continent}.
say* On the map, {country} is in {continent}.
say* The continent where you find {country} is {continent}.
ask Which continent is {country} in?
ask What continent is {country} in?
ask On which continent is {country}?
ask In which continent is {country}?
ask What is the continent of {country}?
ask Where is {country}?
ask Where is {country} on the map?
ask Where can I find {country}?
ask Tell me the continent of {country}.
ask Tell me which continent {country} is in.
ask {country} is in which continent?
ask continent of {country}?
ask {country's} continent?
ask Name the continent of {country}.
ask* Do you know the continent of {country}?
ask* In what continent is {country}?
ask* Which continent can I find {country} in?
follow And {country}?
follow What about {country}?
follow How about {country}?
follow And where is {country}?
""",
    ),
    _relation(
        "language",
        [_country(country, "language", language) for country, language in LANGUAGES],
        """
answer The main language of {country} is {language}.
say In {country}, people speak {language}.
say The language of {country} is {language}.
say {country's} main language is {language}.
say Most people in {country} speak {language}.
say If you go to {country}, you will hear {language}.
say The people of {country} speak {language}.
say In {country}, the main language is {language}.
say* Most people who live in {country} speak {language}.
say* In {country}, most people speak {language}.
ask What is the main language of {country}?
ask What language do people speak in {country}?
ask Which language do people speak in {country}?
ask What do people speak in {country}?
ask Which language is spoken in {country}?
ask What is the language of {country}?
ask language of {country}?
ask Tell me the language of {country}.
ask What is {country's} language?
ask What is {country's} main language?
ask Name the main language of {country}.
ask What language is spoken in {country}?
ask What language do they speak in {country}?
ask* Which language do they speak in {country}?
ask* Tell me the main language of {country}.
ask* Do you know the language of {country}?
follow And in {country}?
follow And {country}?
follow And of {country}?
follow What about {country}?
follow How about {country}?
""",
    ),
    _relation(
        "currency",
        [_country(country, "currency", currency) for country, currency in CURRENCIES],
        """
answer The currency of {country} is the {currency}.
say {country's} currency is the {currency}.
say In {country}, people pay with the {currency}.
say People in {country} pay with the {currency}.
say In {country}, the currency is the {currency}.
say The money of {country} is the {currency}.
say If you go to {country}, you pay with the {currency}.
say* The money that people use in {country} is the {currency}.
say* In {country}, the money is the {currency}.
ask What is the currency of {country}?
ask Which currency does {country} use?
ask What currency does {country} use?
ask What is {country's} currency?
ask currency of {country}?
ask Tell me the currency of {country}.
ask What money do people use in {country}?
ask Which money do people use in {country}?
ask What is the money of {country}?
ask Name the currency of {country}.
ask What do people pay with in {country}?
ask What currency is used in {country}?
ask What's the currency of {country}?
ask* Which currency is used in {country}?
ask* Do you know the currency of {country}?
ask* Which currency do people use in {country}?
follow And of {country}?
follow And the currency of {country}?
follow And {country}?
follow What about {country}?
follow How about {country}?
""",
    ),
    _relation(
        "sum",
        [{"a": str(a), "b": str(b), "c": str(c)} for a, b, c in _SUMS],
        """
answer {a} + {b} = {c}.
say {a} plus {b} is {c}.
say {a} plus {b} equals {c}.
say {a} and {b} make {c}.
say The sum of {a} and {b} is {c}.
say If you add {a} and {b}, you get {c}.
say When you add {b} to {a}, the sum is {c}.
say Adding {b} to {a} gives {c}.
say {a} + {b} is {c}.
say* If you add {b} to {a}, you get {c}.
say* Adding {a} and {b} gives {c}.
ask What is {a} + {b}?
ask What is {a} plus {b}?
ask {a} + {b}
ask {a}+{b}
ask {a} + {b} = ?
ask {a}+{b}=?
ask What is {a}+{b}?
ask How much is {a} + {b}?
ask How much is {a} plus {b}?
ask What's {a} + {b}?
ask {a} plus {b}?
ask What is the sum of {a} and {b}?
ask Add {a} and {b}.
ask Tell me {a} + {b}.
ask Calculate {a} + {b}.
ask What do you get if you add {a} and {b}?
ask What does {a} + {b} make?
ask Can you add {a} and {b}?
ask What is {a} and {b}?
ask* Calculate the sum of {a} and {b}.
ask* Tell me the sum of {a} and {b}.
ask* Can you tell me what {a} + {b} is?
follow And {a} + {b}?
follow What about {a} + {b}?
follow And {a} plus {b}?
""",
    ),
    _relation(
        "sum in words",
        [{"a": number_words(a), "b": number_words(b), "c": number_words(c)} for a, b, c in _SUMS],
        """
answer {a} plus {b} is {c}.
say {a} plus {b} equals {c}.
say {a} and {b} make {c}.
say The sum of {a} and {b} is {c}.
say If you add {a} and {b}, you get {c}.
say When you add {b} to {a}, the sum is {c}.
say Adding {b} to {a} gives {c}.
say* If you add {b} to {a}, you get {c}.
say* Adding {a} and {b} gives {c}.
ask What is {a} plus {b}?
ask {a} plus {b}
ask {a} plus {b} is
ask How much is {a} plus {b}?
ask What's {a} plus {b}?
ask What is the sum of {a} and {b}?
ask Add {a} and {b}.
ask Tell me {a} plus {b}.
ask Calculate {a} plus {b}.
ask What do you get if you add {a} and {b}?
ask What does {a} plus {b} make?
ask Can you add {a} and {b}?
ask What is {a} and {b}?
ask* Calculate the sum of {a} and {b}.
ask* Can you tell me what {a} plus {b} is?
ask* How much is {a} and {b}?
follow And {a} plus {b}?
follow What about {a} plus {b}?
""",
    ),
    _relation(
        "difference",
        [{"a": str(a), "b": str(b), "c": str(c)} for a, b, c in _DIFFERENCES],
        """
answer {a} - {b} = {c}.
say {a} minus {b} is {c}.
say {a} minus {b} equals {c}.
say The difference of {a} and {b} is {c}.
say If you take {b} from {a}, you get {c}.
say If you subtract {b} from {a}, you get {c}.
say {a} take away {b} is {c}.
say If you have {a} and take {b} away, you have {c}.
say Taking {b} from {a} leaves {c}.
say {a} - {b} is {c}.
say* If you take {b} away from {a}, you get {c}.
say* Taking {b} away from {a} leaves {c}.
ask What is {a} - {b}?
ask What is {a} minus {b}?
ask {a} - {b}
ask {a}-{b}
ask {a} - {b} = ?
ask {a}-{b}=?
ask What is {a}-{b}?
ask How much is {a} - {b}?
ask How much is {a} minus {b}?
ask What's {a} - {b}?
ask {a} minus {b}?
ask Take {b} from {a}.
ask Take away {b} from {a}.
ask Subtract {b} from {a}.
ask Calculate {a} - {b}.
ask Tell me {a} - {b}.
ask What is left if you take {b} from {a}?
ask What do you get if you subtract {b} from {a}?
ask* Tell me what {a} minus {b} is.
ask* Can you tell me what {a} - {b} is?
ask* What do you get if you take {b} from {a}?
follow And {a} - {b}?
follow What about {a} - {b}?
follow And {a} minus {b}?
""",
    ),
    _relation(
        "difference in words",
        [{"a": number_words(a), "b": number_words(b), "c": number_words(c)} for a, b, c in _DIFFERENCES],
        """
answer {a} minus {b} is {c}.
say {a} minus {b} equals {c}.
say The difference of {a} and {b} is {c}.
say If you take {b} from {a}, you get {c}.
say If you subtract {b} from {a}, you get {c}.
say {a} take away {b} is {c}.
say If you have {a} and take {b} away, you have {c}.
say Taking {b} from {a} leaves {c}.
say* If you take {b} away from {a}, you get {c}.
say* Taking {b} away from {a} leaves {c}.
ask What is {a} minus {b}?
ask {a} minus {b}
ask {a} minus {b} is
ask How much is {a} minus {b}?
ask What's {a} minus {b}?
ask Take {b} from {a}.
ask Subtract {b} from {a}.
ask Calculate {a} minus {b}.
ask Tell me {a} minus {b}.
ask What is left if you take {b} from {a}?
ask What do you get if you subtract {b} from {a}?
ask* Can you subtract {b} from {a}?
ask* Can you tell me what {a} minus {b} is?
ask* What do you get if you take {b} from {a}?
follow And {a} minus {b}?
follow What about {a} minus {b}?
""",
    ),
    _relation(
        "number after",
        _numbers_beside(1),
        """
answer The number after {number} is {other}.
say The next number after {number} is {other}.
say After {number} comes {other}.
say The number that comes after {number} is {other}.
say When you count, {number} is followed by {other}.
say One more than {number} is {other}.
say What follows {number} is {other}.
say* When you count, after {number} comes {other}.
say* The number that follows {number} is {other}.
ask What number comes after {number}?
ask Which number comes after {number}?
ask What comes after {number}?
ask What is the number after {number}?
ask What is the next number after {number}?
ask Which number follows {number}?
ask What is one more than {number}?
ask Tell me the number after {number}.
ask number after {number}?
ask Count on from {number}.
ask What number is after {number}?
ask* What number follows {number}?
ask* Name the number that comes after {number}.
ask* Which number is one more than {number}?
follow And after {number}?
follow What about {number}?
follow And {number}?
""",
    ),
    _relation(
        "number before",
        _numbers_beside(-1),
        """
answer The number before {number} is {other}.
say The number just before {number} is {other}.
say Before {number} comes {other}.
say The number that comes before {number} is {other}.
say When you count back, {number} is followed by {other}.
say One less than {number} is {other}.
say Just before {number} comes {other}.
say* When you count, before {number} comes {other}.
say* The number that comes just before {number} is {other}.
ask What number comes before {number}?
ask Which number comes before {number}?
ask What comes before {number}?
ask What is the number before {number}?
ask What is the number just before {number}?
ask What is one less than {number}?
ask Tell me the number before {number}.
ask number before {number}?
ask Count back from {number}.
ask What number is before {number}?
ask* What number comes just before {number}?
ask* Name the number that comes before {number}.
ask* Which number is one less than {number}?
follow And before {number}?
follow What about {number}?
follow And {number}?
""",
    ),
    _relation(
        "number in words",
        [{"number": str(n), "words": number_words(n)} for n in NAMED_NUMBERS],
        """
answer In words, {number} is {words}.
say The number {number} in words is {words}.
say The number {number} is written {words}.
say {number} is written as {words}.
say You write {number} in words as {words}.
say The word for {number} is {words}.
say In words, the number {number} is {words}.
say* The word for the number {number} is {words}.
say* You write the number {number} in words as {words}.
ask What is {number} in words?
ask How do you write {number} in words?
ask Write {number} in words.
ask How is {number} written in words?
ask {number} in words?
ask What is the word for {number}?
ask Spell the number {number}.
ask Write the number {number} in words.
ask How do you spell {number}?
ask Tell me {number} in words.
ask* What is the number {number} in words?
ask* How do I write {number} in words?
ask* What is the word for the number {number}?
follow And {number}?
follow What about {number}?
""",
    ),
    _relation(
        "number in digits",
        [{"words": number_words(n), "number": str(n)} for n in NAMED_NUMBERS],
        """
answer In digits, {words} is {number}.
say The number {words} in digits is {number}.
say The number {words} is written {number}.
say {words} is written as {number}.
say You write {words} in digits as {number}.
say As a number, {words} is {number}.
say In digits, the number {words} is {number}.
say* You write the number {words} in digits as {number}.
say* In digits, you write {words} as {number}.
ask What is {words} in digits?
ask How do you write {words} in digits?
ask Write {words} in digits.
ask How is {words} written in digits?
ask {words} in digits?
ask Write the number {words} in digits.
ask What is {words} as a number?
ask Write {words} as a number.
ask Tell me {words} in digits.
ask* What is the number {words} in digits?
ask* How do I write {words} in digits?
ask* How do you write {words} as a number?
follow And {words}?
follow What about {words}?
""",
    ),
    _relation(
        "day after",
        _beside(DAYS, "day", 1),
        """
answer The day after {day} is {other}.
say The next day after {day} is {other}.
say After {day} comes {other}.
say {day} is followed by {other}.
say If today is {day}, tomorrow is {other}.
say The day that comes after {day} is {other}.
say When {day} is over, the next day is {other}.
say What follows {day} is {other}.
say* The day that follows {day} is {other}.
say* If today is {day}, the next day is {other}.
ask What day comes after {day}?
ask Which day comes after {day}?
ask What comes after {day}?
ask What is the day after {day}?
ask Which day follows {day}?
ask If today is {day}, what day is tomorrow?
ask Today is {day}. What day is tomorrow?
ask What is the next day after {day}?
ask Tell me the day after {day}.
ask day after {day}?
ask Name the day that comes after {day}.
ask Which day is after {day}?
ask* What day is after {day}?
ask* What day follows {day}?
ask* Name the day after {day}.
follow And after {day}?
follow And {day}?
follow What about {day}?
""",
    ),
    _relation(
        "day before",
        _beside(DAYS, "day", -1),
        """
answer The day before {day} is {other}.
say The day just before {day} is {other}.
say Before {day} comes {other}.
say If today is {day}, yesterday was {other}.
say The day that comes before {day} is {other}.
say If tomorrow is {day}, today is {other}.
say* The day that comes just before {day} is {other}.
say* If today is {day}, the day before was {other}.
ask What day comes before {day}?
ask Which day comes before {day}?
ask What comes before {day}?
ask What is the day before {day}?
ask If today is {day}, what day was yesterday?
ask Today is {day}. What day was yesterday?
ask Tell me the day before {day}.
ask day before {day}?
ask Name the day that comes before {day}.
ask Which day is before {day}?
ask What is the day just before {day}?
ask* What day is before {day}?
ask* Which day comes just before {day}?
ask* Name the day before {day}.
follow And before {day}?
follow And {day}?
follow What about {day}?
""",
    ),
    _relation(
        "month after",
        _beside(MONTHS, "month", 1),
        """
answer The month after {month} is {other}.
say The next month after {month} is {other}.
say After {month} comes {other}.
say {month} is followed by {other}.
say If it is {month} now, next month is {other}.
say When {month} is over, the next month is {other}.
say The month that comes after {month} is {other}.
say What follows {month} is {other}.
say* The month that follows {month} is {other}.
say* If it is {month} now, the next month is {other}.
ask What month comes after {month}?
ask Which month comes after {month}?
ask What comes after {month}?
ask What is the month after {month}?
ask Which month follows {month}?
ask If it is {month} now, what is the next month?
ask What is the next month after {month}?
ask Tell me the month after {month}.
ask month after {month}?
ask Name the month that comes after {month}.
ask Which month is after {month}?
ask* What month is after {month}?
ask* What month follows {month}?
ask* Name the month after {month}.
follow And after {month}?
follow And {month}?
follow What about {month}?
""",
    ),
    _relation(
        "month before",
        _beside(MONTHS, "month", -1),
        """
answer The month before {month} is {other}.
say The month just before {month} is {other}.
say Before {month} comes {other}.
say If it is {month} now, last month was {other}.
say The month that comes before {month} is {other}.
say If next month is {month}, it is now {other}.
say* The month that comes just before {month} is {other}.
say* If it is {month} now, the month before was {other}.
ask What month comes before {month}?
ask Which month comes before {month}?
ask What comes before {month}?
ask What is the month before {month}?
ask If it is {month} now, what was last month?
ask Tell me the month before {month}.
ask month before {month}?
ask Name the month that comes before {month}.
ask Which month is before {month}?
ask What is the month just before {month}?
ask* What month is before {month}?
ask* Which month comes just before {month}?
ask* Name the month before {month}.
follow And before {month}?
follow And {month}?
follow What about {month}?
""",
    ),
    _relation(
        "number of a month",
        [{"month": month, "ordinal": _ORDINALS[i]} for i, month in enumerate(MONTHS)],
        """
answer {month} is the {ordinal} month of the year.
say In the year, {month} is the {ordinal} month.
say As a month, {month} is the {ordinal}.
say Of the twelve months, {month} is the {ordinal}.
say Of all the months, {month} is the {ordinal}.
say The year has {month} as its {ordinal} month.
say The month of {month} is the {ordinal} month of the year.
say When you count the months, {month} is the {ordinal}.
say* Of the months of the year, {month} is the {ordinal}.
say* In a year, {month} is the {ordinal} month.
ask Which month of the year is {month}?
ask What number is {month}?
ask What is the number of {month}?
ask What number month is {month}?
ask Which month is {month}?
ask Which number does {month} have?
ask Tell me the number of {month}.
ask {month} is which month of the year?
ask What place does {month} have in the year?
ask number of {month}?
ask* What number does {month} have?
ask* Tell me which month of the year {month} is.
ask* What month of the year is {month}?
follow And {month}?
follow What about {month}?
""",
    ),
    _relation(
        "month by number",
        [{"ordinal": _ORDINALS[i], "month": month} for i, month in enumerate(MONTHS)],
        """
answer The {ordinal} month of the year is {month}.
say The {ordinal} month is {month}.
say In the year, the {ordinal} month is {month}.
say Of the twelve months, the {ordinal} is {month}.
say When you count the months, the {ordinal} is {month}.
say The {ordinal} of the twelve months is {month}.
say* Of the months of the year, the {ordinal} is {month}.
say* In a year, the {ordinal} month is {month}.
ask What is the {ordinal} month of the year?
ask Which month is the {ordinal} of the year?
ask Which is the {ordinal} month?
ask What is the {ordinal} month?
ask Name the {ordinal} month of the year.
ask Tell me the {ordinal} month.
ask {ordinal} month of the year?
ask What month is the {ordinal}?
ask Which month is the {ordinal}?
ask* Which is the {ordinal} month of the year?
ask* Tell me the {ordinal} month of the year.
ask* What month is the {ordinal} month of the year?
follow And the {ordinal}?
follow What about the {ordinal}?
""",
    ),
    _relation(
        "opposite",
        [{"word": word, "opposite": opposite} for word, opposite in OPPOSITES],
        """
answer The opposite of {word} is {opposite}.
say The word {word} is the opposite of {opposite}.
say The opposite of the word {word} is {opposite}.
say The word that means the opposite of {word} is {opposite}.
say Say the opposite of {word}, and you say {opposite}.
say The word {word} has an opposite, and it is {opposite}.
say The word with the opposite meaning of {word} is {opposite}.
say* The word that is the opposite of {word} is {opposite}.
say* If you say the opposite of {word}, you say {opposite}.
ask What is the opposite of {word}?
ask What's the opposite of {word}?
ask Whats the opposite of {word}?
ask opposite of {word}?
ask Tell me the opposite of {word}.
ask What is the opposite of the word {word}?
ask What is the opposite of "{word}"?
ask Name the opposite of {word}.
ask Which word is the opposite of {word}?
ask What word means the opposite of {word}?
ask Give me the opposite of {word}.
ask Do you know the opposite of {word}?
ask Can you tell me the opposite of {word}?
ask {word} is the opposite of what?
ask I want to know the opposite of {word}.
ask* Which word means the opposite of {word}?
ask* What word is the opposite of {word}?
ask* Could you tell me the opposite of {word}?
follow And of {word}?
follow And the opposite of {word}?
follow And {word}?
follow What about {word}?
follow How about {word}?
""",
    ),
    _relation(
        "plural",
        [{"one": one, "a one": a(one), "plural": plural} for one, plural in PLURALS],
        """
answer The plural of {one} is {plural}.
say The plural form of {one} is {plural}.
say One {one}, two {plural}.
say One is {a one}, and two are {plural}.
say The word {one} has the plural {plural}.
say In the plural, {one} becomes {plural}.
say The plural of the noun {one} is {plural}.
say If you have more than one {one}, you have {plural}.
say The noun {one} takes the plural form {plural}.
say* The plural of the word {one} is {plural}.
say* The word {one} has the plural form {plural}.
ask What is the plural of {one}?
ask What's the plural of {one}?
ask plural of {one}?
ask Tell me the plural of {one}.
ask What is the plural of the word {one}?
ask What is the plural of "{one}"?
ask What is the plural form of {one}?
ask Which word is the plural of {one}?
ask Give me the plural of {one}.
ask Do you know the plural of {one}?
ask What do you call more than one {one}?
ask One {one}, two what?
ask How do you say more than one {one}?
ask* Name the plural of {one}.
ask* Can you tell me the plural of {one}?
ask* What's the plural form of {one}?
follow And of {one}?
follow And the plural of {one}?
follow And {one}?
follow What about {one}?
""",
    ),
    _relation(
        "colour",
        [{"thing": thing, "colour": colour} for thing, colour in COLOURS],
        """
answer The colour of {thing} is {colour}.
say The color of {thing} is {colour}.
say The usual colour of {thing} is {colour}.
say If you paint {thing}, use {colour}.
say You know {thing} by its colour, which is {colour}.
say The colour that {thing} has is {colour}.
say The colour you see on {thing} is {colour}.
say When you look at {thing}, you see {colour}.
say* The colour you see when you look at {thing} is {colour}.
say* The usual color of {thing} is {colour}.
ask What colour is {thing}?
ask What color is {thing}?
ask Which colour is {thing}?
ask Which color is {thing}?
ask What is the colour of {thing}?
ask What is the color of {thing}?
ask colour of {thing}?
ask color of {thing}?
ask Tell me the colour of {thing}.
ask What colour does {thing} have?
ask Which colour does {thing} have?
ask Name the colour of {thing}.
ask What is the usual colour of {thing}?
ask* Which color does {thing} have?
ask* Tell me the color of {thing}.
ask* Do you know the colour of {thing}?
follow And {thing}?
follow And of {thing}?
follow What about {thing}?
follow How about {thing}?
""",
    ),
    _relation(
        "sound",
        [_animal(animal, "sound", sound) for animal, sound in SOUNDS],
        """
answer {an animal} says {sound}.
say The sound of {an animal} is {sound}.
say The sound that {an animal} makes is {sound}.
say If you hear {an animal}, you hear {sound}.
say When {an animal} wants to be heard, it says {sound}.
say A sound made by {an animal} is {sound}.
say* The sound made by {an animal} is {sound}.
say* When you hear {an animal}, you hear {sound}.
ask What does {an animal} say?
ask What sound does {an animal} make?
ask What is the sound of {an animal}?
ask Which sound does {an animal} make?
ask How does {an animal} sound?
ask sound of {an animal}?
ask Tell me what {an animal} says.
ask Tell me the sound of {an animal}.
ask Tell me which sound {an animal} makes.
ask What noise does {an animal} make?
ask What does the {animal} say?
ask What sound does the {animal} make?
ask* Which noise does {an animal} make?
ask* Tell me the sound that {an animal} makes.
ask* What noise does the {animal} make?
follow And {an animal}?
follow And the {animal}?
follow What about {an animal}?
follow How about {an animal}?
""",
    ),
    _relation(
        "young",
        [_animal(animal, "young", a(young)) for animal, young in YOUNG],
        """
answer A young {animal} is called {young}.
say A baby {animal} is called {young}.
say The young of {an animal} is called {young}.
say The name for a young {animal} is {young}.
say People call a baby {animal} {young}.
say We call a baby {animal} {young}.
say The baby of {an animal} is {young}.
say When {an animal} is young, it is called {young}.
say* The name for a baby {animal} is {young}.
say* We call a young {animal} {young}.
ask What is a young {animal} called?
ask What is a baby {animal} called?
ask What do you call a young {animal}?
ask What do you call a baby {animal}?
ask What is the young of {an animal} called?
ask What is the name for a young {animal}?
ask What is the baby of {an animal}?
ask baby {animal}?
ask Tell me what a young {animal} is called.
ask Name the young of {an animal}.
ask What's a baby {animal} called?
ask* What is the name for a baby {animal}?
ask* What is the baby of {an animal} called?
ask* Tell me the name for a young {animal}.
follow And a young {animal}?
follow And a baby {animal}?
follow And {an animal}?
follow What about {an animal}?
""",
    ),
    _relation(
        "legs",
        [_animal(animal, "legs", legs) for animal, legs in LEGS],
        """
answer {an animal} has {legs} legs.
say The {animal} has {legs} legs.
say Look at {an animal}: it has {legs} legs.
say The number of legs of {an animal} is {legs}.
say If you look at {an animal}, you see {legs} legs.
say If you count the legs of {an animal}, you find {legs} legs.
say* When you count the legs of {an animal}, you find {legs} legs.
say* If you look at {an animal}, you find {legs} legs.
ask How many legs does {an animal} have?
ask How many legs has {an animal}?
ask How many legs are there on {an animal}?
ask How many legs does the {animal} have?
ask legs of {an animal}?
ask What is the number of legs of {an animal}?
ask Tell me how many legs {an animal} has.
ask Count the legs of {an animal}.
ask {an animal} has how many legs?
ask Do you know how many legs {an animal} has?
ask* How many legs has the {animal}?
ask* Tell me the number of legs of {an animal}.
ask* Can you tell me how many legs {an animal} has?
follow And {an animal}?
follow What about {an animal}?
follow How about {an animal}?
""",
    ),
    _relation(
        "kind of animal",
        [_animal(animal, "class", name) for animal, name in CLASSES],
        """
answer {an animal} is {class}.
say The {animal} is {class}.
say Every {animal} is {class}.
say If you see {an animal}, you see {class}.
say As an animal, {an animal} is {class}.
say We know that {an animal} is {class}.
say* We know that the {animal} is {class}.
say* As an animal, the {animal} is {class}.
ask What kind of animal is {an animal}?
ask Which kind of animal is {an animal}?
ask What type of animal is {an animal}?
ask What kind of animal is the {animal}?
ask What is {an animal}?
ask What's {an animal}?
ask Tell me what {an animal} is.
ask Tell me what kind of animal {an animal} is.
ask Is {an animal} a mammal, a bird or a fish?
ask Is {an animal} an insect or a reptile?
ask {an animal} is what kind of animal?
ask* Which kind of animal is the {animal}?
ask* What type of animal is the {animal}?
ask* Do you know what {an animal} is?
follow And {an animal}?
follow What about {an animal}?
follow How about {an animal}?
""",
    ),
    _relation(
        "sides",
        [{"shape": shape, "a shape": a(shape), "sides": sides} for shape, sides in SIDES],
        """
answer {a shape} has {sides} sides.
say The {shape} has {sides} sides.
say Every {shape} has {sides} sides.
say {a shape} is a shape with {sides} sides.
say If you draw {a shape}, you draw {sides} sides.
say If you count the sides of {a shape}, you find {sides} sides.
say* When you draw {a shape}, you draw {sides} sides.
say* If you look at {a shape}, you find {sides} sides.
ask How many sides does {a shape} have?
ask How many sides has {a shape}?
ask How many sides are there in {a shape}?
ask How many sides does the {shape} have?
ask sides of {a shape}?
ask What is the number of sides of {a shape}?
ask Tell me how many sides {a shape} has.
ask Count the sides of {a shape}.
ask {a shape} has how many sides?
ask* How many sides has the {shape}?
ask* Tell me the number of sides of {a shape}.
ask* Do you know how many sides {a shape} has?
follow And {a shape}?
follow What about {a shape}?
follow How about {a shape}?
""",
    ),
    _relation(
        "greeting",
        [{}],
        """
answer Hello! How can I help you?
ask Hello!
ask Hello
ask Hi!
ask Hi
ask Hey
ask Hi there!
ask Hey there!
ask Hello there!
ask Good morning!
ask Good evening.
ask Good afternoon!
ask Hello, my friend!
ask Hi, I have a question.
ask Greetings!
ask Nice to meet you.
ask Hello, Qwen!
ask* Hey, good morning!
ask* Hello, I have a question.
""",
    ),
    _relation(
        "how are you",
        [{}],
        """
answer I am fine, thank you.
ask How are you?
ask How are you doing?
ask How are you today?
ask Hi, how are you?
ask Hello, how are you?
ask Hello how are you?
ask How do you feel?
ask How is it going?
ask Are you well?
ask Are you OK?
ask What's up?
ask* Hey, how are you doing?
ask* How do you feel today?
""",
    ),
    _relation(
        "thanks",
        [{}],
        """
answer You are welcome.
ask Thanks!
ask Thank you!
ask Thank you.
ask Thanks a lot!
ask Thank you very much.
ask Many thanks!
ask Great, thanks!
ask OK, thank you.
ask Thanks, that helps.
ask Good, thanks.
ask Thank you for your help.
ask Thank you so much!
ask Perfect, thank you.
ask* Great, thank you very much.
ask* Thanks for your help.
""",
    ),
    _relation(
        "farewell",
        [{}],
        """
answer Goodbye!
ask Bye!
ask Goodbye!
ask Bye bye
ask See you!
ask See you later.
ask Good night!
ask I have to go now.
ask That is all.
ask Goodbye, and thanks.
ask See you tomorrow.
ask Have a nice day!
ask Farewell!
ask* Bye, see you tomorrow!
ask* OK, I have to go. Goodbye!
""",
    ),
    _relation(
        "who are you",
        [{}],
        """
answer I am a very small model of the Qwen3 kind, trained in NumPy.
ask Who are you?
ask What are you?
ask Who am I talking to?
ask What is your name?
ask What's your name?
ask Tell me who you are.
ask Tell me about yourself.
ask Are you a human?
ask Are you a robot?
ask Are you an AI?
ask Are you ChatGPT?
ask Which model are you?
ask What model is this?
ask Who made you?
ask Who trained you?
ask How were you trained?
ask How big are you?
ask Introduce yourself.
ask What is qwen3np?
ask Do you have a name?
ask* What model are you?
ask* Please tell me who you are.
ask* Who or what are you?
""",
    ),
    _relation(
        "what can you do",
        [{}],
        """
answer I know capitals, continents, sums, numbers, days, months, opposites, plurals, colours, animals and shapes.
ask What can you do?
ask What do you know?
ask Help
ask Help me
ask Can you help me?
ask What can I ask you?
ask What can I ask?
ask How can you help me?
ask What are you good at?
ask Tell me what you can do.
ask Tell me what you know.
ask What questions can you answer?
ask Which questions can I ask?
ask What do you know about?
ask What should I ask you?
ask Give me an example of a question.
ask* What questions can I ask you?
ask* Please tell me what you can do.
ask* What can you help me with?
""",
    ),
)
