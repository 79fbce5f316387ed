"""A page of answers to look at, models side by side. It can run nothing and load nothing."""

import warnings
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template

import rspo
from lib.tasks import vote

HEAD = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def rows_of(problems, groups, rewards) -> list[dict]:
    """Problems with their answers and rewards, as in evals.jsonl."""
    return [{"id": p.id, "task": p.task, "problem": p.question, "answer": p.answer, "answers": [
        {"text": a.text, "finished": a.finished, "reward": r} for a, r in zip(group, values)]}
            for p, group, values in zip(problems, groups, rewards)]


def write(path: Path, title: str, k: str, sides: list[tuple[str, list[dict]]]) -> None:
    """At most 20 problems of the first side, chosen evenly, with the answers of every side.

    A side has a name and rows. k is as in --k, but of a schedule only the last counts.
    """
    known = [(escape(name), {row["id"]: row for row in rows}) for name, rows in sides]
    first, k = list(known[0][1].values()), k.split(":")[-1]
    text = [HEAD.substitute(title=escape(title), k=escape(k))]
    for row in first[::-(-len(first) // 20) or 1]:
        wanted = "a divisor of" if row["task"].startswith("divisor") else "right answer:"
        text.append(f"<section><h2>{escape(row['problem'])}</h2><p>{wanted} "
                    f"<code>{escape(row['answer'])}</code></p><div>")
        text += [f"<article><h3>{name} {_table(rows[row['id']]['answers'], k)}</article>"
                 for name, rows in known if row["id"] in rows]
        text.append("</div></section>")
    path.write_text("\n".join(text) + "\n", encoding="utf-8", errors="xmlcharrefreplace")


def _table(answers: list[dict], k: str) -> str:
    rewards, groups, n = [each["reward"] for each in answers], defaultdict(list), len(answers)
    ks = [x if x == "harmonic" else min(int(x), n) for x in k.split(",")]
    with warnings.catch_warnings(action="ignore"):  # of k near n
        weights = sum(rspo.max_at_k_weights(rewards, x) for x in ks) / len(ks)  # (n,)
    for each, weight in zip(answers, weights.tolist()):
        said = vote(each["text"]) if each["finished"] else None
        groups[said, each["reward"], weight].append(each["text"])
    found = sorted(groups.items(), key=lambda item: -len(item[1]))
    cut = sum(not each["finished"] for each in answers)
    return (f"<small>{rewards.count(1)} of {n} right, {len(found)} different, {cut} cut off"
            "</small></h3><div><header><span></span>final answer<span>times</span><span>reward"
            "</span><span>weight</span><span>length</span></header>"
            f"{''.join(_group(*key, texts) for key, texts in found)}</div>")


def _group(said: str | None, reward: float, weight: float, texts: list[str]) -> str:
    kind, mark = {1: ("right", "&#10003;"), 0: ("wrong", "&#10007;")}.get(reward, ("", "~"))
    words = " ".join(texts[0].split())  # easier to read, where they are all that is said
    label = words if "".join(words.split()) == said else said or ""
    label = {None: "<i>cut off</i>", "": "<i>nothing</i>"}.get(
        said, f"<code>{escape(label[:100])}</code>")
    numbers = len(texts), f"{reward:.3g}", f"{weight:.3g}", f"{fmean(map(len, texts)):,.0f}"
    cells = "".join(f"<span>{number}</span>" for number in numbers)
    texts = [f"<small>{times} &times;{' the last 2,000 characters' * (len(text) > 2000)}</small>"
             f"<pre>\n{escape(text[-2000:])}</pre>"
             for text, times in Counter(texts).most_common(8)]
    return (f"<details class='{kind}'><summary><b>{mark}</b>{label}{cells}</summary>"
            f"{''.join(texts)}</details>\n")
