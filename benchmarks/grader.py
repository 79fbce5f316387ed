"""How fast answers are graded: 16,384 responses of about 2 kB to real problems, with two workers.

    PYTHONPATH=. python benchmarks/grader.py ../shared/data/*.jsonl      (any files with `problem` and `answer`; 15 to 20 s)

Each response is reasoning text with its answer boxed at the end: half of them the gold answer written in another way,
a quarter the gold answer of another problem, an eighth a formula, an eighth no box at all. Prints seconds and failures.
"""

import random
import sys
import time

import tasks

RESPONSES, GROUP = 16384, 8
FILLER = "Then $x^2 + \\frac{1}{2}x = \\sqrt{3}$, so \\{1, 2\\} leaves us with 3 cases to look at. "


def response(rng: random.Random, gold: str, golds: list[str]) -> str:
    text = FILLER * (2000 // len(FILLER))
    rewritten = rng.choice((gold, f"{gold}.", f"x = {gold}", f"{gold} \\text{{ units}}", gold.replace("\\frac", "\\dfrac"), f"\\left({gold}\\right)"))
    formula = f"\\frac{{{rng.randrange(99)} + \\sqrt{{{rng.randrange(99)}}}}}{{{rng.randrange(1, 99)}}}"
    boxed = rng.choice((rewritten,) * 4 + (rng.choice(golds),) * 2 + (formula, None))
    return text + ("I do not know." if boxed is None else f"The answer is \\boxed{{{boxed}}}.")


def main(paths: list[str]) -> None:
    rng = random.Random(0)
    problems = [problem for path in paths for problem in tasks.load_problems(path)]
    problems = rng.choices(problems, k=RESPONSES // GROUP)
    golds = [problem.answer for problem in problems]
    groups = [[(response(rng, problem.answer, golds), True) for _ in range(GROUP)] for problem in problems]
    tasks.grade(r"\boxed{1}", "2")                      # the workers' start is not timed
    tasks.grade(r"\boxed{1}", "2")
    start = time.perf_counter()
    rewards = tasks.grade_all(problems, groups)
    seconds = time.perf_counter() - start
    mean = sum(map(sum, rewards)) / RESPONSES
    print(f"{RESPONSES} answers in {seconds:.1f} s, {1000 * seconds / RESPONSES:.2f} ms each; mean reward {mean:.3f}, "
          f"failures {tasks.graders().failures}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
