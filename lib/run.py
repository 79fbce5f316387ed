"""What a run leaves on disk, how it goes on, and what the names of models mean.

    runs/NAME/config.json       every setting, versions, a digest of the data
    runs/NAME/metrics.jsonl     a row per step
    runs/NAME/evals.jsonl       the rewards of every evaluation
    runs/NAME/samples.jsonl     a few of its answers to read
    runs/NAME/step_000100/      adapter (PEFT's layout), optimizer.safetensors, state.json

A checkpoint counts once it has its final name; its state.json holds the others' checksums.
Killed at any moment, a run goes on from its newest whole one to the same bits (on a CPU).
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import cli
from lib.cli import UserError
from lib.policy import BadNumbers, BrokenPolicy, fingerprint, loading

TOY = Path(__file__).resolve().parent.parent / "toy"
ORGANISATIONS = {  # on the hub, of the model families that a short name begins with
    "Qwen": "Qwen", "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "gemma": "google",
    "OLMo": "allenai", "DeepSeek": "deepseek-ai", "Mistral": "mistralai", "phi": "microsoft"}
FORMAT = 2  # of a run directory; another version of it has another number
WEIGHTS = "adapter_model.safetensors"
FILES = {"adapter_config.json", WEIGHTS, "optimizer.safetensors"}
RUN_FLAGS = sorted(cli.SETTINGS.keys() - {"run", "resume"})


# ---------------------------------------------------------------- names

def resolve_model(name: str) -> tuple[str, Path | None]:
    """Base model (folder or hub id) and adapter folder, if any, of what a user calls a model:

    toy, a hub id, a short name, a model folder, a run (its newest checkpoint), a PEFT adapter.
    """
    folder = Path(name)
    if name == "toy":
        return str(TOY), None
    if (folder / "adapter_config.json").is_file():
        if (folder / "state.json").is_file() and not whole(folder):
            raise UserError(f"checkpoint {folder} is damaged; the newest whole one of its run "
                            f"is {newest_checkpoint(folder.parent)}")
        return read_adapter(folder).base_model_name_or_path, folder
    if config := read_config(folder):
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"run directory {name} holds no whole checkpoint (step_...)")
        return resolve_model(config["flags"]["model"])[0], newest
    if folder.is_dir():
        return name, None
    if re.match(r"[./~]|runs/", name) or "/" in name and Path(folder.parts[0]).is_dir():
        there = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
        raise UserError(f"folder {name} does not exist{cli.nearest(folder.name, there)}; in "
                        f"{folder.parent}: {', '.join(there[-8:]) or 'no run and no model'}")
    if "/" in name:
        return name, None
    for family, organisation in ORGANISATIONS.items():
        if name.lower().startswith(family.lower()):
            return f"{organisation}/{name}", None
    raise UserError(f"model {name!r} is unknown{cli.nearest(name, ['toy', *ORGANISATIONS])}; "
                    "give toy, a hub id (owner/name), a folder, or a name that begins with "
                    f"{', '.join(ORGANISATIONS)}")


def read_adapter(folder: Path) -> PeftConfig:
    """The settings of a LoRA adapter in a folder. UserError if it is anything else."""
    with loading(str(folder)):
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config.base_model_name_or_path, str) or config.r < 1:
            raise ValueError("adapter_config.json is not that of a LoRA adapter")
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"it has no {WEIGHTS}, the only form that is read")
    return config


def read_config(folder: Path) -> dict | None:
    """config.json of a run directory; None where the folder is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("flags"), dict):
        return None
    known = sorted(config["flags"]) == RUN_FLAGS and isinstance(config["flags"]["model"], str)
    if config.get("format") != FORMAT or not known:
        raise UserError(f"run directory {folder} was written by another version of train.py")
    return config


def flags_of(model: str) -> dict:
    """The settings of a run directory, or of the one that holds a checkpoint; else {}."""
    folder = Path(model)
    config = folder.is_dir() and (read_config(folder) or read_config(folder.parent))
    return config["flags"] if config else {}


# ---------------------------------------------------------------- files

def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run. Damaged ones that are newer are named."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    for path in sorted(found, key=lambda path: -int(path.name[5:])):
        if whole(path):
            return path
        print(f"checkpoint {path} is damaged and left aside")
    return None


def whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is what was written."""
    try:
        sums = json.loads((checkpoint / "state.json").read_text())["sha256"]
        intact = all(digest(checkpoint / name) == sums[name] for name in sums)
        return intact and FILES <= sums.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file or folder on disk, and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def lock(path: Path, refusal: str):
    """Hold a file until the returned handle is closed. UserError if another process does."""
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(refusal) from error
    except OSError as error:
        print(f"{path}: nothing keeps a second process out ({error})")
    return file


# ---------------------------------------------------------------- one run

class Stopped(Exception):
    """Ctrl-C or SIGTERM came: leave between two steps."""


class Run:
    """A run directory that this process alone writes to. `step` steps are done."""

    def __init__(self, folder: Path, config: dict | None = None):
        """config: of a new run, whose directory appears with it or not at all."""
        self.folder, self.step, self.signal, self.loaded = folder, 0, 0, False
        if config is not None:
            unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                unfinished.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"format": FORMAT, **config}, indent=1)
                (unfinished / "config.json").write_text(text + "\n")
                unfinished.rename(folder)
            except OSError as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise UserError(f"run directory {folder} cannot be made: {error.strerror}; "
                                "give another --run") from error
        self._lock = lock(folder / "config.json", f"run directory {folder} is in use by another "
                          "train.py: wait for it, or give another --run")

    def read(self, name: str) -> list[dict]:
        path = self.folder / name
        return [row for _, row in cli.read_rows(path, appended=True)] if path.exists() else []

    def write(self, name: str, rows: list[dict]) -> None:
        cli.write_rows(self.folder / name, rows)

    def save(self, learner) -> Path:
        """Write the checkpoint of this step, unless it is there: atomic, no pickle."""
        final = self.folder / f"step_{self.step:06d}"
        if whole(final):
            return final
        unfinished = self.folder / f".{final.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            learner.model.save_pretrained(unfinished)
            moments = {f"{name}:{kind}": value for name, parameter in learner.named.items()
                       for kind, value in learner.optimizer.state[parameter].items()}
            save_file(moments, unfinished / "optimizer.safetensors")
            sums = {path.name: digest(path) for path in sorted(unfinished.iterdir())}
            state = {"base": fingerprint(learner.model), "sha256": sums}
            (unfinished / "state.json").write_text(json.dumps(state, indent=1))
            for path in [*unfinished.iterdir(), *self.folder.glob("*.jsonl"), unfinished]:
                flush(path)  # on disk before the rename makes it count
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"{final.name} could not be written ({error})") from error
        shutil.rmtree(final, ignore_errors=True)  # damaged, if there
        unfinished.rename(final)
        flush(self.folder)
        return final

    def load(self, learner) -> None:
        """Go on from the newest whole checkpoint: policy, optimizer and records as they were."""
        if checkpoint := newest_checkpoint(self.folder):
            state = json.loads((checkpoint / "state.json").read_text())
            if state.get("base") != fingerprint(learner.model):
                raise UserError(f"checkpoint {checkpoint} was written with another base model")
            set_peft_model_state_dict(learner.model, load_file(checkpoint / WEIGHTS))
            moments = {name: {} for name in learner.named}
            for key, value in load_file(checkpoint / "optimizer.safetensors").items():
                name, kind = key.rsplit(":", 1)
                moments[name][kind] = value
            saved = learner.optimizer.state_dict()
            saved["state"] = {i: each for i, each in enumerate(moments.values()) if each}
            learner.optimizer.load_state_dict(saved)
            self.step = int(checkpoint.name[5:])
        elif any(self.folder.glob("step_*")):
            raise UserError(f"no checkpoint of {self.folder} is whole; to begin anew, give "
                            "another --run")
        for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):  # the rest is made again
            rows = self.read(name)
            if not all(isinstance(row.get("step"), int) for row in rows):
                raise UserError(f"{self.folder / name} is damaged: a row has no step")
            rows = [row for row in rows if row["step"] <= self.step]
            cli.write_rows(self.folder / f".{name}", rows, "w")
            os.replace(self.folder / f".{name}", self.folder / name)
        self.loaded = True

    def stop_if_asked(self) -> None:
        if self.signal:
            raise Stopped

    @contextmanager
    def guarded(self, learner, problems: list):
        """Around the loop: whatever ends it, the last step is saved and the way on said."""
        def note(number, frame):
            self.signal = number
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            os.write(2, b"\nstopping as soon as nothing is lost by it (once more: at once)\n")

        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
        go_on = f"go on with: python train.py --resume {self.folder}"
        try:
            self.load(learner)
            yield
        except Stopped:
            print(f"\nstopped; {self.save(learner)} is whole, {go_on}")
            raise SystemExit(128 + self.signal) from None
        except (UserError, BadNumbers, torch.OutOfMemoryError) as error:
            if self.loaded:
                self._give_up(learner, error, problems, go_on)
            raise
        except OSError as error:
            raise UserError(f"run {self.folder} stopped: {error}; its newest whole checkpoint is "
                            f"{newest_checkpoint(self.folder)}: make room, or make it writable, "
                            f"and {go_on}") from error
        finally:
            self._lock.close()
            shutil.rmtree(self.folder / ".adapter", ignore_errors=True)
            for each, handler in before.items():
                signal.signal(each, handler)

    def _give_up(self, learner, error: Exception, problems: list, go_on: str) -> None:
        """Write down the rollout to blame, save the policy before the step, say the way on."""
        row = {"step": self.step + 1, "error": str(error)}
        if rollout := getattr(error, "rollout", None):
            asked = (vars(p) for p in problems if p.prompt_ids == rollout.prompt_ids)
            row |= next(asked, {}) | vars(rollout)
        self.write("failures.jsonl", [row])
        if isinstance(error, BrokenPolicy):  # its checkpoint, if there, is of no use
            shutil.rmtree(self.folder / f"step_{self.step:06d}", ignore_errors=True)
        else:
            self.save(learner)
        if isinstance(error, BadNumbers):
            sound = newest_checkpoint(self.folder)
            go_on = f"start again with a lower --lr{sound and f', from --model {sound}' or ''}"
        reason = str(error).splitlines()[0]
        raise UserError(f"step {self.step + 1} was not applied: {reason}; {go_on}") from error
