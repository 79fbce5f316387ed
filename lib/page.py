"""A page of answers to look at, models side by side. It can run nothing and load nothing."""

import warnings
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from statistics import fmean

import rspo
from lib.tasks import vote

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>
body {font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 80em; margin: auto}
body {padding: 0 1em} h2 {font-size: 1em; font-weight: normal} h2, h3, p {margin: .3em 0}
h1 {font-size: 1.4em} h3 {font-size: 1em} section > div {display: grid; gap: 0 3em}
section > div {grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr))}
section {border-top: 1px solid #bbb; padding: .5em 0 1em; margin-top: 1em}
article div {max-height: 18em; overflow: auto} article div:has([open]) {max-height: none}
p, small, header {color: #555; font-weight: normal; font-size: .9em} h2, pre {white-space: pre-wrap}
h2, code, pre {overflow-wrap: anywhere; unicode-bidi: isolate} span {text-align: right}
summary, header {display: grid; grid-template-columns: 20px 1fr repeat(3, 60px) 70px}
summary {cursor: pointer} pre {background: #f3f3f3; padding: .5em; margin: 0 0 .5em}
summary code {white-space: nowrap; text-overflow: ellipsis; overflow: hidden}
header, details {padding: 0 .5em; margin: 2px 0; border-left: 5px solid transparent}
.right {border-left: 5px solid #0072b2} .right b {color: #0072b2}
.wrong {border-left: 5px dotted #d55e00} .wrong b {color: #d55e00}</style>"""


def rows_of(problems, groups, rewards) -> list[dict]:
    """Problems with their answers and rewards, as in samples.jsonl."""
    return [{"id": p.id, "task": p.task, "problem": p.question, "answer": p.answer, "answers": [
        {"text": a.text, "finished": a.finished, "reward": r} for a, r in zip(group, values)]}
            for p, group, values in zip(problems, groups, rewards)]


def write(path: Path, title: str, k: str, sides: list[tuple[str, list[dict]]]) -> None:
    """At most 20 problems of the first side, chosen evenly, with the answers of every side.

    A side has a name and rows. k is as in --k, but of a schedule only the last counts.
    """
    known = [(escape(name), {row["id"]: row for row in rows}) for name, rows in sides]
    first, title, k = list(known[0][1].values()), escape(title), k.split(":")[-1]
    text = [f"{HEAD}<title>{title}</title><h1>{title}</h1><p>Answers by what they say in the end, "
            "the most frequent first; click on one to read it. &#10003; is right, &#10007; "
            "wrong, ~ between. Weight: RSPO's, k times what such an answer adds to the best of "
            f"k - 1 others, k = {escape(k)} (or all answers, if these are fewer). Length: in "
            "characters."]
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
