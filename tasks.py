"""Problems, prompts and graders. No torch here: the grading workers are small and start fast.

A data set is named by a short name (`countdown`, `math500`, ..., see BENCHMARKS), a hub data set with the
columns problem (or question) and answer, or a .jsonl file with `problem` and `answer` on each line (and, if it
brings its own, the exact `prompt`). Any of these takes `:train` or `:test` behind it, a fixed split by the hash of the
question with one tenth for testing, and `:3` or `:1-3`, the problems of these levels (MATH knows levels 1 to 5).

Rewards. Mathematics: 1 if the last balanced \\boxed{...} equals the answer, else 0: compared as a string, by shape
and value, and by math-verify (see mathgrader.py).
Countdown: 1 if the expression uses the numbers exactly once and hits the target; the graded variant
`countdown-graded` gives exp(-|value - target| / 5) for any valid expression. A response that was cut off
before its end token earns 0 everywhere.
"""

import difflib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mathgrader import judge, last_boxed, parsable

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
GRADE_LIMIT_S = 5.0           # seconds for one answer; a worker that takes longer is killed and the answer earns 0
TASKS = ("math", "countdown", "countdown-graded")
WORKER_BYTES = 4 << 30        # memory of one grading worker, where the system can limit it


class UserError(ValueError):
    """Something the user can put right, said in one sentence: what, which value, what is allowed."""


@dataclass(frozen=True)
class Problem:
    id: str
    question: str             # what the prompt shows
    answer: str               # the gold answer; for Countdown "2357=22": numbers and target
    task: str = "math"        # "math", "countdown" or "countdown-graded": how a response is graded
    prompt: str | None = None # exact prompt text, where the data brings its own (few-shot examples, say)
    level: int | None = None  # difficulty, where the data has one (MATH: 1 to 5)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        if self.task != "math" and not re.fullmatch(r"[1-9]+=[0-9]+", self.answer):
            raise ValueError(f"answer {self.answer!r} of a Countdown problem is not of the form 2357=22")


# ---------------------------------------------------------------- data sets

# name: (hub repository, configuration, split, question column, answer column). Checked in November 2026 against public
# code that loads these sets; "level" is read where a set has it.
BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime2024": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "amc2023": ("math-ai/amc23", None, "test", "question", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test", "question", "final_answer"),
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "problem", "answer"),      # the 12,000 outside MATH-500
    "gsm8k": ("openai/gsm8k", "main", "train", "question", "answer"),
    "gsm8k-test": ("openai/gsm8k", "main", "test", "question", "answer"),
}
HELD_OUT = {"math": "math500", "gsm8k": "gsm8k-test"}     # what a training set is evaluated on by default


def load_problems(name_or_path: str, limit: int | None = None) -> list[Problem]:
    """Problems of a data set, in its order unless limited. Raises UserError if it is unknown, broken or empty.

    limit: only the first so many, in a fixed random order.
    """
    name, *filters = _split_name(name_or_path)
    if name in ("countdown", "countdown-graded"):
        problems = [Problem(p.id, p.question, p.answer, name) for p in _countdown_problems()]
    elif name.endswith(".jsonl"):
        problems = _load_jsonl(Path(name))
    elif name in BENCHMARKS or "/" in name:
        problems = _load_hub(name)
    else:
        known = ["countdown", "countdown-graded", *BENCHMARKS]
        raise UserError(f"data set {name!r} is unknown{nearest(name, known)}; give one of {', '.join(known)}, "
                        "a hub data set (owner/name) or a .jsonl file")
    total = len(problems)
    for part in filters:
        if part in ("train", "test"):
            problems = [p for p in problems if _in_test_part(p.question) == (part == "test")]
        else:
            if all(p.level is None for p in problems):
                raise UserError(f"data set {name_or_path!r} asks for levels {part}, but {name} has no 'level'")
            low, high = int(part[0]), int(part[-1])
            problems = [p for p in problems if p.level is not None and low <= p.level <= high]
    if not problems:
        raise UserError(f"data set {name_or_path!r} holds no problems" + (
            f": none of the {total} in {name} falls into this part; take another, or give --eval-data" if filters and total else ""))
    if limit and limit < len(problems):
        problems = sorted(problems, key=lambda p: _digest(p.question + "/limit"))[:limit]
    return problems


def _split_name(name: str) -> list[str]:
    """"math:1-3:train" -> ["math", "1-3", "train"]; a colon before anything else belongs to the name."""
    filters = []
    while match := re.fullmatch(r"(.+):(train|test|[1-9]|[1-9]-[1-9])", name):
        name, filters = match[1], [match[2], *filters]
    return [name, *filters]


def train_and_eval(data: str, eval_data: str | None, eval_limit: int) -> tuple[list[Problem], list[Problem], str, str]:
    """Training and held-out problems and the names that give them again. No question is in both."""
    name, *filters = _split_name(data)
    if eval_data is None and name in HELD_OUT and not {"train", "test"} & set(filters):
        eval_data = ":".join([HELD_OUT[name], *filters])
    elif eval_data is None:
        data = data.removesuffix(":train")
        data, eval_data = f"{data}:train", f"{data}:test"
    held_out = load_problems(eval_data)
    questions = {_normal_question(p.question) for p in held_out}
    problems = load_problems(data)
    kept = [p for p in problems if _normal_question(p.question) not in questions]
    if not kept:
        raise UserError(f"every problem of {data!r} is also in the evaluation data {eval_data!r}: nothing to train on")
    if len(kept) < len(problems):
        print(f"left {len(problems) - len(kept)} of {len(problems)} problems of {data} out: they are in {eval_data} too")
    return kept, load_problems(eval_data, eval_limit), data, eval_data


def nearest(name: str, known) -> str:
    """", did you mean 'x'?" where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, split at newlines alone: a JSON string may hold other line separators."""
    try:
        return path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file {path} cannot be read: {error}") from error


def parse_row(line: str) -> dict:
    """The JSON object on a line of a .jsonl file; ValueError if it is anything else."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} found, but each line must be a JSON object")
    json.dumps(row, ensure_ascii=False).encode()        # ValueError for half a character (\\ud800), which no file can hold
    return row


@contextmanager
def locked(path: Path, refusal: str):
    """Hold a file against other processes; the lock dies with this one. UserError with that refusal if one has it already."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(refusal) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            print(f"the file system of {path} knows no locks: nothing keeps a second process out")
        yield


def _load_jsonl(path: Path) -> list[Problem]:
    problems, seen = [], {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_row(line)
        except ValueError as error:
            raise UserError(f"{where}: not a JSON object ({error})") from error
        for key in ("problem", "answer"):
            if row.get(key) is None or not str(row[key]).strip():
                raise UserError(f"{where}: no {key!r} (each line needs 'problem' and 'answer'; it has {sorted(row)})")
        prompt = row.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"{where}: 'prompt' is a {type(prompt).__name__}, but must be text")
        name = str(row.get("id", f"{path.stem}-{number}"))
        if ".." in Path(name).parts:
            raise UserError(f"{where}: the id {name!r} must not hold '..': it would be a path out of its folder")
        if name in seen:
            raise UserError(f"{where}: the id {name!r} is that of line {seen[name]} already; each problem needs its own")
        seen[name] = number
        problems.append(Problem(name, str(row["problem"]), str(row["answer"]), prompt=prompt, level=_level(row.get("level"))))
    return problems


def _load_hub(name: str) -> list[Problem]:
    repository, config, split, question_column, answer_column = BENCHMARKS.get(name, (name, None, "train", None, "answer"))
    try:
        import datasets
        rows = datasets.load_dataset(repository, config, split=split)
    except Exception as error:      # the library raises many kinds when a download fails: all mean the same here
        raise UserError(f"data set {name!r} could not be loaded from the hub ({repository}, split {split}): "
                        f"{type(error).__name__}; without internet give a .jsonl file with 'problem' and 'answer' on each "
                        "line instead") from error
    if question_column is None:
        question_column = "problem" if "problem" in rows.column_names else "question"
    missing = {question_column, answer_column} - set(rows.column_names)
    if missing:
        raise UserError(f"hub data set {name!r} has the columns {rows.column_names}, but needs {sorted(missing)}")
    level = lambda row: _level(row["level"]) if "level" in rows.column_names else None
    return [Problem(f"{name}-{i}", row[question_column], _gold(row[answer_column]), level=level(row)) for i, row in enumerate(rows)]


def _level(value) -> int | None:
    """3 of 3, "3" or "Level 3"; None of anything else ("Level ?" is in MATH)."""
    match = re.fullmatch(r"(?:Level )?([1-9])", str(value))
    return int(match[1]) if match else None


def _gold(answer) -> str:
    """Final answer of a hub row: GSM8K's stands behind ####, OlympiadBench's is a list."""
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    return str(answer).split("####")[-1].strip().strip("$")


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _normal_question(question: str) -> str:
    return " ".join(question.split()).lower()


def _in_test_part(question: str) -> bool:
    return _digest(_normal_question(question)) % 10 == 0


# ---------------------------------------------------------------- prompts

def render(problem: Problem, tokenizer) -> str:
    """The prompt text: the data's own, the question alone for Countdown, the chat template where the model has one, else plain.

    A chat template that already asks for a \\boxed{} (Qwen2.5-Math's does) gets the question alone; every
    other gets the instruction behind the question.
    """
    if problem.prompt is not None:
        return problem.prompt
    if problem.task != "math":
        return problem.question
    if not tokenizer.chat_template:
        return f"Question: {problem.question}\n{INSTRUCTION}\nAnswer:"
    chat = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    if "\\boxed" in chat(""):
        return chat(problem.question)
    return chat(f"{problem.question}\n{INSTRUCTION}")


# ---------------------------------------------------------------- Countdown

def countdown_value(expression: str) -> int | None:
    """Value of digits joined by + - *, * first: "3*5+7-2" -> 20. None if it is anything else."""
    if not re.fullmatch(r"[1-9](?:[+\-*][1-9])*", expression):
        return None
    value, sign, product = 0, 1, int(expression[0])
    for operator, digit in zip(expression[1::2], expression[2::2]):
        if operator == "*":
            product *= int(digit)
        else:
            value, sign, product = value + sign * product, (1 if operator == "+" else -1), int(digit)
    return value + sign * product


def grade_countdown(text: str, answer: str, graded: bool = False) -> float:
    """1.0 if text is an expression in exactly the numbers of answer ("2357=22") that equals its target.

    graded: exp(-|value - target| / 5) instead of 0 for a valid expression that misses; invalid is 0.
    """
    numbers, target = answer.split("=")
    value = countdown_value(text)
    if value is None or sorted(text[::2]) != sorted(numbers):
        return 0.0
    return math.exp(-abs(value - int(target)) / 5) if graded else float(value == int(target))


@cache
def countdown_solutions() -> dict[tuple[str, int], list[str]]:
    """Every solvable problem, four numbers 1..9 (sorted) and a target 10..99 -> its expressions."""
    solutions: dict[tuple[str, int], list[str]] = {}
    operators = list(itertools.product("+-*", repeat=3))
    for numbers in itertools.combinations_with_replacement("123456789", 4):
        for a, b, c, d in sorted(set(itertools.permutations(numbers))):
            for o, p, q in operators:
                expression = a + o + b + p + c + q + d
                value = countdown_value(expression)
                if 10 <= value <= 99:
                    solutions.setdefault(("".join(numbers), value), []).append(expression)
    return solutions


def _countdown_problems() -> list[Problem]:
    return [Problem(f"countdown-{numbers}-{target}", f"{numbers}={target}:", f"{numbers}={target}")
            for numbers, target in countdown_solutions()]


# ---------------------------------------------------------------- mathematics

class Graders:
    """Worker processes that run `judge`, each on one answer at a time and under limits of time and memory.

    A worker that hangs or dies is killed and replaced; its answer earns 0 and is counted in `failures`.
    Workers talk in JSON lines over pipes and end by themselves when this process does.
    """

    def __init__(self, workers: int, limit_s: float = GRADE_LIMIT_S):
        self.failures, self.limit_s = 0, limit_s
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        for _ in range(workers):
            self._idle.put(None)                        # a process is started at first use

    def grade(self, text: str, answer: str) -> float:
        return self.ask("judge", text, answer)

    def ask(self, what: str, *texts: str) -> float:
        """What `judge` or `parsable` says; 0.0 of a worker that hangs or dies."""
        worker = self._idle.get()
        try:
            worker = worker if worker and worker.poll() is None else self._start()
        except UserError:
            self._idle.put(None)
            raise
        timer = threading.Timer(self.limit_s, lambda: (worker.kill(), worker.wait()))
        timer.start()
        try:
            worker.stdin.write(json.dumps([what, *texts]) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except OSError:                                 # it died while we wrote
            reply = ""
        timer.cancel()
        timer.join()                                    # if it just fired, the worker is dead for the next answer to see
        if not reply:
            worker.kill()
            worker.wait()
            with self._lock:
                self.failures += 1
        self._idle.put(worker)
        return float(reply or 0)

    @staticmethod
    def _start() -> subprocess.Popen:
        worker = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                                  start_new_session=True)       # Ctrl-C in the terminal is not for them
        if worker.stdout.readline() != "ready\n":       # importing sympy takes a second: outside the time limit
            raise UserError("the grading worker did not start; is math-verify installed (pip install math-verify)?")
        return worker


@cache
def graders() -> Graders:
    return Graders(workers=2)


def grade(text: str, answer: str) -> float:
    """Grade one response to a mathematics problem: 1.0 or 0.0. Never raises, never hangs."""
    return graders().grade(text, answer)


def vote(text: str) -> str:
    """What an answer says, for counting which agree: its last boxed string, spaces apart, or the whole text where there is none."""
    return "".join((last_boxed(text) or text).split())


def unparsable(answers: Iterable[str]) -> list[str]:
    """The gold answers that are not understood, each once: they can be matched as strings only. Never hangs."""
    from concurrent.futures import ThreadPoolExecutor
    answers = list(dict.fromkeys(answers))
    with ThreadPoolExecutor(2) as threads:
        understood = threads.map(lambda answer: graders().ask("parsable", answer), answers)
        return [answer for answer, fine in zip(answers, understood) if not fine]


def grade_all(problems: list[Problem], groups: list[list[tuple[str, bool]]]) -> list[list[float]]:
    """Rewards [P][n] of (text, finished) responses [P][n]; a response that was cut off earns 0."""
    from concurrent.futures import ThreadPoolExecutor

    def one(problem: Problem, text: str, finished: bool) -> float:
        if not finished:
            return 0.0
        if problem.task == "math":
            return grade(text, problem.answer)
        return grade_countdown(text, problem.answer, graded=problem.task == "countdown-graded")

    flat = [(problem, *response) for problem, group in zip(problems, groups, strict=True) for response in group]
    if any(problem.task == "math" for problem in problems):
        with ThreadPoolExecutor(2) as threads:
            values = iter(list(threads.map(lambda args: one(*args), flat)))
    else:
        values = (one(*args) for args in flat)
    return [[next(values) for _ in group] for group in groups]


def _worker() -> None:
    """Answer JSON lines ["judge", text, answer] or ["parsable", answer] from standard input until it closes."""
    import math_verify  # noqa: F401  (imported before "ready", so that the first answer is not charged for it)
    logging.disable(logging.CRITICAL)
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    except (ImportError, ValueError, OSError):          # not on Linux: the time limit has to do
        pass
    replies, sys.stdout = sys.stdout, sys.stderr        # nothing a library prints may reach the pipe
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(int(2 * GRADE_LIMIT_S))            # ends a worker that hangs and has lost the parent that would kill it
        try:
            what, *texts = json.loads(line)
            value = {"judge": judge, "parsable": parsable}[what](*texts)
        except Exception:                               # whatever a parser makes of hostile text, it is no right answer
            value = 0.0
        signal.alarm(0)
        print(value, file=replies, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _worker()
    else:
        print(__doc__)
