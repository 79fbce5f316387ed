"""The door: every setting once, command lines, files of rows, refusals."""

import argparse
import difflib
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple

TOY = Path(__file__).resolve().parent.parent / "toy"


class UserError(ValueError):
    """What the user can put right: what, which value, what is allowed."""


class Setting(NamedTuple):
    help: str
    default: object = None  # None: it follows from other settings
    toy: object = None  # the toy model's default, where it is another one
    least: float = 1  # of a number
    most: float = 1e15
    kind: type | None = None  # the default's own type, unless that is None
    choices: tuple | None = None


SETTINGS = {
    "model": Setting("toy, hub id, short name, folder or run", "toy"),
    "k": Setting("best of how many: 4, a list 1,4,16, a schedule 8:1, harmonic", "4"),
    "objective": Setting("RSPO (passk, maxk) or a rival", "passk", choices=(
        "passk", "maxk", "loo", "groupmax", "plugin", "centred", "grpo", "reward")),
    "data": Setting("divisor, math, gsm8k, a hub id or .jsonl file", "math", "divisor"),
    "n": Setting("answers per problem", 16, toy=32),
    "prompts": Setting("problems per step", 32, toy=16),
    "steps": Setting("number of updates", 200, toy=100),
    "lr": Setting("learning rate of AdamW", 2e-5, toy=1e-3, least=1e-12),
    "lora_rank": Setting("rank of the adapter", 16, toy=8),
    "flip": Setting("share of training rewards flipped", 0.0, least=0, most=0.5),
    "temperature": Setting("sampling temperature", 1.0, least=1e-6),
    "max_new_tokens": Setting("longest answer, in tokens", 2048, toy=6),
    "micro_batch_tokens": Setting("tokens in one forward pass", 16384),
    "gradient_checkpointing": Setting("recompute activations", True, toy=False),
    "load_in_4bit": Setting("base model in 4 bits (NF4)", False),
    "dtype": Setting("of the base model", "auto", toy="float32",
                     choices=("auto", "float32", "bfloat16")),
    "sampler": Setting("vLLM or plain PyTorch", "auto", toy="hf", choices=("auto", "vllm", "hf")),
    "gpu_memory": Setting("vLLM's share of the GPU", 0.45, least=0.01, most=0.99),
    "seed": Setting("of everything random", 0, least=0, most=99999),
    "eval_data": Setting("held-out data; follows from --data", kind=str),
    "eval_n": Setting("answers per held-out problem", 16, toy=64),
    "eval_every": Setting("steps between evaluations; 0: at the ends", 0, least=0),
    "limit": Setting("number of held-out problems to use", toy=200, kind=int),
    "save_every": Setting("steps between checkpoints", 20, toy=50),
    "tensorboard": Setting("write for TensorBoard, too", False),
    "run": Setting("new run directory, else runs/<what>-<time>", kind=Path),
    "resume": Setting("run directory to go on with", kind=Path),
}
MEANT = {  # what others say
    "learning_rate": "lr", "batch_size": "prompts", "output_dir": "run", "epochs": "steps",
    "group_size": "n", "num_generations": "n", "baseline": "objective"}
KINDS = {  # how argparse reads each
    int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "X"},
    str: {"metavar": "VALUE"}, list: {"metavar": "VALUE", "nargs": "+"},
    Path: {"type": Path, "metavar": "PATH"},
    bool: {"action": argparse.BooleanOptionalAction}}


def parse(doc: str, settings: dict[str, Setting], argv=None):
    """The settings that were given, None for the others."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description="\n\n".join(doc.split("\n\n")[:2]),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for name, each in settings.items():
        how, text = KINDS[each.kind or type(each.default)], each.help
        for what, value in (("default", each.default), ("toy", each.toy)):
            text += f" [{what} {value}]" if value is not None else ""
        if each.choices:
            how = {"choices": each.choices}
        parser.add_argument(flag(name), help=text, **how)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name, _, value = word.lstrip("-").partition("=")
        name = name.lower().replace("-", "_")
        if name in ("top_p", "top_k", "min_p"):
            fail(f"{word} is not for RSPO: its gradient is right only for the whole softmax")
        near = nearest(flag(MEANT.get(name, name)), map(flag, settings), 0.75)
        near = near.replace("?", f" {value}?") if value else near
        fail(f"{word!r} is unknown{near}; see --help")
    for name, each in settings.items():
        value, least, most = getattr(args, name), each.least, each.most
        if type(value) in (int, float) and not least <= value <= most:
            limit = f" and at most {most:g}" if most < 1e15 else ""
            fail(f"{flag(name)} is {value}, but must be at least {least}{limit}")
    return args


def settle(args, settings: dict[str, Setting], toy: bool, own: dict) -> None:
    """What was not given is what `own` says, else its default."""
    for name, each in settings.items():
        if getattr(args, name, None) is None:
            default = each.toy if toy and each.toy is not None else each.default
            setattr(args, name, own.get(name, default))


def is_toy(model: str) -> bool:
    """Whether a model is the embedded toy, or a sister made by toy/pretrain.py."""
    config = Path(model, "config.json")
    return model == "toy" or config.is_file() and (
        config.read_bytes() == (TOY / "config.json").read_bytes())


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fail(sentence: str):
    raise UserError(sentence)


def digest(what) -> str:
    """SHA-256 of bytes, or of what Python writes for anything else."""
    data = what if isinstance(what, bytes) else repr(what).encode()
    return hashlib.sha256(data).hexdigest()


def nearest(name: str, known, cutoff: float = 0.65) -> str:
    """", did you mean x?" where a known name x is near, else ""."""
    near = difflib.get_close_matches(name, known, 1, cutoff)
    return f", did you mean {near[0]}?" if near else ""


def run_script(main) -> None:
    """Run main; what the user can put right ends in one sentence."""
    try:
        main()
    except Exception as error:
        full = any(sign in str(error) for sign in ("No space left", "No usable temporary"))
        if not isinstance(error, UserError | OSError) and not full:
            raise
        hint = "; make room there or set TMPDIR to another folder"
        hint *= full and type(error) != UserError
        sys.exit(f"{Path(sys.argv[0]).name}: {error}{hint}")
    except KeyboardInterrupt:
        print("\nstopped; nothing that was finished is lost", file=sys.stderr)
        sys.exit(130)


def refuse_early(parse_flags) -> None:
    """Before torch is loaded: a wrong flag, a missing package."""
    run_script(parse_flags)
    for package in ("torch", "transformers", "peft", "tqdm", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            run_script(lambda: fail(f"{package} is missing: pip install -r requirements.txt "
                                    "(without a GPU requirements-cpu.txt)"))


def read_rows(path: Path, appended: bool = False) -> list[tuple[int, dict]]:
    """(line number, object) of each line of a .jsonl file.

    appended: it may not be there yet; behind its last newline is half a row at most.
    """
    if appended and not path.exists():
        return []
    try:
        lines = path.read_bytes().decode().split("\n")  # texts may hold other line ends
    except (OSError, ValueError) as error:
        fail(f"file {path} cannot be read: {error}")
    rows = []
    for number, line in enumerate(lines[:-1] if appended else lines, 1):
        try:
            if line.strip():
                rows.append((number, {**json.loads(line)}))
                json.dumps(rows[-1], ensure_ascii=False).encode()  # half a character fails
        except (ValueError, TypeError, RecursionError) as error:
            fail(f"{path}, line {number}: not a JSON object ({error})")
    return rows


def write_rows(path: Path, rows: list[dict], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
