r"""When two mathematics answers are equal, and the worker processes that find out.

Lists, points, intervals and equations are taken apart into single values. A
plain number is answered by a plain number only: not 4 by 2+2. Words are compared
by letters, other values by math-verify's parser, to hundreds of digits. A unit
may be missing or added, not exchanged; a percent sign counts. Doubt is wrong.
"""

import json
import re
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from signal import ITIMER_PROF, ITIMER_REAL, setitimer
from subprocess import DEVNULL, PIPE, Popen

LIMIT_S = 5.0  # of processor time; twelve times as much by the clock
WORKER_BYTES = 4 << 30  # memory of a worker, on Linux
# One spelling of commands, then of more; to the parser \gamma is a function.
COMMANDS = {name: by for names, by in [
    ("left right big Big bigl bigr displaystyle degree °", ""), ("quad qquad", " "),
    ("mbox underline textbf textit textrm mathbf mathit mathrm boldsymbol bm", r"\text"),
    ("dfrac tfrac cfrac", r"\frac"), ("lt", "<"), ("gt", ">"),
    ("le leq leqslant", "≤"), ("ge geq geqslant", "≥"), ("ne neq", "≠"),
    ("in approx ∈", "="), ("cup", "∪"), ("pm", "±"), ("mp", "∓"), ("infty", "∞"),
    ("lbrace", r"\{"), ("rbrace", r"\}"),
    ("π", r"\pi "), ("√", r"\sqrt "), ("×", r"\times "), ("·", r"\cdot "), ("− –", "-"),
    ("colon", ":"), ("gamma", r"\varsigma")] for name in names.split()}
NAME = r"(?:[a-zA-Z]|\\text\{\w+\}|\\[a-z]{2,8})(?:\w*|_\{.*?\})(?:\(\w\))?"
NAMES = rf"{NAME}|\({NAME}(?:,\s*{NAME})+\)"
UNIT_WORD = r"(?:[a-zA-Z]{4,}|(?:[ckm]m|in|ft|mi|min|kg|lb|[a-z]+/[a-z]+)\b|[aApP]\.?[mM]\b)"
TIDY = [(re.compile("(?as)" + pattern), by) for pattern, by in [
    (r"(?<=[\d}])\s*\\approx.*", ""),  # 2/3 \approx 0.67
    (r"\\([a-zA-Z]+)|[^\x00-\x7f]", lambda match: COMMANDS.get(match[1] or match[0], match[0])),
    (r",?\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})|\\!", ""),
    (r"(?<!\\)(?:\\[,;:>()\[\]\s]|\\$|\$|~)", " "),
    (r"\s*([{}^_/*])\s*", r"\1"),
    (r"(?<=\d)\s+(?=\d{3}(?!\d))", ""),  # 1\,000
    (r"\^(?:\{\\circ\}|\\circ)|(?<=\d)\.(?!\d)|(?<=\d)_(?:10|\{10\})(?!\d)", ""),
    (r"\\frac\s*(\d|\\pi(?![a-z]))", r"\\frac{\1}"),  # \frac12
    (r"(\\frac\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
    (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
    (r"\\text\{([eid])\}", r"\1"),
    (r"\\text\{,?\s*(?:and|or)\}|\b(?:and|or)\b", ","),
    (r",?\s*\\text\{,?\s*for (?:all|every|any)\b.*", ""),
    (r"^(?:\\text\{)?\([A-J]\)\}?\s*(?=[\d\\$-])", ""),  # (B) 12
    (r"(?<=[\da-z])'", r"^{\\prime}"),
    (r"(?<=\d)[eE]([-+]?\d+)", r"\\times 10^{\1}"),  # 4.5e33
    (r"\\?%", r"\\text{percent}"),
    (r"(?<=\d)\s*\\text\{\(?base (\d+)\)?\}", r"_\1"),
    (rf"(?:(?<=[\d)}}])\s*|(?<=\\pi)\s+)({UNIT_WORD}[a-zA-Z ./]*)", r"\\text{\1}"),
    (rf"\\\{{{NAME}\s*(?:=\s*\\mathbb\{{?R\}}?)?\s*(?:\\mid|:|\|)", r"\\{"),
    (r"^(?:[a-z]\s*≠|\\mathbb\{R\}\s*\\setminus\s*\\\{)([^{},]+?)(?:\\\})?$",
     r"(-∞,\1)∪(\1,∞)"),
    (r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*?)(?:\\\\)?\s*\\end\{\1\}",
     lambda match: "[(" + re.sub(r"\\\\(?:\[\w+\])?", "),(", match[2].replace("&", ",")) + ")]")]]
NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
BOX = re.compile(r"(\\boxed\s*\{)|\\boxed\s*([-+]?[0-9](?:[0-9.,/]*[0-9])?)"
                 r"|(?<!\\)\\[{}]|([{}])")
PLAIN = re.compile(
    rf"(?a)-?\s*(?:(?:\d+\s*)?\\frac\{{-?{NUMBER}\}}\{{-?{NUMBER}\}}|{NUMBER}(?:/{NUMBER})?"
    r"(?:(?:\s*(?:\\times|\\cdot|\*)\s*10)?\^\{?-?\d{1,4}\}?)?)")
# A word, the letter of a choice, a time or a ratio, a number in a base.
LETTERS = re.compile(r"(?as)(?=.*(?:[a-zA-Z]{4}|[A-Z][a-zA-Z]))[a-zA-Z][\w\s.'-]*|[A-J]"
                     r"|.*(?::|\d\)?_).*")
UNITS = {alias + plural: names.split()[0] for names in (
    "mm millimeter,cm centimeter,m meter metre,km kilometer,in inch inche,ft foot feet,yd yard,"
    "mi mile mph,g gm gram,kg kilogram,lb pound,oz ounce,s sec second,min minute,h hr hour,day,"
    "week,month,year,cent,dollar usd,am,pm,2 sq square,3 cu cubic,"
    "percent dozen hundred thousand million billion"
).split(",") for alias in names.split() for plural in ("", "s")}
WORDS = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(),
                 map(str, range(1, 13))))
TEXT = r"\\text\{(?:[^{}\d,]|\^\{?-?\d\}?)*\}(?:\^\{?-?\d\}?)?"
UNIT = re.compile(rf"(?as)(-?)\s*(\\\$)?(.*?[\w)}}])\s*((?:/?{TEXT})*)")
WORK = r"[!|]|\\(?!frac|sqrt|pi|cdot|times)[a-z]"  # a function left to work out
TOO_HARD = (r"[\d)}]\^\{?\(?\d+\^|\^\{?-?\d{5}|\d{5}\)?!|\\frac\{d.*\}\{d"
            r"|\\(?:sum|prod|int|lim|partial)(?![a-z])")
_threads = ThreadPoolExecutor(2)
_own = threading.local()  # a worker for each thread


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{...} or \boxed 5, if any."""
    found, opened = (-1, None), []  # start and content; open braces
    for match in BOX.finditer(text):
        if match[1] or match[3] == "{":
            opened.append(match)
        elif match[2]:
            found = match.start(), match[2]
        elif match[3] and opened and (box := opened.pop())[1] and box.start() > found[0]:
            found = box.start(), text[box.end():match.start()].strip()
    return found[1]


def judge(text: str, answer: str) -> float:
    """1.0 if the last boxed answer equals the gold one, else 0.0. May hang."""
    boxed = last_boxed(text)
    if not boxed or _squash(boxed) == _squash(answer):
        return float(bool(boxed))
    return float(len(boxed) <= 1000 and _same(_tidy(answer), _tidy(boxed)))


def _squash(text):
    """Without spaces, but those between digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(text.split()))


def _tidy(text):
    for pattern, by in TIDY:
        text = pattern.sub(by, text)
    return _bare(text)


def _mask(text):
    """The text with a dot for each character inside brackets."""
    masked, depth = "", 0
    for token in re.findall(r"\\?.", text, re.DOTALL):
        depth -= token[-1] in ")]}"
        masked += token if depth <= 0 else "·" * len(token)
        depth += token[-1] in "([{"
    return masked


def _split(text, at=r"[;∪]|,(?!0\d)"):
    """The non-empty parts between separators outside all brackets."""
    cuts = [-1, *(match.start() for match in re.finditer(at, _mask(text))), None]
    parts = (text[begin + 1:end].strip() for begin, end in zip(cuts, cuts[1:]))
    return list(filter(None, parts))


def _bare(text):
    r"""Without full stop, and without {}, \text{} or () around one value."""
    text = text.strip().rstrip(".,;: ").removeprefix("=").removeprefix("+").strip()
    around = re.fullmatch(r"((?:\\text)?\{)·*\}|[(\[]·*[)\]]", _mask(text))
    if around and (around[1] or len(_split(text[1:-1])) == 1):
        return _bare(text[len(around[1] or "("):-1])
    return text


def _answers(text):
    """Members of a set or list, both signs of a ±, inequalities as intervals."""
    if re.fullmatch(rf"(?:{NAME}\s*=\s*)?\\\{{·*\\\}}", _mask(text)):
        return _answers(text[text.index("\\{") + 2:-2])
    parts = [_bare(part) for part in _split(text)]
    if len(parts) > 1:
        return [answer for part in parts for answer in _answers(part)]
    if re.search("[±∓]", text):
        return [_bare(text.replace("±", a).replace("∓", b)) for a, b in ("+-", "-+")]
    sides = re.split(r"\s*([<>≤≥])\s*", "".join(parts))  # 0, ≤, x, <, 5
    if sides[1:2] in ([">"], ["≥"]):
        sides = [side.translate(str.maketrans("<>≤≥", "><≥≤")) for side in sides[::-1]]
    if len(sides) == 3:
        sides = ["-∞", "<", *sides] if re.fullmatch(NAME, sides[0]) else [*sides, "<", "∞"]
    shape = re.fullmatch(rf"([^<>≤≥]+)([<≤]){NAME}([<≤])([^<>≤≥]+)", "".join(sides))
    if not shape or re.search(r"(?<![\\a-z])[a-df-hj-z]", shape[1] + shape[4]):
        return parts  # as it is, like f(2) < f(1) < f(4)
    return ["[("[shape[2] == "<"] + f"{shape[1]},{shape[4]}" + "])"[shape[3] == "<"]]


def _elements(text):
    """Brackets and elements of a point, interval or matrix, else []."""
    inner = re.fullmatch(r"[(\[]·*[)\]]", _mask(text)) and _split(text[1:-1], "[,;]")
    return [text[0] + text[-1], *map(_bare, inner)] if inner else []


def _quantity(text):
    r"""Value and known units of "5\text{ cm}^2", "\$5" or "5\text{percent}"."""
    if not (match := UNIT.fullmatch(text)):
        return text, set()
    words = re.findall("[a-z.]+|[23]", match[4].lower() + " dollar" * bool(match[2]))
    units = {UNITS.get(word.replace(".", "")) for word in words}
    value = match[1] + match[3].strip()
    return WORDS.get(value.lower(), value), units - {None}


def _same(gold, given):
    """Whether two tidied answers are equal; lists in any order."""
    (value, unit), (other, its) = _quantity(gold), _quantity(given)
    units_fit = "percent" not in unit ^ its and (not unit or not its or (
        not (unit ^ its) & {"2", "3"} and (unit <= its or its <= unit)))
    plain, other_plain = PLAIN.fullmatch(value), PLAIN.fullmatch(other)
    if _squash(gold) == _squash(given) or (
            plain and other_plain and units_fit and _agree(value, other)):
        return True  # before 58,500 is read as a list
    golds, givens = _answers(gold), _answers(given)
    if len(golds) > 1:
        for part in golds:
            partner = next((answer for answer in givens if _same(part, answer)), None)
            if partner is None:
                return False
            givens.remove(partner)
        return not givens
    point = _elements(_split(golds[0], "=")[-1])[1:] if golds else []
    if point and len(givens) == len(point) and all("=" in part for part in givens):
        return all(_same(one, _split(part, "=")[-1]) for one, part in zip(point, givens))
    if [gold, given] != golds + givens:  # {5}, x < 5, 1/2 or 0.5
        return bool(golds and givens) and all(_same(golds[0], part) for part in givens)
    left, right = _split(gold, "="), _split(given, "=")
    if len(left) + len(right) > 2:
        named = re.fullmatch(NAMES, left[0]) and not LETTERS.fullmatch(left[-1])
        if len(left) == 1 or _squash(left[0]) == _squash(right[0]) or named and len(right) == 1:
            return _same(left[-1], right[-1])
        return len(left) == len(right) == 2 and _agree(
            *("({})-({})".format(*sides) for sides in (left, right)), scaled=True)
    ones, others = _elements(gold), _elements(given)
    if ones or others:
        return len(ones) == len(others) and all(map(_same, ones, others))
    if not units_fit or plain and "^" not in value and not other_plain:
        return False
    if LETTERS.fullmatch(value) or LETTERS.fullmatch(other):
        bare = [re.sub(r"^an?\s|\\text|[\s.{}()]", "", text) for text in (value, other)]
        return bare[0].lower() == bare[1].lower()
    return _agree(value, other)


def _agree(gold, given, scaled=False):
    """Whether expressions agree at many points; if scaled, but for a factor."""
    from sympy import Rational
    one, other = _parsed(gold), _parsed(given)
    if not one.free_symbols and re.search(WORK, given) and not re.search(WORK, gold):
        return False
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    points = [{name: (-1) ** (i == k + 20) * Rational(  # fractions, then whole numbers
        ((4 * k + 7) * i + 8 * k) % 29 * 13 + (i < 20) * (k + 1), 13)
        for k, name in enumerate(names)} for i in range(49 + len(names))]
    if scaled:
        one, other = one / other, (one / other).xreplace(points[0])
    for i, point in enumerate(points if names else [{}]):
        at = one.xreplace(point).doit(), other.xreplace(point).doit()
        difference = (at[0] - at[1]).evalf(5, maxn=300 if names else 2000)
        zero = all(part.is_finite and (part == 0 or part._prec < 10)
                   for part in difference.as_real_imag())
        if not zero and (i < 20 or at[0].is_real and at[1].is_real):
            return False
    return True


@lru_cache(4096)
def _parsed(text):
    """A sympy expression, decimals as fractions; nan if unreadable."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Expr, I, Symbol, nan
    exact = lambda match: rf"(\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})"
    plain = re.sub(r"(?a)(\d*)\.(\d+)", exact, re.sub(r",(?=\d{3})", "", text))
    plain = re.sub("E(?![a-z])", r"\\varrho ", plain)  # it knows no variable E
    config = ConversionConfig(lowercase_symbols=False)
    try:
        found = nan if re.search(TOO_HARD, text) else latex2sympy(
            plain, is_real=True, normalization_config=None, conversion_config=config)
    except Exception:  # many kinds
        return nan
    return found.xreplace({Symbol("i", real=True): I}) if isinstance(found, Expr) else nan


def mark(pairs: list[tuple[str, str]]) -> list[float | None]:
    """Rewards of (response, gold) pairs; None where workers hung, swelled or died."""
    values = dict(zip(pairs, _threads.map(_ask, pairs)))
    for pair, value in values.items():
        if value is None:  # once more, alone and with a longer limit
            values[pair] = _threads.submit(_ask, pair, 4).result()
    return [values[pair] for pair in pairs]


def _ask(pair, times=1):
    worker = getattr(_own, "worker", None)
    if worker is None or worker.poll() is not None:
        worker = Popen([sys.executable, "-P", __file__], text=True, encoding="utf-8",
                       stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
                       start_new_session=True)  # Ctrl-C is not for workers
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError("marking did not start; is math-verify installed?")
        _own.worker = worker
    try:
        worker.stdin.write(json.dumps([*pair, times * LIMIT_S]) + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())
    except (OSError, ValueError):  # it died
        worker.wait()
        return None


def _work():
    """Judge the lines of standard input until it closes."""
    import latex2sympy2_extended  # noqa: F401  (charged to no answer)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr  # no library prints there
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        *pair, limit = json.loads(line)
        setitimer(ITIMER_PROF, limit)  # either ends the process
        setitimer(ITIMER_REAL, 12 * limit)
        try:
            value = judge(*pair)
        except MemoryError:
            raise  # it swelled
        except Exception:  # unreadable is wrong
            value = 0.0
        setitimer(ITIMER_REAL, 0)
        print(value, file=replies, flush=True)


if __name__ == "__main__":
    _work()
