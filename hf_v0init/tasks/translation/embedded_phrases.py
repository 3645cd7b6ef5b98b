"""German phrases with their English counterparts: numbers, dates, times, prices, counted things.

Every function maps a value to a pair `(german, english)` that says the same. Number words come from
`num2words`; dates, times, currencies and units from `babel` (CLDR); nouns and their inflection are here.
"""

from dataclasses import dataclass
from datetime import date, time

from babel.dates import format_date, format_time
from babel.numbers import format_currency, format_decimal
from babel.units import format_unit
from num2words import num2words

Phrase = tuple[str, str]  # (German, English)

GERMAN, ENGLISH = "de", "en"


@dataclass(frozen=True)
class Noun:
    """A countable noun: German gender (m, f, n), singular and plural in both languages."""

    gender: str
    german: str
    german_plural: str
    english: str
    english_plural: str


THINGS = (
    Noun("m", "Apfel", "Äpfel", "apple", "apples"),
    Noun("m", "Stuhl", "Stühle", "chair", "chairs"),
    Noun("m", "Tisch", "Tische", "table", "tables"),
    Noun("m", "Brief", "Briefe", "letter", "letters"),
    Noun("m", "Schlüssel", "Schlüssel", "key", "keys"),
    Noun("m", "Mantel", "Mäntel", "coat", "coats"),
    Noun("f", "Lampe", "Lampen", "lamp", "lamps"),
    Noun("f", "Blume", "Blumen", "flower", "flowers"),
    Noun("f", "Tasse", "Tassen", "cup", "cups"),
    Noun("f", "Flasche", "Flaschen", "bottle", "bottles"),
    Noun("f", "Karte", "Karten", "card", "cards"),
    Noun("f", "Uhr", "Uhren", "watch", "watches"),
    Noun("n", "Buch", "Bücher", "book", "books"),
    Noun("n", "Ei", "Eier", "egg", "eggs"),
    Noun("n", "Messer", "Messer", "knife", "knives"),
    Noun("n", "Hemd", "Hemden", "shirt", "shirts"),
    Noun("n", "Fahrrad", "Fahrräder", "bicycle", "bicycles"),
    Noun("n", "Bild", "Bilder", "picture", "pictures"),
)
ANIMALS = (
    Noun("m", "Hund", "Hunde", "dog", "dogs"),
    Noun("m", "Vogel", "Vögel", "bird", "birds"),
    Noun("f", "Katze", "Katzen", "cat", "cats"),
    Noun("f", "Maus", "Mäuse", "mouse", "mice"),
    Noun("f", "Gans", "Gänse", "goose", "geese"),
    Noun("f", "Kuh", "Kühe", "cow", "cows"),
    Noun("n", "Pferd", "Pferde", "horse", "horses"),
    Noun("n", "Schaf", "Schafe", "sheep", "sheep"),
)
ADJECTIVES = (
    ("rot", "red"),
    ("blau", "blue"),
    ("grün", "green"),
    ("schwarz", "black"),
    ("weiß", "white"),
    ("braun", "brown"),
    ("alt", "old"),
    ("neu", "new"),
    ("klein", "small"),
    ("groß", "large"),
    ("schön", "beautiful"),
    ("schwer", "heavy"),
)
PEOPLE = (  # nominative, at the beginning of a sentence
    ("Anna", "Anna"),
    ("Peter", "Peter"),
    ("Maria", "Maria"),
    ("Thomas", "Thomas"),
    ("Julia", "Julia"),
    ("Der Lehrer", "The teacher"),
    ("Die Ärztin", "The doctor"),
    ("Der Bäcker", "The baker"),
    ("Das Kind", "The child"),
    ("Meine Schwester", "My sister"),
    ("Mein Onkel", "My uncle"),
    ("Unsere Nachbarin", "Our neighbor"),
    ("Ihr Großvater", "Her grandfather"),
    ("Sein Freund", "His friend"),
)
CITIES = (
    ("Berlin", "Berlin"),
    ("Hamburg", "Hamburg"),
    ("München", "Munich"),
    ("Köln", "Cologne"),
    ("Wien", "Vienna"),
    ("Zürich", "Zurich"),
    ("Rom", "Rome"),
    ("Paris", "Paris"),
    ("Prag", "Prague"),
    ("Warschau", "Warsaw"),
)
EVENTS = (  # nominative with article, at the beginning of a sentence
    ("Die Sitzung", "The meeting"),
    ("Das Konzert", "The concert"),
    ("Der Kurs", "The course"),
    ("Die Prüfung", "The exam"),
    ("Das Spiel", "The game"),
    ("Die Hochzeit", "The wedding"),
    ("Der Vortrag", "The lecture"),
    ("Die Reise", "The trip"),
)
SPANS = (  # German singular and plural in the dative, English singular and plural
    ("einer Minute", "Minuten", "minute", "minutes"),
    ("einer Stunde", "Stunden", "hour", "hours"),
    ("einem Tag", "Tagen", "day", "days"),
    ("einer Woche", "Wochen", "week", "weeks"),
    ("einem Monat", "Monaten", "month", "months"),
    ("einem Jahr", "Jahren", "year", "years"),
)
UNITS = ("length-kilometer", "mass-kilogram", "volume-liter", "temperature-celsius", "length-meter")
CURRENCIES = ("EUR", "USD", "GBP")

DEFINITE_ARTICLE = {"m": "der", "f": "die", "n": "das"}
INDEFINITE_ACCUSATIVE = {
    "m": ("einen", "en"),
    "f": ("eine", "e"),
    "n": ("ein", "es"),
}  # article, adjective ending


def join_breaking(text: str) -> str:
    """Return `text` with the no-break spaces that CLDR puts into times and prices replaced by plain ones."""
    return text.replace("\u202f", " ").replace("\u00a0", " ")


def cardinal(number: int) -> Phrase:
    """`number` in words, as it is counted: einundzwanzig / twenty-one."""
    return num2words(number, lang=GERMAN), num2words(number, lang=ENGLISH)


def ordinal(number: int) -> Phrase:
    """`number` as an ordinal word, German with the weak ending -e: dritte / third."""
    return num2words(number, lang=GERMAN, to="ordinal"), num2words(number, lang=ENGLISH, to="ordinal")


def year_in_words(year: int) -> Phrase:
    """`year` as it is read out: neunzehnhundertvierundachtzig / nineteen eighty-four."""
    return num2words(year, lang=GERMAN, to="year"), num2words(year, lang=ENGLISH, to="year")


def long_date(day: date) -> Phrase:
    """3. März 2025 / March 3, 2025."""
    return format_date(day, "long", locale=GERMAN), format_date(day, "long", locale=ENGLISH)


def full_date(day: date) -> Phrase:
    """Montag, 3. März 2025 / Monday, March 3, 2025."""
    return format_date(day, "full", locale=GERMAN), format_date(day, "full", locale=ENGLISH)


def weekday(day: date) -> Phrase:
    """Montag / Monday."""
    return format_date(day, "EEEE", locale=GERMAN), format_date(day, "EEEE", locale=ENGLISH)


def month(day: date) -> Phrase:
    """März / March."""
    return format_date(day, "LLLL", locale=GERMAN), format_date(day, "LLLL", locale=ENGLISH)


def digital_time(clock: time) -> Phrase:
    """14:05 Uhr / 2:05 PM."""
    english = join_breaking(format_time(clock, "short", locale=ENGLISH))
    return f"{format_time(clock, 'short', locale=GERMAN)} Uhr", english


def spoken_time(hour: int, minute: int) -> Phrase:
    """The time as it is spoken, `hour` 1-12, `minute` a multiple of 5: halb vier / half past three."""
    following = hour % 12 + 1
    this_de, this_en = cardinal(hour)
    next_de, next_en = cardinal(following)
    if minute == 0:
        return ("ein Uhr" if hour == 1 else f"{this_de} Uhr"), f"{this_en} o'clock"
    if minute == 30:
        return f"halb {next_de}", f"half past {this_en}"
    if minute in (25, 35):
        german = f"fünf {'vor' if minute == 25 else 'nach'} halb {next_de}"
    elif minute < 30:
        german = f"{'Viertel' if minute == 15 else cardinal(minute)[0]} nach {this_de}"
    else:
        german = f"{'Viertel' if minute == 45 else cardinal(60 - minute)[0]} vor {next_de}"
    if minute < 30:
        english = f"{'a quarter' if minute == 15 else cardinal(minute)[1]} past {this_en}"
    else:
        english = f"{'a quarter' if minute == 45 else cardinal(60 - minute)[1]} to {next_en}"
    return german, english


def price(cents: int, currency: str) -> Phrase:
    """1.234,50 € / €1,234.50."""
    german = join_breaking(format_currency(cents / 100, currency, locale=GERMAN))
    return german, format_currency(cents / 100, currency, locale=ENGLISH)


def measure(tenths: int, unit: str) -> Phrase:
    """`tenths`/10 of a CLDR `unit`: 12,5 Kilometer / 12.5 kilometers."""
    value = tenths / 10
    return format_unit(value, unit, locale=GERMAN), format_unit(value, unit, locale=ENGLISH)


def grouped_number(number: int) -> Phrase:
    """12.345 / 12,345."""
    return format_decimal(number, locale=GERMAN), format_decimal(number, locale=ENGLISH)


def counted_object(number: int, noun: Noun, adjective: Phrase | None = None) -> Phrase:
    """`number` (1, or not ending in 01) of `noun`, accusative: drei rote Äpfel / three red apples."""
    german_adjective, english_adjective = adjective if adjective else ("", "")
    if number == 1:
        article, ending = INDEFINITE_ACCUSATIVE[noun.gender]
        words_de = [article, german_adjective and german_adjective + ending, noun.german]
        words_en = ["one", english_adjective, noun.english]
    else:
        words_de = [cardinal(number)[0], german_adjective and german_adjective + "e", noun.german_plural]
        words_en = [cardinal(number)[1], english_adjective, noun.english_plural]
    return " ".join(filter(None, words_de)), " ".join(filter(None, words_en))


def span_of_time(number: int, span: tuple[str, str, str, str]) -> Phrase:
    """`number` (1, or not ending in 01) of a unit of time in the dative: drei Tagen / three days."""
    one_de, plural_de, one_en, plural_en = span
    if number == 1:
        return one_de, f"one {one_en}"
    german, english = cardinal(number)
    return f"{german} {plural_de}", f"{english} {plural_en}"
