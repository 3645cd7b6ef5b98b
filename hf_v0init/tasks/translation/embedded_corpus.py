"""A German-English parallel corpus that needs no download: numbers, dates, times, prices and sentences.

A small Transformer learns it in minutes on a CPU, and it is not trivial: German number words put the units
before the tens (einundzwanzig / twenty-one), clauses move the verb, nouns and adjectives inflect, decimal
marks and 24-hour times change. What a model has not seen, it has to compose.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, time, timedelta

from datasets import Dataset, DatasetDict

from ...errors import InputError
from . import embedded_phrases as phrases

FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2035, 12, 31)


@dataclass(frozen=True)
class SentencePair:
    """A German sentence, its English translation, and the template and values that both were made from."""

    source: str
    target: str
    template: str
    values: tuple


# A template draws its values and returns (values, German, English). The values determine both sentences.
Draw = tuple[tuple, str, str]


def _count(draw: random.Random, highest: int = 99) -> int:
    """Draw a number of things: 1, or one with a plain plural (101, 201, ... agree otherwise in German)."""
    number = draw.randint(1, highest)
    return number + 1 if number > 1 and number % 100 == 1 else number


def _day(draw: random.Random) -> date:
    return FIRST_DAY + timedelta(days=draw.randrange((LAST_DAY - FIRST_DAY).days + 1))


def _time(draw: random.Random) -> time:
    return time(draw.randrange(24), draw.randrange(0, 60, 5))


def number_words(draw: random.Random) -> Draw:
    """A number, in words."""
    number = draw.randrange(10 ** draw.choice((3, 4, 4, 5)))
    de, en = phrases.cardinal(number)
    return (number,), de, en


def sum_of_numbers(draw: random.Random) -> Draw:
    """A plus b equals c."""
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    (a_de, a_en), (b_de, b_en), (sum_de, sum_en) = map(phrases.cardinal, (a, b, a + b))
    return (
        (a, b),
        f"{_capitalized(a_de)} plus {b_de} ist gleich {sum_de}.",
        f"{_capitalized(a_en)} plus {b_en} equals {sum_en}.",
    )


def plain_date(draw: random.Random) -> Draw:
    """A date alone."""
    day = _day(draw)
    return (day.isoformat(),), *phrases.full_date(day)


def birthday(draw: random.Random) -> Draw:
    """Someone was born on a date."""
    person, day = draw.choice(phrases.PEOPLE), _day(draw)
    de, en = phrases.long_date(day)
    return (
        (person[1], day.isoformat()),
        f"{person[0]} wurde am {de} geboren.",
        f"{person[1]} was born on {en}.",
    )


def appointment(draw: random.Random) -> Draw:
    """An event takes place on a date."""
    event, day = draw.choice(phrases.EVENTS), _day(draw)
    (weekday_de, _), (date_de, _), (_, en) = (
        phrases.weekday(day),
        phrases.long_date(day),
        phrases.full_date(day),
    )
    values = (event[1], day.isoformat())
    return (
        values,
        f"{event[0]} findet am {weekday_de}, dem {date_de}, statt.",
        f"{event[1]} takes place on {en}.",
    )


def postponement(draw: random.Random) -> Draw:
    """An event was moved to another day and time."""
    event, day, clock = draw.choice(phrases.EVENTS), _day(draw), _time(draw)
    other = day + timedelta(days=draw.randint(1, 6))
    (from_de, from_en), (to_de, to_en) = phrases.weekday(day), phrases.weekday(other)
    time_de, time_en = phrases.digital_time(clock)
    return (
        (event[1], from_en, to_en, clock.isoformat()),
        f"{event[0]} wurde von {from_de} auf {to_de} um {time_de} verschoben.",
        f"{event[1]} was moved from {from_en} to {to_en} at {time_en}.",
    )


def departure(draw: random.Random) -> Draw:
    """A train leaves on a day at a time."""
    city, day, clock = draw.choice(phrases.CITIES), _day(draw), _time(draw)
    day_de, day_en = phrases.weekday(day)
    time_de, time_en = phrases.digital_time(clock)
    return (
        (city[1], day_en, clock.isoformat()),
        f"Am {day_de} fährt der Zug nach {city[0]} um {time_de} ab.",
        f"On {day_en} the train to {city[1]} leaves at {time_en}.",
    )


def reported_arrival(draw: random.Random) -> Draw:
    """Someone says that a bus arrives at a time."""
    person, city, hour, minute = (
        draw.choice(phrases.PEOPLE),
        draw.choice(phrases.CITIES),
        draw.randint(1, 12),
        draw.randrange(0, 60, 5),
    )
    de, en = phrases.spoken_time(hour, minute)
    return (
        (person[1], city[1], hour, minute),
        f"{person[0]} sagt, dass der Bus aus {city[0]} um {de} ankommt.",
        f"{person[1]} says that the bus from {city[1]} arrives at {en}.",
    )


def purchase(draw: random.Random) -> Draw:
    """Someone has bought so many things."""
    person, number, noun = draw.choice(phrases.PEOPLE), _count(draw, 999), draw.choice(phrases.THINGS)
    adjective = draw.choice(phrases.ADJECTIVES)
    de, en = phrases.counted_object(number, noun, adjective)
    return (
        (person[1], number, noun.english, adjective[1]),
        f"{person[0]} hat {de} gekauft.",
        f"{person[1]} has bought {en}.",
    )


def price_of_things(draw: random.Random) -> Draw:
    """A thing costs a price."""
    noun, adjective, currency = (
        draw.choice(phrases.THINGS),
        draw.choice(phrases.ADJECTIVES),
        draw.choice(phrases.CURRENCIES),
    )
    cents = draw.randrange(50, 500_000, 50)
    de, en = phrases.price(cents, currency)
    article = phrases.DEFINITE_ARTICLE[noun.gender].capitalize()
    return (
        (noun.english, adjective[1], cents, currency),
        f"{article} {adjective[0]}e {noun.german} kostet {de}.",
        f"The {adjective[1]} {noun.english} costs {en}.",
    )


def invoice(draw: random.Random) -> Draw:
    """The invoice of a date comes to a price."""
    day, cents = _day(draw), draw.randrange(50, 500_000, 50)
    (date_de, date_en), (price_de, price_en) = phrases.long_date(day), phrases.price(cents, "EUR")
    return (
        (day.isoformat(), cents),
        f"Die Rechnung vom {date_de} beträgt {price_de}.",
        f"The invoice of {date_en} comes to {price_en}.",
    )


def sleeping_animals(draw: random.Random) -> Draw:
    """Animals have been sleeping for a span of time."""
    number, animal, adjective = (
        _count(draw),
        draw.choice(phrases.ANIMALS),
        draw.choice(phrases.ADJECTIVES[:9]),
    )
    length, span = _count(draw, 48), draw.choice(phrases.SPANS[:4])
    span_de, span_en = phrases.span_of_time(length, span)
    if number == 1:
        article = phrases.DEFINITE_ARTICLE[animal.gender].capitalize()
        de = f"{article} {adjective[0]}e {animal.german} schläft seit {span_de}."
        en = f"The {adjective[1]} {animal.english} has been sleeping for {span_en}."
    else:
        counted_de, counted_en = phrases.counted_object(number, animal, adjective)
        de = f"{_capitalized(counted_de)} schlafen seit {span_de}."
        en = f"{_capitalized(counted_en)} have been sleeping for {span_en}."
    return (number, animal.english, adjective[1], length, span[2]), de, en


def time_ahead(draw: random.Random) -> Draw:
    """An event begins in a span of time."""
    event, number, span = draw.choice(phrases.EVENTS), _count(draw), draw.choice(phrases.SPANS)
    de, en = phrases.span_of_time(number, span)
    return (event[1], number, span[2]), f"{event[0]} beginnt in {de}.", f"{event[1]} begins in {en}."


def time_ago(draw: random.Random) -> Draw:
    """Someone moved to a city a span of time ago."""
    person, number, span, city = (
        draw.choice(phrases.PEOPLE),
        _count(draw),
        draw.choice(phrases.SPANS),
        draw.choice(phrases.CITIES),
    )
    de, en = phrases.span_of_time(number, span)
    return (
        (person[1], number, span[2], city[1]),
        f"Vor {de} ist {_continued(person[0])} nach {city[0]} gezogen.",
        f"{person[1]} moved to {city[1]} {en} ago.",
    )


def repetition(draw: random.Random) -> Draw:
    """Someone visits a city for the nth time."""
    person, number, city = draw.choice(phrases.PEOPLE), draw.randint(2, 150), draw.choice(phrases.CITIES)
    de, en = phrases.ordinal(number)
    return (
        (person[1], number, city[1]),
        f"{person[0]} besucht {city[0]} zum {de}n Mal.",
        f"{person[1]} visits {city[1]} for the {en} time.",
    )


def village(draw: random.Random) -> Draw:
    """In a year a village had so many inhabitants."""
    year, inhabitants = draw.randint(1200, 2030), draw.randint(100, 99_999)
    (year_de, year_en), (number_de, number_en) = (
        phrases.year_in_words(year),
        phrases.grouped_number(inhabitants),
    )
    return (
        (year, inhabitants),
        f"Im Jahr {year_de} hatte das Dorf {number_de} Einwohner.",
        f"In the year {year_en} the village had {number_en} inhabitants.",
    )


def age_and_month(draw: random.Random) -> Draw:
    """Someone turns an age in a month."""
    person, age, day = draw.choice(phrases.PEOPLE), draw.randint(2, 99), _day(draw)
    (age_de, age_en), (month_de, month_en) = phrases.cardinal(age), phrases.month(day)
    return (
        (person[1], age, month_en),
        f"{person[0]} wird im {month_de} {age_de} Jahre alt.",
        f"{person[1]} turns {age_en} years old in {month_en}.",
    )


def measured_quantity(draw: random.Random) -> Draw:
    """A measurement gave a quantity."""
    unit, tenths = draw.choice(phrases.UNITS), draw.randint(2, 9999)
    de, en = phrases.measure(tenths, unit)
    return (unit, tenths), f"Die Messung ergab {de}.", f"The measurement gave {en}."


TEMPLATES: tuple[Callable[[random.Random], Draw], ...] = (
    number_words,
    sum_of_numbers,
    plain_date,
    birthday,
    appointment,
    postponement,
    departure,
    reported_arrival,
    purchase,
    price_of_things,
    invoice,
    sleeping_animals,
    time_ahead,
    time_ago,
    repetition,
    village,
    age_and_month,
    measured_quantity,
)


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _continued(person: str) -> str:
    """`person` inside a sentence: articles and possessives lose their capital, names and nouns keep it."""
    first, *rest = person.split(" ")
    return " ".join([first.lower(), *rest]) if rest else person


def generate_sentence_pairs(num_pairs: int, seed: int = 0) -> list[SentencePair]:
    """Generate `num_pairs` sentence pairs; no sentence and no (template, values) occurs twice.

    Returns:
        A list in random order, the same for the same `num_pairs` and `seed` on every machine.

    Raises:
        InputError: `num_pairs` < 1.
    """
    if num_pairs < 1:
        raise InputError(f"num_pairs={num_pairs}: must be at least 1")
    draw = random.Random(seed)
    pairs: list[SentencePair] = []
    sources, targets = set(), set()
    while len(pairs) < num_pairs:
        template = draw.choice(TEMPLATES)
        values, source, target = template(draw)
        if source in sources or target in targets:
            continue
        sources.add(source)
        targets.add(target)
        pairs.append(SentencePair(source, target, template.__name__, values))
    return pairs


def generate_embedded_corpus(num_pairs: int = 12_000, seed: int = 0, held_out_fraction: float = 0.05) -> DatasetDict:
    """Generate the corpus, split into train, validation and test.

    Args:
        num_pairs: sentence pairs in all three splits together, at least 3.
        seed: of the draws; the same seed gives the same corpus.
        held_out_fraction: share of validation and of test, each; in (0, 0.5). Each holds at least one pair.

    Returns:
        `DatasetDict` with splits `train`, `validation`, `test`; text columns `source` (German), `target`
        (English), `template` and `values` (what both were made from). No sentence, and no template with its
        values, is in two splits.

    Raises:
        InputError: `num_pairs` < 3 or `held_out_fraction` outside (0, 0.5).
    """
    if num_pairs < 3:
        raise InputError(f"num_pairs={num_pairs}: three splits need at least 3 pairs")
    if not 0.0 < held_out_fraction < 0.5:
        raise InputError(f"held_out_fraction={held_out_fraction}: must be in (0, 0.5), e.g. 0.05")
    pairs = generate_sentence_pairs(num_pairs, seed)
    num_held_out = max(1, int(num_pairs * held_out_fraction))
    splits = {
        "train": pairs[2 * num_held_out :],
        "validation": pairs[:num_held_out],
        "test": pairs[num_held_out : 2 * num_held_out],
    }
    return DatasetDict({name: _build_dataset(part) for name, part in splits.items()})


def _build_dataset(pairs: list[SentencePair]) -> Dataset:
    return Dataset.from_dict(
        {
            "source": [pair.source for pair in pairs],
            "target": [pair.target for pair in pairs],
            "template": [pair.template for pair in pairs],
            "values": [repr(pair.values) for pair in pairs],
        }
    )
