"""An offline English-German translation sample, made from Unicode CLDR through the Babel package.

Every pair says one thing (a date, an amount, a list of countries, ...) in both languages with CLDR's own words and
patterns. Lone names (of a country, a language, a currency, ...) cannot be guessed from other names, so all of them are
in the training split; validation and test hold phrases only, whose words the training split teaches and whose numbers,
dates and combinations it does not have. No English sentence occurs twice. The sample depends on nothing but the
version of Babel.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from itertools import islice

from babel import Locale
from babel.dates import format_date, format_datetime, format_interval, format_skeleton, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_currency
from babel.units import format_compound_unit, format_unit
from datasets import Dataset, DatasetDict, Features
from datasets.features import Translation

SEED = 0
# In this order they are cut from the pairs: the names, which come first, fall to the training split.
SIZES = {"train": 8500, "validation": 500, "test": 500}
ENGLISH, GERMAN = Locale("en"), Locale("de")
CURRENCIES = "USD EUR GBP JPY CHF CAD AUD NZD SEK NOK DKK CZK PLN HUF INR CNY BRL MXN ZAR TRY ILS KRW THB EGP".split()
UNITS = (
    "area-square-meter area-square-kilometer area-hectare area-square-mile digital-gigabyte digital-megabit "
    "duration-century duration-year duration-month duration-week duration-day duration-hour duration-minute "
    "duration-second duration-millisecond electric-volt electric-ampere energy-kilocalorie energy-kilowatt-hour "
    "frequency-megahertz length-kilometer length-meter length-centimeter length-mile length-foot length-inch "
    "length-light-year length-nautical-mile mass-tonne mass-kilogram mass-gram mass-pound mass-ounce power-kilowatt "
    "power-horsepower pressure-hectopascal speed-kilometer-per-hour speed-meter-per-second speed-knot "
    "temperature-celsius temperature-fahrenheit volume-cubic-meter volume-liter volume-milliliter volume-gallon "
    "volume-cup volume-tablespoon volume-teaspoon volume-barrel volume-drop"
).split()
RATED_UNITS = [unit for unit in UNITS if unit.startswith(("digital", "length", "mass", "volume"))]
PER_UNITS = "duration-second duration-minute duration-hour duration-day duration-week duration-year".split()

# A phrase before it has a language: what is said is drawn once, then said in each locale.
Phrase = Callable[[Locale], str]


def _pair(phrase: Phrase) -> dict[str, str]:
    # CLDR joins numbers to their units by several kinds of no-break and thin spaces; split() knows them all.
    return {"en": " ".join(phrase(ENGLISH).split()), "de": " ".join(phrase(GERMAN).split())}


def _day(rng: random.Random) -> date:
    return date(1900, 1, 1) + timedelta(days=rng.randrange(73_000))


def _moment(rng: random.Random) -> time:
    return time(rng.randrange(24), rng.randrange(60), rng.randrange(60))


def _number(rng: random.Random) -> float:
    whole = rng.randrange(1, 10 ** rng.randint(1, 5))
    return whole + rng.randrange(1, 100) / 100 if rng.random() < 0.3 else whole


def _date(rng: random.Random) -> Phrase:
    day, style = _day(rng), rng.choice(["full", "long", "medium", "MMMMd", "MMMEd", "yMMMM", "yMMMEd"])
    if style in ("full", "long", "medium"):
        return lambda locale: format_date(day, style, locale)
    return lambda locale: format_skeleton(style, day, locale=locale)


def _time(rng: random.Random) -> Phrase:
    moment, style = _moment(rng), rng.choice(["short", "medium", "Bhm"])
    if style == "Bhm":
        return lambda locale: format_skeleton(style, moment, locale=locale)
    return lambda locale: format_time(moment, style, locale=locale)


def _date_and_time(rng: random.Random) -> Phrase:
    moment, style = datetime.combine(_day(rng), _moment(rng)), rng.choice(["short", "medium"])
    return lambda locale: format_datetime(moment, style, locale=locale)


def _days(rng: random.Random) -> Phrase:
    first, skeleton = _day(rng), rng.choice(["MMMd", "yMMMd", "yMMMM"])
    last = first + timedelta(days=rng.randint(1, 90))
    return lambda locale: format_interval(first, last, skeleton, locale=locale)


def _distance_in_time(rng: random.Random) -> Phrase:
    unit, count = rng.choice(["second", "minute", "hour", "day", "week", "month", "year"]), rng.randint(1, 99)
    seconds = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000}
    delta = timedelta(seconds=rng.choice([-1, 1]) * count * seconds.get(unit, 31_536_000))
    return lambda locale: format_timedelta(delta, unit, threshold=1000, add_direction=True, locale=locale)


def _measure(rng: random.Random) -> Phrase:
    number, unit = _number(rng), rng.choice(UNITS)
    return lambda locale: format_unit(number, unit, locale=locale)


def _rate(rng: random.Random) -> Phrase:
    number, unit, per = _number(rng), rng.choice(RATED_UNITS), rng.choice(PER_UNITS)
    return lambda locale: format_compound_unit(number, unit, denominator_unit=per, locale=locale) or ""


def _amount(rng: random.Random) -> Phrase:
    number, currency = _number(rng), rng.choice(CURRENCIES)
    return lambda locale: format_currency(number, currency, locale=locale, format_type="name")


def _list(rng: random.Random) -> Phrase:
    names, style = rng.choice([_countries, _languages, _months]), rng.choice(["standard", "or"])
    chosen = rng.sample(range(len(names(ENGLISH))), rng.randint(2, 3))
    return lambda locale: format_list([names(locale)[i] for i in chosen], style, locale)


def _countries(locale: Locale) -> list[str]:
    return [locale.territories[code] for code in _codes(ENGLISH.territories, GERMAN.territories)]


def _languages(locale: Locale) -> list[str]:
    return [locale.languages[code] for code in _codes(ENGLISH.languages, GERMAN.languages)]


def _codes(english: Mapping[str, str], german: Mapping[str, str]) -> list[str]:
    # Two letters leave out the continents and the lesser-known languages; the three codes name no real country.
    codes = {code for code in english if len(code) == 2 and code.isalpha()} - {"XA", "XB", "ZZ"}
    return sorted(codes & set(german))


def _months(locale: Locale) -> list[str]:
    return [locale.months["format"]["wide"][month] for month in range(1, 13)]


def _weekdays(locale: Locale) -> list[str]:
    return [locale.days["format"]["wide"][day] for day in range(7)]


def _currencies(locale: Locale) -> list[str]:
    return [locale.currencies[code] for code in CURRENCIES]


NAMES = [_countries, _languages, _months, _weekdays, _currencies]
# A list brings in several names at once, and there are many to learn: it comes up more often than the others.
KINDS = [_date, _time, _date_and_time, _days, _distance_in_time, _measure, _rate, _amount, _list, _list, _list]


def _all_pairs() -> Iterator[dict[str, str]]:
    for names in NAMES:
        for english, german in zip(names(ENGLISH), names(GERMAN), strict=True):
            yield {"en": english, "de": german}
    rng = random.Random(SEED)
    while True:
        yield _pair(rng.choice(KINDS)(rng))


def cldr_pairs() -> list[dict[str, str]]:
    """Return all pairs, no English side twice: the lone names first, then the phrases in random order."""
    pairs: dict[str, dict[str, str]] = {}
    for pair in _all_pairs():
        pairs.setdefault(pair["en"], pair)
        if len(pairs) == sum(SIZES.values()):
            break
    return list(pairs.values())


def cldr_dataset() -> DatasetDict:
    """Return the pairs as train, validation and test splits with one `translation` column, as in wmt/wmt16."""
    features = Features({"translation": Translation(["en", "de"])})
    pairs = iter(cldr_pairs())
    return DatasetDict(
        {
            split: Dataset.from_dict({"translation": list(islice(pairs, size))}, features=features)
            for split, size in SIZES.items()
        }
    )
