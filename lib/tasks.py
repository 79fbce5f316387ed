"""Problems, their prompts, and the rewards of answers to them.

A data set is a short name (`countdown`, `math500`, ..., see BENCHMARKS), a hub data set with the
columns problem (or question) and answer, or a .jsonl file with `problem`, `answer` and, if it
brings its own, the exact `prompt` on each line. Behind it, `:train` and `:test` take a fixed part
by the hash of the question (one tenth is for testing), `:3` or `:1-3` the problems of these levels.

Rewards. Mathematics: 1 if the last balanced \\boxed{...} equals the answer, else 0. Countdown: 1 if
the expression uses the numbers exactly once and hits the target; `countdown-graded` gives
exp(-|value - target| / 5) for any valid expression. What was cut off earns 0 everywhere.
"""

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lib import cli, marker
from lib.cli import UserError

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TASKS = ("math", "countdown", "countdown-graded")


@dataclass(frozen=True)
class Problem:
    id: str
    question: str  # what the prompt shows
    answer: str  # the gold answer; of Countdown "2357=22": numbers, target
    task: str = "math"  # one of TASKS: how an answer is graded
    prompt: str | None = None  # exact prompt text, where the data brings its own
    level: int | None = None  # difficulty, where the data has one (MATH: 1 to 5)
    prompt_ids: tuple[int, ...] = ()  # tokens of the prompt: see `encode`

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        if self.task != "math" and not re.fullmatch(r"[1-9]+=[0-9]+", self.answer):
            raise ValueError(f"answer {self.answer!r} of Countdown is not of the form 2357=22")

    @property
    def graded(self) -> bool:
        """Whether there are rewards between 0 and 1."""
        return self.task == "countdown-graded"


# ---------------------------------------------------------------- data sets

# name: (hub repository, configuration, split, question column, answer column). Checked in November
# 2026 against public code that loads these sets.
BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime2024": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "amc2023": ("math-ai/amc23", None, "test", "question", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test", "question", "final_answer"),
    # the 12,000 problems of MATH that are not in MATH-500
    "math": ("nlile/hendrycks-MATH-benchmark", None, "train", "problem", "answer"),
    "gsm8k": ("openai/gsm8k", "main", "train", "question", "answer"),
    "gsm8k-test": ("openai/gsm8k", "main", "test", "question", "answer"),
}
HELD_OUT = {"math": "math500", "gsm8k": "gsm8k-test"}   # what else a set is evaluated on


def load_problems(name_or_path: str, limit: int | None = None) -> list[Problem]:
    """Problems of a data set, in its order; limit: so many, in a fixed random order."""
    name, *parts = split_name(name_or_path)
    if name in TASKS[1:]:
        games = [f"{numbers}={target}" for numbers, target in countdown_solutions()]
        problems = [Problem(f"countdown-{g.replace('=', '-')}", f"{g}:", g, name) for g in games]
    elif name.endswith(".jsonl"):
        problems = read_jsonl(Path(name))
    elif name in BENCHMARKS or "/" in name:
        problems = load_hub(name)
    else:
        known = [*TASKS[1:], *BENCHMARKS]
        raise UserError(f"data set {name!r} is unknown{cli.nearest(name, known)}; give one of "
                        f"{', '.join(known)}, owner/name of the hub, or a .jsonl file")
    total = len(problems)
    for part in parts:
        if part in ("train", "test"):
            in_test = lambda p: digest(normal(p.question)) % 10 == 0
            problems = [p for p in problems if in_test(p) == (part == "test")]
        elif all(p.level is None for p in problems):
            raise UserError(f"{name_or_path!r} asks for levels {part}, but {name} has no 'level'")
        else:
            low, high = int(part[0]), int(part[-1])
            problems = [p for p in problems if p.level is not None and low <= p.level <= high]
    if not problems:
        why = f": none of its {total} is in this part; give --eval-data" if total else ""
        raise UserError(f"data set {name_or_path!r} holds no problems{why}")
    if limit and limit < len(problems):
        problems = sorted(problems, key=lambda p: digest(p.question + "/limit"))[:limit]
    return problems


def split_name(name: str) -> list[str]:
    """"math:1-3:train" -> ["math", "1-3", "train"]; any other colon belongs to the name."""
    parts = []
    while match := re.fullmatch(r"(.+):(train|test|[1-9]|[1-9]-[1-9])", name):
        name, parts = match[1], [match[2], *parts]
    return [name, *parts]


def train_and_eval(data: str, eval_data: str | None, eval_limit: int | None):
    """Training and held-out problems, no question in both, and the names of these data."""
    name, *parts = split_name(data)
    if eval_data is None and name in HELD_OUT and not {"train", "test"} & set(parts):
        eval_data = ":".join([HELD_OUT[name], *parts])
    elif eval_data is None:
        data = data.removesuffix(":train")
        data, eval_data = f"{data}:train", f"{data}:test"
    questions = {normal(p.question) for p in load_problems(eval_data)}
    problems = load_problems(data)
    kept = [p for p in problems if normal(p.question) not in questions]
    if not kept:
        raise UserError(f"every problem of {data!r} is in {eval_data!r}, too: nothing to train on")
    if len(kept) < len(problems):
        print(f"left out {len(problems) - len(kept)} problems of {data}: they are in {eval_data}")
    return kept, load_problems(eval_data, eval_limit), data, eval_data


def read_jsonl(path: Path) -> list[Problem]:
    problems, seen = [], {}
    for number, row in cli.read_rows(path):
        where = f"{path}, line {number}"
        for key in ("problem", "answer"):
            if row.get(key) is None or not str(row[key]).strip():
                raise UserError(f"{where}: no {key!r} (it has {sorted(row)})")
        prompt, name = row.get("prompt"), str(row.get("id", f"{path.stem}-{number}"))
        if not isinstance(prompt, str | None):
            raise UserError(f"{where}: 'prompt' is a {type(prompt).__name__}, but must be text")
        if ".." in Path(name).parts:
            raise UserError(f"{where}: the id {name!r} must not hold '..'")
        if name in seen:
            raise UserError(f"{where}: the id {name!r} is that of line {seen[name]} already")
        seen[name] = number
        problems.append(Problem(name, str(row["problem"]), str(row["answer"]), prompt=prompt,
                                level=level_of(row)))
    return problems


def load_hub(name: str) -> list[Problem]:
    repository, config, split, question, answer = BENCHMARKS.get(
        name, (name, None, "train", None, "answer"))
    try:
        import datasets
        rows = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # the library raises many kinds where a download fails
        raise UserError(f"data set {name!r} could not be loaded from the hub ({repository}, "
                        f"{type(error).__name__}); without internet give a .jsonl file") from error
    question = question or ("problem" if "problem" in rows.column_names else "question")
    if missing := {question, answer} - set(rows.column_names):
        raise UserError(f"{name!r} has the columns {rows.column_names} and lacks {sorted(missing)}")
    problems = []
    for i, row in enumerate(rows):
        gold = row[answer]  # OlympiadBench's is a list, GSM8K's stands behind ####
        gold = ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)
        gold = gold.split("####")[-1].strip().strip("$")
        problems.append(Problem(f"{name}-{i}", row[question], gold, level=level_of(row)))
    return problems


def level_of(row: dict) -> int | None:
    """3 of 3, "3" or "Level 3"; None of anything else ("Level ?" is in MATH)."""
    match = re.fullmatch(r"(?:Level )?([1-9])", str(row.get("level")))
    return int(match[1]) if match else None


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def normal(question: str) -> str:
    return " ".join(question.split()).lower()


# ---------------------------------------------------------------- prompts

def render(problem: Problem, tokenizer) -> str:
    """The prompt's text: the data's own, else the chat template where there is one, else plain.

    A template that already asks for a \\boxed{} (Qwen2.5-Math's) gets the question alone.
    """
    if problem.prompt is not None:
        return problem.prompt
    if problem.task != "math":
        return problem.question
    if not tokenizer.chat_template:
        return f"Question: {problem.question}\n{INSTRUCTION}\nAnswer:"
    chat = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    asked = "\\boxed" in chat("")
    return chat(problem.question if asked else f"{problem.question}\n{INSTRUCTION}")


def encode(problems: list[Problem], tokenizer, config, max_new_tokens: int) -> list[Problem]:
    """The problems with their prompt_ids. UserError if the model cannot read one."""
    context, encoded = getattr(config, "max_position_embeddings", None) or 10**9, []
    for problem in problems:
        text = render(problem, tokenizer)
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's.
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
        if not ids:
            raise UserError(f"problem {problem.id}: its prompt {text[:40]!r} has no tokens")
        if len(tokenizer) < 100 and not tokenizer.decode(ids).endswith(text):  # the toy
            raise UserError(f"problem {problem.id}: the tokenizer does not know all of its prompt "
                            "(the toy knows one game only: leave --data out)")
        if len(ids) + max_new_tokens > context:
            raise UserError(f"problem {problem.id}: prompt of {len(ids)} tokens + --max-new-tokens"
                            f" {max_new_tokens} exceed the model's context of {context} tokens")
        encoded.append(replace(problem, prompt_ids=tuple(ids)))
    return encoded


def question(text: str, data: str) -> Problem:
    """The problem that a user types, with its answer in Countdown, else without."""
    text, task = text.strip().rstrip(":"), split_name(data)[0]
    if not text:
        raise UserError("--ask is empty: give a question")
    if task not in TASKS[1:]:
        return Problem("ask", text, "")
    if not re.fullmatch(r"[1-9]{4}=[1-9][0-9]", text):
        raise UserError(f"--ask is {text!r}, but this model plays Countdown: give four numbers 1 "
                        "to 9 and a target 10 to 99, such as 2357=22")
    return Problem("ask", f"{text}:", text, task)


# ---------------------------------------------------------------- Countdown

def countdown_value(expression: str) -> int | None:
    """Value of digits joined by + - *, * first: "3*5+7-2" -> 20. None if it is anything else."""
    if not re.fullmatch(r"[1-9](?:[+\-*][1-9])*", expression):
        return None
    value, term = 0, int(expression[0])
    for operator, digit in zip(expression[1::2], map(int, expression[2::2])):
        if operator == "*":
            term *= digit
        else:
            value, term = value + term, digit if operator == "+" else -digit
    return value + term


def grade_countdown(text: str, answer: str, graded: bool = False) -> float:
    """1.0 if text is an expression in exactly the numbers of answer ("2357=22") that hits it."""
    numbers, target = answer.split("=")
    value = countdown_value(text)
    if value is None or sorted(text[::2]) != sorted(numbers):
        return 0.0
    return math.exp(-abs(value - int(target)) / 5) if graded else float(value == int(target))


@cache
def countdown_solutions() -> dict[tuple[str, int], list[str]]:
    """Every solvable problem: four numbers 1..9 (sorted), a target 10..99 -> its expressions."""
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


# ---------------------------------------------------------------- rewards

def grade(text: str, answer: str) -> float:
    """Reward of one answer to a mathematics problem: 1.0 or 0.0. Never raises, never hangs."""
    return marker.mark([(text, answer)])[0] or 0.0


def grade_all(problems: list[Problem], groups) -> tuple[list[list[float]], int]:
    """Rewards [P][n] of answers [P][n] (with .text and .finished), and how many the grader lost.

    An answer that was cut off earns 0, and so does one whose grading hung or crashed.
    """
    flat = [(p, a) for p, group in zip(problems, groups, strict=True) for a in group]
    whole = [(a.text, p.answer) for p, a in flat if a.finished and p.task == "math"]
    try:
        marked = iter(marker.mark(whole))
    except RuntimeError as error:
        raise UserError(str(error)) from error
    values = [0.0 if not a.finished else next(marked) if p.task == "math"
              else grade_countdown(a.text, p.answer, p.graded) for p, a in flat]
    each = iter(values)
    return [[next(each) or 0.0 for _ in group] for group in groups], values.count(None)


def vote(text: str) -> str:
    """What an answer says, to count which agree: its last boxed string, else the whole text."""
    return "".join((marker.last_boxed(text) or text).split())
