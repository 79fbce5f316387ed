"""What a run leaves on disk, how it goes on, and what the names of models mean.

A checkpoint holds the adapter in PEFT's layout, the optimizer, and state.json with
checksums. It counts once it has its final name. Killed at any moment, a run goes on
from its newest whole checkpoint to the same bits (on a CPU).
"""

import fcntl
import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.cli import SETTINGS, TOY, UserError, digest, fail, nearest, read_rows, write_rows
from lib.policy import BadNumbers, BrokenPolicy, fingerprint, loading

ORGANISATIONS = {  # on the hub, of the families that a short name begins with
    "Qwen": "Qwen", "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "gemma": "google",
    "OLMo": "allenai", "DeepSeek": "deepseek-ai", "Mistral": "mistralai", "phi": "microsoft"}
FORMAT = 4  # of a run directory; another version of it has another number
WEIGHTS, MOMENTS = "adapter_model.safetensors", "optimizer.safetensors"
FILES = {"adapter_config.json", WEIGHTS, MOMENTS}
RUN_FLAGS = sorted(SETTINGS.keys() - {"run", "resume"})


def resolve_model(name: str, seen=()) -> tuple[str, Path | None]:
    """Base (folder or hub id) and adapter folder, if any, that --model names."""
    folder = Path(name)
    if name == "toy":
        return str(TOY), None
    if (folder / "adapter_config.json").is_file():
        if (folder / "state.json").is_file() and not whole(folder):
            fail(f"checkpoint {folder} is damaged: name its run instead")
        return read_adapter(folder).base_model_name_or_path, folder
    if config := read_config(folder):
        if name in seen:
            fail(f"run directory {name} is its own --model: its config.json is wrong")
        if newest := newest_checkpoint(folder):
            return resolve_model(str(config["flags"]["model"]), (*seen, name))[0], newest
        fail(f"run directory {name} holds no whole checkpoint (step_...)")
    if (folder / "config.json").is_file():
        return name, None
    if folder.is_dir() or name.startswith((".", "/", "~", "runs/")) or (
            "/" in name and Path(folder.parts[0]).is_dir()):
        around = folder if folder.is_dir() else folder.parent
        configs = [*around.glob("*/config.json"), *around.glob("*/*/config.json")]
        there = sorted(str(path.parent.relative_to(around)) for path in configs)
        what = "holds no run and no model" if folder.is_dir() else "does not exist"
        fail(f"folder {name} {what}{nearest(folder.name, there)}; in {around}: "
             f"{', '.join(there[-8:]) or 'no run and no model'}")
    if "/" in name:
        return name, None
    for family, organisation in ORGANISATIONS.items():
        if name.lower().startswith(family.lower()):
            return f"{organisation}/{name}", None
    family = name.rstrip("0123456789.-")
    fail(f"model {name!r} is unknown{nearest(family, ['toy', *ORGANISATIONS])}; "
         "give toy, a hub id (owner/name), a folder or such a hub model's name")


def read_adapter(folder: Path) -> PeftConfig:
    """The settings of a LoRA adapter in a folder, refused if it is anything else."""
    with loading(str(folder)):
        config = PeftConfig.from_pretrained(folder)
        lora = isinstance(config.base_model_name_or_path, str) and config.r >= 1
        if not lora or not (folder / WEIGHTS).is_file():
            raise ValueError(f"no LoRA adapter or no {WEIGHTS}, the only form that is read")
    return config


def read_config(folder: Path) -> dict | None:
    """config.json of a run directory; None where the folder is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        fail(f"{path} is not JSON ({error})")
    if not isinstance(config, dict) or not isinstance(flags := config.get("flags"), dict):
        return None
    if config.get("format") != FORMAT or sorted(flags) != RUN_FLAGS:
        fail(f"run directory {folder} is of another version of train.py: move it away")
    return config


def flags_of(model: str) -> dict:
    """The settings of a run directory, or of a checkpoint's; else {}."""
    folder = Path(model)
    config = folder.is_dir() and (read_config(folder) or read_config(folder.parent))
    return config["flags"] if config else {}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run. Damaged ones that are newer are named."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    for path in sorted(found, key=lambda path: -int(path.name[5:])):
        if whole(path):
            return path
        print(f"checkpoint {path} is damaged and left aside")


def whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is what was written."""
    try:
        sums = json.loads((checkpoint / "state.json").read_text())["sha256"]
        return FILES <= sums.keys() and all(
            digest((checkpoint / name).read_bytes()) == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def flush(path: Path) -> None:
    """Have a file or folder on disk, and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def lock(path: Path, refusal: str):
    """Hold a file until the handle is closed; refused if another process does."""
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(refusal)
    except OSError as error:
        print(f"{path}: nothing keeps a second process out ({error})")
    return file


class Run:
    """A run directory that this process alone writes to. `step` steps are done."""

    def __init__(self, folder: Path, config: dict | None = None):
        """config: of a new run, whose directory appears with it or not at all."""
        self.folder, self.step, self.signal = folder, 0, 0
        if config is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
                unfinished = Path(place, "run")
                unfinished.mkdir()
                text = json.dumps({"format": FORMAT, **config}, indent=1)
                (unfinished / "config.json").write_text(text + "\n")
                unfinished.rename(folder)
        refusal = f"run directory {folder} is in use by another train.py"
        self._lock = lock(folder / "config.json", refusal)

    def read(self, name: str) -> list[dict]:
        return [row for _, row in read_rows(self.folder / name, appended=True)]

    def write(self, name: str, rows: list[dict]) -> None:
        write_rows(self.folder / name, rows)

    def save(self, learner) -> Path:
        """Write the checkpoint of this step, unless it is there: atomic, no pickle."""
        final = self.folder / f"step_{self.step:06d}"
        if whole(final):
            return final
        with TemporaryDirectory(".unfinished", f".{final.name}", self.folder) as place:
            unfinished = Path(place, "checkpoint")
            learner.model.save_pretrained(unfinished)
            moments = {f"{name}:{kind}": value for name, parameter in learner.named.items()
                       for kind, value in learner.optimizer.state[parameter].items()}
            save_file(moments, unfinished / MOMENTS)
            files = sorted(unfinished.iterdir())
            sums = {path.name: digest(path.read_bytes()) for path in files}
            state = {"base": fingerprint(learner.model), "sha256": sums}
            (unfinished / "state.json").write_text(json.dumps(state, indent=1))
            for path in [*unfinished.iterdir(), *self.folder.glob("*.jsonl"), unfinished]:
                flush(path)  # on disk before the rename makes it count
            shutil.rmtree(final, ignore_errors=True)  # damaged, if there
            unfinished.rename(final)
        flush(self.folder)
        return final

    def load(self, learner) -> None:
        """Go on from the newest whole checkpoint, records cut back to it."""
        if checkpoint := newest_checkpoint(self.folder):
            state = json.loads((checkpoint / "state.json").read_text())
            if state.get("base") != fingerprint(learner.model):
                fail(f"checkpoint {checkpoint} was written with another base model")
            set_peft_model_state_dict(learner.model, load_file(checkpoint / WEIGHTS))
            for key, value in load_file(checkpoint / MOMENTS).items():
                name, kind = key.rsplit(":", 1)
                parameter = learner.named[name]
                learner.optimizer.state[parameter][kind] = value.to(parameter.device)
            self.step = int(checkpoint.name[5:])
        elif any(self.folder.glob("step_*")):
            fail(f"no checkpoint of {self.folder} is whole: give another --run")
        for name in ("metrics.jsonl", "evals.jsonl"):
            rows = self.read(name)
            if not all(isinstance(row.get("step"), int) for row in rows):
                fail(f"{self.folder / name} is damaged: a row has no step")
            rows = [row for row in rows if row["step"] <= self.step]  # the rest comes again
            write_rows(self.folder / f".{name}", rows, "w")
            os.replace(self.folder / f".{name}", self.folder / name)

    def stop_if_asked(self) -> None:
        if self.signal:
            raise KeyboardInterrupt

    @contextmanager
    def guarded(self, learner, problems: list):
        """Around the loop: whatever ends it, the last step is saved and the way on said."""
        def note(number, frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nstopping as soon as nothing is lost by it (once more: at once)\n")

        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
        go_on = f"go on with: python train.py --resume {self.folder}"
        try:
            self.load(learner)
            try:
                yield
            except KeyboardInterrupt:
                print(f"\nstopped; {self.save(learner)} is whole, {go_on}")
                raise SystemExit(128 + self.signal) from None
            except (UserError, BadNumbers, torch.OutOfMemoryError) as error:
                self._keep(learner, error, problems)
                if isinstance(error, BadNumbers):
                    go_on = "start again with a lower --lr"
                    if sound := newest_checkpoint(self.folder):
                        go_on += f", from --model {sound}"
                said = f"step {self.step + 1} was not applied: {str(error).splitlines()[0]}"
                fail(f"{said}; {go_on}")
        except (OSError, SafetensorError) as error:
            fail(f"run {self.folder} stopped: {error}; make room, or make it writable, "
                 f"and {go_on}")
        finally:
            self._lock.close()
            for left in (*self.folder.glob(".step_*"), self.folder / ".adapter"):
                shutil.rmtree(left, ignore_errors=True)
            for each, handler in before.items():
                signal.signal(each, handler)

    def _keep(self, learner, error: Exception, problems: list) -> None:
        """Write down the rollout to blame, and the policy before that step."""
        row = {"step": self.step + 1, "error": str(error)}
        if rollout := getattr(error, "rollout", None):
            asked = (vars(p) for p in problems if p.prompt_ids == rollout.prompt_ids)
            row |= next(asked, {}) | vars(rollout)
        self.write("failures.jsonl", [row])
        if isinstance(error, BrokenPolicy):  # its checkpoint is of no use
            shutil.rmtree(self.folder / f"step_{self.step:06d}", ignore_errors=True)
        else:
            self.save(learner)
