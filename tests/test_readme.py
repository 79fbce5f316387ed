"""Proves: every command the README shows exists, with the flags it shows, and its files and columns are real."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.S))
LISTED = re.findall(r"^\| `([\w./]+)` \|", README.split("## The files")[1].split("\n## ")[0], flags=re.M)
COMMANDS = [line.split("#")[0].split() for line in BLOCKS.splitlines() if line.startswith("python ")]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_readme_command_exists_with_its_flags(command):
    flags = [word for word in command[2:] if word.startswith("--")]
    assert (ROOT / command[1]).is_file()
    if flags:
        listed = set(re.findall(r"--[a-z0-9-]+", help_of(command[1])))
        assert set(flags) <= listed


def test_readme_shows_the_commands_of_every_script():
    assert {command[1] for command in COMMANDS} >= {"train.py", "sample.py", "evaluate.py"}


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", BLOCKS, flags=re.M))
def test_readme_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README) + LISTED)
def test_readme_link_or_listed_file_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script", sorted(path.name for path in Path(ROOT).glob("*.py") if "argparse" in path.read_text()))
def test_every_script_prints_its_help(script):
    assert "usage:" in help_of(script)
