"""Numbers with units in text: "1,250.5 mm", "1/3", "12 %", "3e-4 mol", "5 cm = 50 mm", "$18"."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from kepo.tasks.hint_words import NUMBERS

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<power>[-+]?\d{1,4})(?!\d)|\s*(?:[x*×]|\\times)\s*10\^?\{?(?P<ten>[-+]?\d{1,4})(?!\d)\}?)?"
    r"(?:\s*/\s*(?P<below>\d+(?:\.\d+)?))?"
)
_MONEY = {
    **dict.fromkeys(("$", "dollar", "usd"), frozenset({"dollar"})),
    **dict.fromkeys(("€", "euro", "eur"), frozenset({"euro"})),
    **dict.fromkeys(("£", "pound", "gbp"), frozenset({"pound"})),
    **dict.fromkeys(("yen", "jpy"), frozenset({"yen"})),
    **dict.fromkeys(("yuan", "cny", "rmb"), frozenset({"yuan"})),
    **dict.fromkeys(("₹", "rupee", "inr"), frozenset({"rupee"})),
    "¥": frozenset({"yen", "yuan"}),
}
"""Signs and names of currencies, and what each may mean."""
_CURRENCY = "".join(sign for sign in _MONEY if not sign.isalpha())
_MONEY_IN_TEXT = re.compile(
    rf"[{_CURRENCY}]|\b({'|'.join(name for name in _MONEY if name.isalpha())})s?\b", re.IGNORECASE
)
_SET = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"\$\$(.+?)\$\$", r" \1 "),
        (r"(?<!\\)\$(?=\S)((?:\\.|[^$\\])*?(?:\\.|[^$\\\s]))\$(?!\d)", r"\1"),  # not $5 or $6
        (r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{([^{}\\]*)\}", r" \1 "),
        (r"\\[()\[\]]", ""),  # around a formula
        (r"\\[,;: !]|~|\\(?=[%$])", " "),
        (r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\degree\b|\bdegrees?\b", "°"),
        (r"\s*°\s*", "°"),
        (r"\^\{(-?\d)\}", r"^\1"),
    )
)
"""How numbers and units are set, and what is meant."""
_NAME = r"[^\W\d_]+(?:\^-?[1-3])?"
_UNIT = re.compile(rf"(?:%|°[CFK]?|{_NAME}(?:(?:\s*[/·]\s*|[ -]){_NAME}){{0,5}})\.?")
_LETTERS = "mgslhLNJWVAKCFTMΩ"
"""The units of one letter; any other letter behind a number is a variable."""
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_NO_UNITS = frozenset(
    (*NUMBERS, *_SCALES, "or", "and", "not", "plus", "minus", "times", "divided", "is", "equals")
    + ("pi", "dozen", "half")
)
_PREFIXES = {"": 1.0, "k": 1e3, "c": 1e-2, "m": 1e-3, "µ": 1e-6, "u": 1e-6, "n": 1e-9}
_WORDS = {"meter": "m", "metre": "m", "gram": "g", "liter": "l", "litre": "l", "second": "s"}
_TIMES = {"min": 60.0, "minute": 60.0, "h": 3600.0, "hr": 3600.0, "hour": 3600.0, "day": 86400.0}
_FACTORS = {
    **{f"{prefix}{base}": (base, factor)
       for base in ("m", "g", "l", "s", "mol") for prefix, factor in _PREFIXES.items()},
    **{f"{word}{name}": (base, factor)
       for name, base in _WORDS.items()
       for word, factor in (("", 1.0), ("kilo", 1e3), ("centi", 1e-2), ("milli", 1e-3))},
    **{name: ("s", seconds) for name, seconds in _TIMES.items()},
    "percent": ("%", 1.0),
    "%": ("%", 1.0),
}  # fmt: skip
"""Units by name: what they are measured in, and how much of it they are."""


ROUNDING = 1e-9
"""The least tolerance: units are converted in floating point."""


class Quantity(NamedTuple):
    """A number and what it is a number of."""

    value: float
    unit: str
    """The words of the unit; "" = a plain number."""
    money: frozenset[str] = frozenset()
    """The currencies that it may be of; none = it names none."""


def quantity(text: str) -> Quantity | None:
    """Return the number that a text is, with its unit; None if it is anything else.

    The text is a number, perhaps with a sign of a currency before or after it and the words of a
    unit after it; digits may be grouped by commas, ``1/3`` and ``5 million`` are numbers. ``5 or
    six``, ``5x`` and ``5^2`` are something else.
    """
    plain = _written_out(text)
    signs = re.match(rf"^[-+]?([{_CURRENCY}\\ ]+)", plain)
    plain = re.sub(rf"^([-+]?)[{_CURRENCY}\\ ]+", r"\1", plain).rstrip(". ")
    match = _NUMBER.match(plain)
    if match is None:
        return None
    value = float(match["whole"].replace(",", ""))
    power = int(match["power"] or match["ten"] or 0)
    value = value * 10.0**power if abs(power) <= 300 else math.inf
    if match["below"] is not None:
        below = float(match["below"])
        if below == 0 or math.isinf(below):
            return None
        value /= below
    if math.isinf(value):
        return None
    unit = plain[match.end() :].strip()
    scale, _, of = unit.partition(" ")
    if scale.casefold() in _SCALES:
        value, unit = value * _SCALES[scale.casefold()], of.strip()
    named, _, of = unit.partition(" ")
    money = _currency(signs[1] if signs else "") or _currency(named)
    if _currency(named):
        unit = of.strip()
    if unit and not _is_unit(unit):
        return None
    return Quantity(-value if match["sign"] == "-" else value, " ".join(unit.split()), money)


def _currency(word: str) -> frozenset[str]:
    """Return the currencies that a word or a sign may mean; none if it means none."""
    word = word.strip("\\ .").casefold()
    return _MONEY.get(word) or _MONEY.get(word.rstrip("s"), frozenset())


def other_money(said: str, right: str) -> bool:
    """Return whether two texts name currencies, and not the same."""
    mine, theirs = (
        {min(_currency(name[0])) for name in _MONEY_IN_TEXT.finditer(_written_out(text))}
        for text in (said, right)
    )
    return bool(mine and theirs) and mine != theirs


def _written_out(text: str) -> str:
    """Return a text without LaTeX's and Markdown's ways to set numbers and units."""
    plain = text.replace("\u00b2", "^2").replace("\u00b3", "^3")
    plain = unicodedata.normalize("NFKC", plain).replace("\u2212", "-").replace("\u03bc", "µ")
    for pattern, words in _SET:
        plain = pattern.sub(words, plain)
    return plain.strip(" \n\t*`")


def _is_unit(words: str) -> bool:
    """Return whether what stands behind a number is what it is a number of, and no formula, no
    relation and no other number."""
    if not _UNIT.fullmatch(words):
        return False
    names = re.findall(r"[^\W\d_]+", words)
    return not (
        {name.casefold() for name in names} & _NO_UNITS
        or names[:1] in (["squared"], ["cubed"])
        or (len(names) == 1 and len(names[0]) == 1 and names[0] not in _LETTERS)
    )


def same_quantity(given: Quantity, right: Quantity, tolerance: float) -> bool:
    """Return whether |given - right| <= tolerance |right|, in the same unit.

    A number without a unit is read in the other's. Units that are not known must be the same word,
    but for capitals and a plural s. Money is in no unit but its currency, or in so much for a unit.
    """
    (mine, base), (theirs, other) = _in_base(given), _in_base(right)
    if given.money and right.money and not given.money & right.money:
        return False
    if given.unit and right.unit:
        if base != other:
            return False
    elif (given.unit and right.money and not given.money) or (
        right.unit and given.money and not right.money
    ):
        return False  # 18 % is not $18
    else:
        mine, theirs = given.value, right.value
    return abs(mine - theirs) <= max(tolerance, ROUNDING) * abs(theirs)


def _in_base(quantity: Quantity) -> tuple[float, str]:
    unit = quantity.unit.rstrip(".")
    folded = unit if len(unit) == 1 and unit != "L" else unit.casefold()  # M is not m
    for name in (unit, folded, folded.rstrip("s")):
        if name in _FACTORS:
            base, factor = _FACTORS[name]
            return quantity.value * factor, base
    return quantity.value, folded.rstrip("s")
