"""A page of answers to look at, models side by side. It runs and loads nothing."""

import re
import warnings
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template

import rspo
from lib.tasks import vote

TEMPLATES = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
PAGE, PROBLEM, SIDE, GROUP, TEXT = map(Template, re.split("<!-- next .*\n", TEMPLATES))


def rows_of(problems, groups, rewards) -> list[dict]:
    """Problems with their answers and rewards, as in evals.jsonl."""
    rows = []
    for p, group, values in zip(problems, groups, rewards):
        answers = [{"text": each.text, "finished": each.finished, "reward": reward}
                   for each, reward in zip(group, values)]
        rows.append({"id": p.id, "task": p.task, "problem": p.question,
                     "answer": p.answer, "answers": answers})
    return rows


def write(path: Path, title: str, k: str, sides: list[tuple]) -> None:
    """At most 20 problems of the first side, with the answers of every side.

    sides: [(name, rows)]. k is as in --k; of a schedule the last one counts.
    """
    known = [(name, {row["id"]: row for row in rows}) for name, rows in sides]
    first, problems = sides[0][1], ""
    k = k.split(":")[-1]
    for row in first[::-(-len(first) // 20) or 1]:
        divisor = row["task"].startswith("divisor")
        problems += PROBLEM.substitute(
            question=escape(row["problem"]),
            wanted="a divisor of" if divisor else "right answer:",
            answer=escape(row["answer"]),
            sides="".join(_side(name, rows[row["id"]]["answers"], k)
                          for name, rows in known if row["id"] in rows))
    text = PAGE.substitute(title=escape(title), k=k, problems=problems)
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def _side(name: str, answers: list[dict], k: str) -> str:
    rewards = [each["reward"] for each in answers]
    n, groups = len(answers), defaultdict(list)
    ks = [x if x == "harmonic" else min(int(x), n) for x in k.split(",")]
    with warnings.catch_warnings(action="ignore"):  # of k near n
        weights = sum(rspo.max_at_k_weights(rewards, x) for x in ks) / len(ks)  # (n,)
    for each, weight in zip(answers, weights.tolist()):
        said = vote(each["text"]) if each["finished"] else None
        groups[said, each["reward"], weight].append(each["text"])
    found = sorted(groups.items(), key=lambda item: -len(item[1]))
    return SIDE.substitute(
        name=escape(name), right=rewards.count(1), n=n, different=len(found),
        cut_off=sum(not each["finished"] for each in answers),
        groups="".join(_group(*key, texts) for key, texts in found))


def _group(said: str | None, reward: float, weight: float, texts: list[str]) -> str:
    kind, mark = {1: ("right", "&#10003;"), 0: ("wrong", "&#10007;")}.get(reward, ("", "~"))
    words = " ".join(texts[0].split())  # easier to read, where they are all that is said
    label = words if "".join(words.split()) == said else said or ""
    code = f"<code>{escape(label[:100])}</code>"
    shown = [TEXT.substitute(
        times=times, shortened=" the last 2,000 characters" * (len(text) > 2000),
        text=escape(text[-2000:])) for text, times in Counter(texts).most_common(8)]
    return GROUP.substitute(
        kind=kind, mark=mark,
        said={None: "<i>cut off</i>", "": "<i>nothing</i>"}.get(said, code),
        times=len(texts), reward=f"{reward:.3g}", weight=f"{weight:.3g}",
        length=f"{fmean(map(len, texts)):,.0f}", texts="".join(shown))
