"""Problems, their prompts, and the rewards of answers to them.

A data set is a short name (`divisor`, `math500`, ..., see BENCHMARKS), a hub data
set with the columns problem (or question) and answer, or a .jsonl file with
`problem`, `answer` and, if it brings them, the exact `prompt`, `task`, `level`
and `id` on each line. Behind it, `:3` or `:1-3` takes these levels, and `:train`,
`:select` (to choose settings on) and `:test` take 8, 1 and 1 tenths, by a hash.

Rewards. Mathematics: 1 if the last balanced \\boxed{...} equals the answer.
Divisor: 1 for any d with 1 < d < N that divides N; `divisor-graded` gives
min(1, log d / log 100). All else, and what was cut off, earns 0.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lib import cli, marker

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
GAMES = ("divisor", "divisor-graded")
TASKS = ("math", *GAMES)


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    answer: str  # the gold answer; of a divisor task the number
    task: str = "math"  # one of TASKS: how an answer is graded
    prompt: str | None = None  # exact text, where the data brings its own
    level: int | None = None  # difficulty, where the data has one (MATH: 1 to 5)
    prompt_ids: tuple[int, ...] = ()  # tokens of the prompt: see `encode`

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        if self.task in GAMES and not re.fullmatch("[1-9][0-9]{1,14}", self.answer):
            raise ValueError(f"answer {self.answer!r} of task {self.task} is no number")

    @property
    def graded(self) -> bool:
        """Whether there are rewards between 0 and 1."""
        return self.task == "divisor-graded"


# -------- data sets

# name: (hub repository, configuration, split, question column, answer column).
# Checked in November 2026 against public code that loads these sets.
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
PARTS = {"test": {0}, "select": {1}, "train": set(range(2, 10))}  # hash modulo 10
HELD_OUT = {"math": "math500", "gsm8k": "gsm8k-test"}  # what else a set is evaluated on


def load_problems(name_or_path: str, limit: int | None = None) -> list[Problem]:
    """Problems of a data set, in order; limit: so many, in a fixed random order."""
    name, *parts = split_name(name_or_path)
    if name in GAMES:
        problems = [*divisor_problems(name)]
    elif name.endswith(".jsonl"):
        problems = read_jsonl(Path(name))
    elif name in BENCHMARKS or "/" in name:
        problems = load_hub(name)
    else:
        known = [*GAMES, *BENCHMARKS]
        cli.fail(f"data set {name!r} is unknown{cli.nearest(name, known)}; give a .jsonl "
                 f"file, owner/name of the hub, or one of {', '.join(known)}")
    total = len(problems)
    for part in parts:
        if part in PARTS:
            problems = [p for p in problems if hashed(normal(p.question)) % 10 in PARTS[part]]
        elif all(p.level is None for p in problems):
            cli.fail(f"{name_or_path!r} asks for levels {part}, but {name} has no 'level'")
        else:
            low, high = int(part[0]), int(part[-1])
            problems = [p for p in problems if p.level and low <= p.level <= high]
    if not problems:
        why = f": none of its {total} is in this part; give --eval-data" if total else ""
        cli.fail(f"data set {name_or_path!r} holds no problems{why}")
    if limit and limit < len(problems):
        problems = sorted(problems, key=lambda p: hashed(p.question + "/limit"))[:limit]
    return problems


def split_name(name: str) -> list[str]:
    """"math:1-3:train" -> ["math", "1-3", "train"]; any other colon is the name's."""
    part = "(?:train|select|test|[1-9](?:-[1-9])?)"
    return re.split(rf"(?<=.):(?={part}(?::{part})*\Z)", name)


def train_and_eval(data: str, eval_data: str | None, eval_limit: int | None):
    """Training and held-out problems, no question in both, and their data's names."""
    name, *parts = split_name(data)
    if eval_data is None and name in HELD_OUT and not PARTS.keys() & set(parts):
        eval_data = ":".join([HELD_OUT[name], *parts])
    elif eval_data is None:
        data = data.removesuffix(":train")
        data, eval_data = f"{data}:train", f"{data}:test"
    questions = {normal(p.question) for p in load_problems(eval_data)}
    problems = load_problems(data)
    kept = [p for p in problems if normal(p.question) not in questions]
    if not kept:
        cli.fail(f"every problem of {data!r} is in {eval_data!r}: nothing to train on")
    if len(kept) < len(problems):
        left_out = len(problems) - len(kept)
        print(f"left out {left_out} problems of {data}: they are in {eval_data}")
    return kept, load_problems(eval_data, eval_limit), data, eval_data


def read_jsonl(path: Path) -> list[Problem]:
    problems = {}
    for number, row in cli.read_rows(path):
        where = f"{path}, line {number}"
        for key in ("problem", "answer"):
            if row.get(key) is None or not str(row[key]).strip():
                cli.fail(f"{where}: no {key!r} (it has {sorted(row)})")
        prompt, name = row.get("prompt"), str(row.get("id", f"{path.stem}-{number}"))
        if not isinstance(prompt, str | None):
            cli.fail(f"{where}: 'prompt' is a {type(prompt).__name__}, but must be text")
        if name in problems:
            cli.fail(f"{where}: the id {name!r} is that of an earlier line")
        try:
            problems[name] = Problem(name, str(row["problem"]), str(row["answer"]),
                                     row.get("task", "math"), prompt, level_of(row))
        except ValueError as error:
            cli.fail(f"{where}: {error}")
    return [*problems.values()]


def load_hub(name: str) -> list[Problem]:
    repository, config, split, question, answer = BENCHMARKS.get(
        name, (name, None, "train", None, "answer"))
    try:
        import datasets
        rows = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # the library raises many kinds where a download fails
        cli.fail(f"data set {name!r} could not be loaded from the hub ({repository}, "
                 f"{type(error).__name__}); without internet give a .jsonl file")
    question = question or ("problem" if "problem" in rows.column_names else "question")
    if missing := {question, answer} - set(rows.column_names):
        cli.fail(f"{name!r} has the columns {rows.column_names} and lacks {sorted(missing)}")
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


@cache
def hashed(text: str) -> int:
    return int(cli.digest(text.encode())[:12], 16)


def digest_of(problems: list[Problem]) -> str:
    """Of what is asked, not of what is right, which is looked up to grade."""
    return cli.digest([(p.id, p.question, p.prompt, p.level, p.task) for p in problems])[:16]


@cache
def normal(question: str) -> str:
    return " ".join(question.split()).lower()


# -------- prompts

def render(problem: Problem, tokenizer) -> str:
    """The prompt's text: the data's own, else the chat template's, else a plain one.

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


def encode(problems: list, tokenizer, config, max_new_tokens: int, all_of_them=True):
    """The problems with their prompt_ids. UserError if the model cannot read one.

    all_of_them: else those too long for the model are left out, unless none remains.
    """
    context, encoded = getattr(config, "max_position_embeddings", None) or 10**9, []
    too_long, texts = [], [render(problem, tokenizer) for problem in problems]
    # A chat template writes its own special tokens; a plain prompt gets the tokenizer's.
    every = tokenizer(texts, add_special_tokens=not tokenizer.chat_template).input_ids
    for problem, text, ids in zip(problems, texts, every):
        where = f"problem {problem.id}"
        if not ids:
            cli.fail(f"{where}: its prompt {text[:40]!r} has no tokens")
        if len(tokenizer) < 100 and not tokenizer.decode(ids).endswith(text):
            cli.fail(f"{where}: the toy knows one game only, to divide a number such "
                     "as 19307: leave --data out")
        if len(ids) + max_new_tokens > context:
            too_long.append(f"{where}: prompt of {len(ids)} tokens + --max-new-tokens "
                            f"{max_new_tokens} exceed the model's context of {context} tokens")
        else:
            encoded.append(replace(problem, prompt_ids=tuple(ids)))
    if too_long and (all_of_them or not encoded):
        cli.fail(too_long[0])
    if too_long:
        print(f"left out {len(too_long)} training problems: {too_long[0]}")
    return encoded


# -------- find a divisor

@cache
def divisor_problems(name: str) -> list[Problem]:
    return [Problem(f"divisor-{n}", f"{n}:", str(n), name) for n in composites()]


def composites() -> list[int]:
    """Five digits, a divisor below 100, but neither 2 nor 5: the last digit would tell."""
    return [n for n in range(10001, 100000, 2)
            if n % 5 and any(n % d == 0 for d in range(3, 100, 2))]


def grade_divisor(text: str, answer: str, graded: bool = False) -> float:
    """1.0 if text is a divisor of the number `answer`, not 1 or itself, else 0.0."""
    number, text = int(answer), text.strip()
    d = int(text) if re.fullmatch("[1-9][0-9]{0,14}", text) else 1
    if not 1 < d < number or number % d:
        return 0.0
    return min(1.0, math.log(d, 100)) if graded else 1.0


# -------- rewards

def grade(text: str, answer: str) -> float:
    """Reward of one answer to a mathematics problem. Never raises, never hangs."""
    return marker.mark([(text, answer)])[0] or 0.0


def grade_all(problems: list[Problem], groups) -> tuple[list[list[float]], int]:
    """Rewards [P][n] of answers [P][n] (.text, .finished), and how many the grader lost.

    An answer that was cut off earns 0, and so does one whose grading hung or crashed.
    """
    flat = [(p, a) for p, group in zip(problems, groups, strict=True) for a in group]
    whole = [(a.text, p.answer) for p, a in flat if a.finished and p.task == "math"]
    try:
        marked = iter(marker.mark(whole))
    except RuntimeError as error:
        cli.fail(str(error))
    values = [0.0 if not a.finished else next(marked) if p.task == "math"
              else grade_divisor(a.text, p.answer, p.graded) for p, a in flat]
    each = iter(values)
    return [[next(each) or 0.0 for _ in group] for group in groups], values.count(None)


def vote(text: str) -> str:
    """What an answer says, to count which agree: its last box, else all of it."""
    return "".join((marker.last_boxed(text) or text).split())
