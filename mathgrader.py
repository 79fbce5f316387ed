"""When is a boxed answer the gold one? What a careful human marker would say, of LaTeX answers to mathematics problems.

A boxed answer is compared as a string first; then lists, points, intervals and matrices element by element; then
exact numbers, numbers in a base and words; and what is left by math-verify, one expression at a time. By itself
math-verify takes (1,2) for {1,2}, 11_2 for 11, 2+2 for 4 and "seat" for "east", and rounds to six decimals.
`tasks.Graders` runs `judge` in worker processes, since a parser may hang on what a model writes.
tests/grader_cases.jsonl holds the cases it is measured by, with the reason of each that it misses.
"""

import itertools
import re
from fractions import Fraction
from functools import lru_cache

LONGEST_ANSWER = 1000         # characters; a longer boxed answer is compared as a string only

SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "~": " ", "\u00a0": " ", "°": r"^\circ ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in "})
TIDY = [(re.compile(pattern, re.ASCII), by) for pattern, by in [
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\\(?:displaystyle|q?quad)(?![a-z])", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"\\phantom\s*(?:\{[^{}]*\}|.)|,?\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})|\\!", ""),
    (r"(?<!\\)\\(?:[,;:>\s]|$)", " "), (r"(?<=\d)\s+(?=\d{3}(?!\d))", ""),                             # 1\,000
    (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\\frac\s*(\d|\\pi(?![a-z]))", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*([\da-z])", r"\1{\2}"),  # \frac12
    (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"), (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\mathrm\s*\{([eid])\}", r"\1"), (r"\\exp\s*\{", r"e^{"), (r"\bnp\.", r"\\"),
    (r"\\(?:mbox|underline|text(?:normal|bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|bm)\s*\{", r"\\text{"),
    (r"\\text\{[\s,]*(?:and|or)\s*\}|\b(?:and|or)\b", ","),
    (r"\\([lg])eq?(?:slant)?(?![a-z])", r"\\\1e "), (r"\\neq?(?![a-z])", r"\\ne "),
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"), (r"\+\s*\\infty", r"\\infty"),
    (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\langle", "("), (r"\\rangle", ")"),
    (r"\\in(?![a-z])", "="), (r"(?<=[\da-z])'", r"^{\\prime}"), (r"(?<=\d)\s*_\s*(?:10|\{10\})(?!\d)", ""),
]]
DEGREE = r"\s*(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree)(?![a-z])"
TRIGONOMETRY = r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)"
LEFT_TO_DO = (TRIGONOMETRY, r"\\(?:log|ln|lg)(?![a-z])", r"!", r"\\binom", r"\\[lr](?:floor|ceil)",
              r"\\gcd|\\bmod|matrix", r"\|", r"\\(?:sum|prod|int|lim)(?![a-z])")
HUGE = re.compile(r"\d\)*\s*\^\s*\{?\s*\(?\d+\s*\^|\^\s*\{?\s*-?\d{5}|\d{5}\s*\)?!", re.ASCII)
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
UNITS = {alias: names.split()[0] for names in (
    "mm millimeter,cm centimeter,m meter metre,km kilometer,in inch inche,ft foot feet,yd yard,mi mile mph,"
    "cent,dollar usd,sec s second,min minute,h hr hour,day,week,month,year,g gram,kg kilogram,lb pound,oz ounce,am,pm"
).split(",") for alias in names.split()}
TEXT = r"\\text\{(?:[^{}\d,]|\^\{?-?\d\}?)*\}(?:\s*\^\s*\{?-?\d\}?)?"
UNIT = rf"(?:{TEXT}|\\frac\{{{TEXT}\}}\{{{TEXT}\}})(?:\s*/?\s*{TEXT})*"
RELATION = r"<|>|\\[lg]e(?![a-z])"
REALS = r"\\mathbb\s*\{?\s*R\s*\}?(?:\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\})?"
MATRIX = r"[\[(]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}\s*[\])]?"
NAME = r"(?:[a-zA-Z]|\\text\{\w+\}|\\[a-z]{2,8})(?:\w*|_\{.*\})(?:\(\w\))?"
SUCH_THAT = rf"^{NAME}\s*(?:=\s*{REALS}\s*)?(?:\\mid(?![a-z])|:|\|)"


def last_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}; None if there is none. A later box that is never closed is no box.

    `\\boxed 5` counts as well, for a plain number only. \\fbox does not.
    """
    found, opened = (-1, None), []                      # (start, content) of the box that begins last; open braces
    for match in re.finditer(r"(\\boxed\s*\{)|\\boxed\s*([-+]?[0-9](?:[0-9.,/]*[0-9])?)|(?<!\\)\\[{}]|([{}])", text):
        if match[1] or match[3] == "{":
            opened.append((match.start(), match.end()) if match[1] else None)
        elif match[2]:
            found = match.start(), match[2]
        elif match[3] and opened and (box := opened.pop()) and box[0] > found[0]:
            found = box[0], text[box[1]:match.start()].strip()
    return found[1]


def judge(text: str, answer: str) -> float:
    """1.0 if the last boxed answer equals the gold one, else 0.0. May hang: see `tasks.grade`."""
    boxed = last_boxed(text)
    if not boxed:
        return 0.0
    if _squash(boxed) == _squash(answer):
        return 1.0
    return float(len(boxed) <= LONGEST_ANSWER and _same(_tidy(answer), _tidy(boxed)))


def _squash(text: str) -> str:
    """Without its spaces, but those between digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(text.split()))


def parsable(answer: str) -> float:
    """1.0 if every part of a gold answer is understood, as a number, a word or by math-verify, else 0.0. May hang."""
    parts = _parts(_tidy(answer))
    elements = _elements(parts[0])[1] if len(parts) == 1 else parts
    if elements:
        return float(all(map(parsable, elements)))
    value, _ = _without_unit(_sides(parts[0])[-1] if parts else "")
    return float(_number(value) is not None or bool(_digits(value) or _word(value)) or _parse(value) is not None)


def _tidy(text: str) -> str:
    """One spelling for what LaTeX spells in many ways."""
    text = text.translate(SYMBOLS)
    for pattern, by in TIDY:
        text = pattern.sub(by, text)
    if re.search(TRIGONOMETRY, text):
        text = re.sub(rf"({NUMBER}){DEGREE}", r"(\\frac{\1\\pi}{180})", text, flags=re.ASCII)
    text = re.sub(DEGREE, " ", text)
    exact = [side for side in text.split("\\approx") if re.search(r"[0-9]|\\pi", side)]       # 2/3 \approx 0.67
    return _bare(exact[0] if exact else text)


def _bare(text: str) -> str:
    """Without a full stop at the end and without (), {} or \\text{} around the whole; a point keeps its brackets."""
    text = text.strip().rstrip(".,;: ")
    match = re.match(r"\\text\{|\{|\(", text)
    if match and _closes(text, match.end() - 1) == len(text) - 1:
        inner = text[match.end():-1]
        if match[0] != "(" or len(_split(inner)) == 1:
            return _bare(inner)
    return text


def _closes(text: str, start: int) -> int:
    """Index of the bracket that closes the one at start, or -1. A half-open interval closes with the other kind."""
    depth = 0
    for match in re.compile(r"\\[{}]|[()\[\]{}]").finditer(text, start):
        depth += 1 if match[0][-1] in "([{" else -1
        if depth == 0:
            return match.end() - 1
    return -1


def _split(text: str, at: str = r"[,;]|\\cup(?![a-z])") -> list[str]:
    """Parts between separators that stand outside all brackets; empty ones are left out."""
    parts, begin, depth = [], 0, 0
    for match in re.finditer(rf"\\?[{{}}]|[()\[\]]|{at}", text):
        if match[0][-1] in "([{}])":
            depth += 1 if match[0][-1] in "([{" else -1
        elif depth == 0:
            parts.append(text[begin:match.start()])
            begin = match.end()
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def _sides(text: str) -> list[str]:
    """Sides of an equation or a chain of them: "x=2+3=5" -> x, 2+3, 5."""
    return _split(text, "=") or [""]


def _parts(text: str) -> list[str]:
    """The answers of a list: members of a set, both signs of \\pm, the intervals of a union or of an inequality."""
    parts = []
    for part in map(_bare, _split(text)):
        part = re.sub(rf"^{NAME}\s*=\s*(?=\\\{{|\\mathbb)", "", part)
        without = re.fullmatch(rf"{REALS}|{NAME}\s*\\ne(.*)", part)
        if part.startswith("\\{") and _closes(part, 1) == len(part) - 1:
            parts += _parts(re.sub(SUCH_THAT, "", part[2:-2].strip()))
        elif without:
            ends = [r"-\infty", *_split(without[1] or without[2] or ""), r"\infty"]
            parts += [f"({low},{high})" for low, high in itertools.pairwise(ends)]
        elif "\\pm" in part:
            parts += [part.replace("\\pm", "+").replace("\\mp", "-"), part.replace("\\pm", "-").replace("\\mp", "+")]
        else:
            parts.append(_interval(part))
    return parts


def _interval(text: str) -> str:
    r"""An inequality for one unknown as an interval: "0 \le x < 5" -> "[0,5)"; anything else as it is."""
    signs, sides = re.findall(RELATION, text), _split(text, RELATION)
    if len(sides) != len(signs) + 1:
        return text
    if ">" in signs or "\\ge" in signs:
        signs, sides = [{">": "<", "\\ge": "\\le"}.get(sign, ">") for sign in signs[::-1]], sides[::-1]
    if len(sides) == 2 and re.fullmatch(NAME, sides[0]):
        signs, sides = ["<", *signs], ["-\\infty", *sides]
    elif len(sides) == 2:
        signs, sides = [*signs, "<"], [*sides, "\\infty"]
    if len(sides) != 3 or ">" in signs or not re.fullmatch(NAME, sides[1]) or not _constant(sides[0] + sides[2]):
        return text
    return f"{'[('[signs[0] == '<']}{sides[0]},{sides[2]}{'])'[signs[1] == '<']}"


def _elements(text: str) -> tuple[str, list[str]]:
    """Kind and elements of a point, an interval or a matrix; ("", []) of anything else."""
    if matrix := re.fullmatch(MATRIX, text, re.DOTALL):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return f"matrix {[len(row) for row in rows]}", [_bare(cell) for row in rows for cell in row]
    inner = _split(text[1:-1], "[,;]") if text[:1] in ("(", "[") and _closes(text, 0) == len(text) - 1 else []
    return (text[0] + text[-1], inner) if len(inner) > 1 else ("", [])


def _constant(text: str) -> bool:
    """Whether it holds no variable."""
    return not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|[ei]", "", text))


def _same(gold: str, given: str) -> bool:
    """Whether two tidied answers are equal: as lists in any order, as points, equations or values."""
    numbers = [_number(_without_unit(text)[0]) for text in (gold, given)]      # before 58,500 is read as a list
    if _squash(gold) == _squash(given) or None not in numbers and _same_value(gold, given):
        return True
    if match := re.fullmatch(r"(?:\\text\{)?\s*\(([A-J])\)\s*\}?\s*([^,;]+)", given):        # (B) 12, as in the AMC
        return _same(gold, match[1] if re.fullmatch("[A-J]", gold) else match[2])
    golds, givens = _parts(gold), _parts(given)
    kind, elements = _elements(golds[0]) if len(golds) == 1 else ("", [])
    if kind == "()" and len(givens) == len(elements) and all("=" in part for part in givens):
        return all(_same(element, _sides(part)[-1]) for element, part in zip(elements, givens))     # x = 1, y = 2
    if len(golds) != len(givens) or not golds:
        return len(golds) == 1 < len(givens) and all(_same(golds[0], part) for part in givens)      # 1/2, 0.5
    if len(golds) > 1:
        for part in golds:
            partner = next((i for i, other in enumerate(givens) if _same(part, other)), None)
            if partner is None:
                return False
            givens.pop(partner)
        return True
    gold_sides, sides = _sides(golds[0]), _sides(givens[0])
    if len(gold_sides) + len(sides) > 2:
        if _constant(gold_sides[0]):                                          # 0.56 = 56\%
            return any(_same(side, sides[-1]) for side in gold_sides)
        same_name = _squash(gold_sides[0]) == _squash(sides[0])
        if len(gold_sides) == 1 or same_name or len(sides) == 1 and re.fullmatch(NAME, gold_sides[0]):
            return _same(gold_sides[-1], sides[-1])
        return _verified(golds[0], givens[0])
    given_kind, given_elements = _elements(givens[0])
    if kind or given_kind:
        same_shape = kind == given_kind and len(elements) == len(given_elements)
        return same_shape and all(map(_same, elements, given_elements))
    return _same_value(golds[0], givens[0])


def _same_value(gold: str, given: str) -> bool:
    """Whether two single values are equal.

    A plain number takes only a plain number, exactly: not 2+2 where 4 is the answer, nor 0.33 where 1/3 is. A unit may be
    left out or added, but not exchanged for another; a percent sign counts, and must stand as the gold answer has it.
    """
    (gold, gold_unit), (given, unit) = _without_unit(gold), _without_unit(given)
    if gold_unit != unit and (gold_unit and unit or "%" in (gold_unit, unit)):
        return False
    value, other = _number(gold), _number(given)
    if value is not None and (other is not None or "^" not in gold):
        return value == other
    if _digits(gold) or _digits(given):
        return _digits(gold) == _digits(given)
    if _word(gold) or _word(given):
        return _letters(gold) == _letters(given)
    if ":" in gold + given:                              # a time or a ratio, for math-verify a quotient
        return _letters(gold) == _letters(given)
    if "\\text" in given and "\\text" not in gold:
        return False
    for function in LEFT_TO_DO:                          # a function of constants that the gold answer has worked out
        if re.search(function, given) and not re.search(function, gold) and _constant(gold):
            return False
    return _verified(gold, given)


def _number(text: str) -> Fraction | None:
    r"""Exact value of a plain number: 1,000  -\frac{3}{8}  1\frac{4}{5}  4.5e33  2^{10}  0.\overline{3}  four."""
    text = re.sub(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2", text)
    text = _squash(text)
    if text.lower() in NUMBER_WORDS:
        return Fraction(NUMBER_WORDS.index(text.lower()))
    sign, text = -1 if text[:1] == "-" else 1, re.sub("^[-+]", "", text)
    exact = lambda digits: Fraction(digits.replace(",", ""))
    if match := re.fullmatch(rf"(?:(\d+) +)?([-+]?{NUMBER})/([-+]?{NUMBER})", text, re.ASCII):
        return sign * (exact(match[1] or "0") + exact(match[2]) / exact(match[3])) if exact(match[3]) else None
    power_of_ten = r"[eE]([-+]?\d{1,3})|(?:\\times|\\cdot|\*)10\^\{?([-+]?\d{1,3})\}?"
    if match := re.fullmatch(rf"({NUMBER})(?:{power_of_ten})?", text, re.ASCII):
        return sign * exact(match[1]) * Fraction(10) ** int(match[2] or match[3] or 0)
    if match := re.fullmatch(r"(\d{1,9})\^\{?([-+]?\d{1,4})\}?", text, re.ASCII):
        return sign * Fraction(int(match[1])) ** int(match[2]) if int(match[1]) else None
    if match := re.fullmatch(r"(\d*)\.(\d*)\\overline\{?(\d+)\}?", text, re.ASCII):
        period = Fraction(int(match[3]), 10 ** len(match[3]) - 1)
        return sign * (exact(f"{match[1]}.{match[2]}0") + period / 10 ** len(match[2]))
    return None


def _without_unit(text: str) -> tuple[str, str | None]:
    r"""Value and unit of "5 \text{ cm}^2", "5 cm", "\$5" or "5\%"; None for a unit that is not in UNITS."""
    if match := re.fullmatch(r"([-+]?)\s*\\\$\s*(.*)", text, re.DOTALL):
        return _without_unit(match[1] + match[2])[0], "dollar"
    if match := re.fullmatch(r"(.*[^\s\\])\s*(?:\\?%|percent|\\text\{\s*percent\s*\})", text, re.DOTALL):
        return match[1], "%"
    match = re.fullmatch(rf"(.*?[\w)}}])\s*({UNIT})", text, re.DOTALL | re.ASCII)
    match = match or re.fullmatch(r"(.*[\d)}])\s*([a-zA-Z][a-zA-Z. /]*)(?:\^\{?\d\}?)?", text, re.DOTALL | re.ASCII)
    if not match:
        return text, None
    words = re.findall("[a-z]+", re.sub(r"\\text|\\frac|\.", "", match[2].lower()))
    words = [word if word in UNITS else word.removesuffix("s") for word in words]
    plain = lambda word: len(word) > 3 or word in UNITS and (len(word) > 1 or "/" in text)
    if "\\" not in match[2] and not all(map(plain, words)):                   # 2s and 6xy are products
        return text, None
    return match[1].strip(), next((UNITS[word] for word in words if word in UNITS), None)


def _digits(text: str) -> tuple | None:
    """Sign, digits and base of a number in a base: "1011_2"; None of anything else."""
    text = re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", text)
    match = re.fullmatch(r"([-+]?)\(?([0-9A-Za-z.]+)\)?_\{?(\d+)\}?", text, re.ASCII)
    return match and match.groups()


def _letters(text: str) -> str:
    return re.sub(r"^an?\s|\\text|[\s.{}]", "", text).lower()


def _word(text: str) -> bool:
    """Whether it is a name or a word (four letters, two capitals or "Yes"): math-verify takes them for products."""
    text = re.sub(r"\\text|[{}]", "", text)
    letters_alone = re.fullmatch(r"[a-zA-Z][\w\s.:'-]*", text, re.ASCII)
    return bool(letters_alone and re.search("[a-zA-Z]{4}|[A-Z]{2}|[A-Z][a-z]{2}", text))


def _verified(gold: str, given: str) -> bool:
    """Whether math-verify finds two expressions equal, with decimals as exact fractions."""
    if HUGE.search(given):                               # 10^{10^{10}}: right as the same string only
        return False
    from math_verify import verify
    parsed = _parse(gold), _parse(given)
    if None in parsed or _infinite(parsed[1]) and parsed[0] != parsed[1]:      # sympy finds e\sqrt{\infty} - 2\pi to be 0
        return False
    return verify(*parsed, timeout_seconds=None)


def _infinite(value) -> bool:
    """Whether an expression holds something infinite or undefined, as it stands or once worked out."""
    from sympy import nan, oo, zoo
    return any(each.has(oo, -oo, zoo, nan) for each in (value, value.doit(), value.evalf(5)))


@lru_cache(maxsize=4096)
def _parse(text: str):
    """What math-verify makes of one expression, None if nothing."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig
    exact = lambda match: rf"(\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})"
    text = re.sub(r"(\d*)\.(\d+)", exact, text, flags=re.ASCII)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text, flags=re.ASCII)
    text = re.sub(r"(?<=\d)i(?![a-z]{2})", " i ", text)  # 3i: it looks for an i by itself
    config = NormalizationConfig(malformed_operators=True, nits=True)          # its units would make 5 of 5m and 5c
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=config)
    found = parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None
