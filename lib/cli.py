"""The door: every setting once, command lines, files of lines, refusals in one sentence."""

import argparse
import difflib
import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple


class UserError(ValueError):
    """What the user can put right, in one sentence: what, which value, what is allowed."""


class Setting(NamedTuple):
    help: str
    default: object = None  # of a mathematics model; None: it follows from other settings
    toy: object = None  # the toy model's default, where it is another one
    least: float | None = None
    most: float = 1e15
    kind: type | None = None  # the default's own type, unless that is None
    choices: tuple | None = None


SETTINGS = {
    "model": Setting("toy, hub id, short name, local folder or run directory", "toy"),
    "k": Setting("best of how many: 4, a list 1,4,16 or a schedule 8:1", "4"),
    "objective": Setting("weights", "passk", choices=("passk", "maxk", "loo", "groupmax", "plugin",
                                                      "grpo", "reward")),
    "data": Setting("divisor, math, gsm8k, a hub data set or a .jsonl file", "math", "divisor"),
    "n": Setting("answers per problem", 16, toy=32, least=1),
    "prompts": Setting("problems per step", 32, toy=16, least=1),
    "steps": Setting("number of updates", 200, toy=100, least=1),
    "lr": Setting("learning rate of AdamW", 2e-5, toy=1e-3, least=1e-12),
    "lora_rank": Setting("rank of the adapter", 16, toy=8, least=1),
    "flip": Setting("share of the training rewards that is flipped", 0.0, least=0, most=0.5),
    "temperature": Setting("sampling temperature", 1.0, least=1e-6),
    "max_new_tokens": Setting("longest answer, in tokens", 2048, toy=6, least=1),
    "micro_batch_tokens": Setting("tokens in one forward pass", 16384, least=1),
    "gradient_checkpointing": Setting("recompute activations", True, toy=False),
    "load_in_4bit": Setting("keep the base model in 4 bits (NF4)", False),
    "dtype": Setting("of the base model", "auto", choices=("auto", "float32", "bfloat16")),
    "sampler": Setting("vLLM or plain PyTorch", "auto", choices=("auto", "vllm", "hf")),
    "gpu_memory": Setting("vLLM's share of the GPU", 0.45, least=0.01, most=0.99),
    "seed": Setting("of everything random", 0, least=0, most=99999),
    "eval_data": Setting("held-out data (default: follows from --data)", kind=str),
    "eval_n": Setting("answers per held-out problem", 16, toy=64, least=1),
    "eval_every": Setting("steps between evaluations; 0: before and after", 0, least=0),
    "limit": Setting("use so many held-out problems", toy=200, least=1, kind=int),
    "save_every": Setting("steps between checkpoints", 20, toy=50, least=1),
    "tensorboard": Setting("also write the columns for TensorBoard", False),
    "run": Setting("new run directory (default: runs/<what>-<time>)", kind=Path),
    "resume": Setting("run directory to go on with, all settings included", kind=Path),
}
MEANT = {"learning_rate": "lr", "batch_size": "prompts", "output_dir": "run", "epochs": "steps",
         "group_size": "n", "num_generations": "n", "baseline": "objective"}  # what others say
PLACEHOLDERS = {int: "N", float: "X", Path: "PATH", str: "NAME", list: "NAME"}


def parse(doc: str, settings: dict[str, Setting], argv: list[str] | None = None):
    """The settings that were given, None for the others. UserError for what cannot be."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description="\n\n".join(doc.split("\n\n")[:2]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 80),
        allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for name, each in settings.items():
        kind = each.kind or type(each.default)
        how = {"type": kind, "metavar": PLACEHOLDERS.get(kind), "choices": each.choices}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is list:
            how |= {"type": str, "nargs": "+"}
        words = [", ".join(each.choices or ())] + [
            f"{what} {value}" for what, value in (("default", each.default), ("toy", each.toy))
            if value is not None]
        known = "; ".join(filter(None, words))
        parser.add_argument(flag(name), help=each.help + (f" ({known})" if known else ""), **how)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        refuse_word(word, settings)
    for name, each in settings.items():
        value = getattr(args, name)
        if each.least is not None and value is not None and not each.least <= value <= each.most:
            most = f" and at most {each.most}" if each.most < 1e15 else ""
            fail(f"{flag(name)} is {value}, but must be at least {each.least}{most}")
    return args


def refuse_word(word: str, settings) -> None:
    """UserError for a word that is no flag, with the flag that was meant where one is near."""
    name, _, value = word.lstrip("-").partition("=")
    name = name.lower().replace("-", "_")
    name = MEANT.get(name, name)
    if name in ("top_p", "top_k", "min_p"):
        fail(f"{word} is not for RSPO: its gradient is right only for the whole softmax at "
             "--temperature")
    hint = nearest(flag(name), map(flag, settings))
    if name in settings:
        hint = f", did you mean {flag(name)} {value}".rstrip() + "?"
    fail(f"{word!r} is no flag and belongs to none{hint}; see --help")


def settle(args: argparse.Namespace, settings: dict[str, Setting], toy: bool, own: dict) -> None:
    """Give each setting that was not given the value in `own`, else its default."""
    for name, each in settings.items():
        if getattr(args, name, None) is None:
            default = each.toy if toy and each.toy is not None else each.default
            setattr(args, name, own.get(name, default))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fail(sentence: str):
    raise UserError(sentence)


def nearest(name: str, known) -> str:
    """", did you mean 'x'?" where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def run_script(main) -> None:
    """Run main: what the user can put right ends in one sentence and exit code 1."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; nothing that was finished is lost", file=sys.stderr)
        sys.exit(130)


def refuse_early(parse_flags) -> None:
    """Before a script loads torch, which takes seconds: is a flag wrong, is a package missing?"""
    def check() -> None:
        parse_flags()
        for package in ("torch", "transformers", "peft", "tqdm", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                fail(f"the package {package} is missing: pip install -r requirements.txt, or "
                     "requirements-cpu.txt without a GPU (make demo does it by itself)")

    run_script(check)


def read_rows(path: Path, appended: bool = False) -> list[tuple[int, dict]]:
    """(line number, object) of each line of a .jsonl file. UserError names file and line.

    appended: rows are added whole, so behind the last newline is half a row or nothing.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # texts may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file {path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines[:-1] if appended else lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}")
                json.dumps(row, ensure_ascii=False).encode()  # fails for half a character
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object ({error})") from error
            rows.append((number, row))
    return rows


def write_rows(path: Path, rows: list[dict], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
