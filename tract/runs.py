"""What a run leaves behind, and how it ends: whole files, run.json.

Work under way lives in the folder OUT.part and gets its name when it is whole.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from tqdm import tqdm

from tract.hub import read_json
from tract.records import ROOT, InputError
from tract.settings import arguments, settings_of

GO_ON = "what was finished is kept; mend it and give the same command to go on"
PASSING = {"lock", "settings.json", ".settings.json.tmp", "state.pt"}  # what OUT.part has and OUT has not


class Fault(Exception):
    """A fault of the machine or of the training; its text says what is kept and how to go on."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; its errors end in one line on stderr and exit code 2, if stopped 130, else 1."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal that knows ASCII alone lacks is spelled out; a log file gets each line at once
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except (InputError, Fault, OSError, KeyboardInterrupt) as error:
        said = str(error) or "interrupted; the same command goes on"
        if isinstance(error, OSError):
            said += f"; {GO_ON}"
        print(said, file=sys.stderr)
        raise SystemExit({InputError: 2, KeyboardInterrupt: 130}.get(type(error), 1)) from None


def to_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def seed_of(name: str) -> int:
    """Return a random seed that depends on a name alone; like names give seeds that share nothing."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def write_whole(path: str | Path, content: str | Callable[[IO], None]) -> None:
    """Write a text, or what a function writes, beside `path`, flush to disk and rename. Raises Fault."""
    beside = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(beside, "wb") as out:
            content(out) if callable(content) else out.write(content.encode())
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        full = "" if isinstance(error, OSError) else "is the disk full? "
        raise Fault(f"{path}: can't be written ({full}{str(error).splitlines()[0][:120]}); {GO_ON}") from None
    finally:
        beside.unlink(missing_ok=True)  # where it has not become `path`


def write_run(path: Path, args: argparse.Namespace, settings: dict, started: float, **facts) -> dict:
    """Write run.json: what was asked, on which files, with which versions, and what came out (`facts`)."""
    commit = None
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    inputs = ("model ", "base ", "data", "valid")
    prefix = "version of "  # of the libraries, as they were when the run began
    versions = {name.removeprefix(prefix): x for name, x in settings.items() if name.startswith(prefix)}
    run = {
        "script": Path(sys.argv[0]).name,
        "git_commit": commit,
        **versions,
        "python": platform.python_version(),
        "wall_seconds": round(time.time() - started, 1),
        "arguments": arguments(args),
        "inputs": {name: value for name, value in settings.items() if name.startswith(inputs)},
        **facts,
    }
    write_whole(path, json.dumps(run, indent=2, default=str) + "\n")
    return run


def begin(args: argparse.Namespace) -> tuple[Path, dict, IO]:
    """Make OUT.part, or go on with it if it holds this very run; returns it, its settings and its lock."""
    part = Path(f"{args.out}.part")
    settings = settings_of(args)
    settings_file = part / "settings.json"
    foreign = {path.name for path in part.glob("*")} - PASSING  # empty where there is no folder
    if part.is_file() or (foreign and not settings_file.is_file()):
        raise InputError(f"{part}: is there already and no run made it; choose another --out")
    part.mkdir(parents=True, exist_ok=True)
    lock_file = part / "lock"
    lock = open(lock_file, "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another process is writing this output; wait, or choose another"
        raise InputError(f"{lock.name}: {what}") from None
    check_out(args.out)  # again, for another process may have finished it
    earlier = read_json(settings_file)
    nothing_done = {path.name for path in part.glob("*")} <= {lock_file.name, settings_file.name}
    # Where nothing was done yet, anything may have changed: a model that could not be loaded was mended
    if earlier and not nothing_done:
        for key in earlier | settings:
            if earlier.get(key) != settings.get(key):
                what = f"{key} was {earlier.get(key)!s:.40}, is {settings.get(key)!s:.40}"
                raise InputError(f"{part}: begun with other settings ({what}); go back to them, or remove it")
    write_whole(settings_file, json.dumps(settings))
    return part, settings, lock


def finish(part: Path, out: Path) -> None:
    """Give part/whole its name; remove what only going on needs."""
    for path in (part / "whole").rglob("*"):
        if path.is_file():  # safetensors writes files that nobody else may read
            path.chmod((part / "settings.json").stat().st_mode)
    (part / "whole").rename(out)
    shutil.rmtree(part)


def check_out(out: Path) -> None:
    """Refuse an --out that is there already: nothing is ever written over. Raises InputError."""
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; choose another --out, or remove it")
    for parent in out.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{out}: {parent} is a file, no folder; choose another --out")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the docstring of the script as it stands, and every default."""


def number(kind: type, low: float, high: float = 1e300) -> Callable[[str], float]:
    """Make an argparse type: a number of this kind from `low` to `high`, both included."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


COUNT = number(int, 1)
SEED = number(int, 0, 2**32 - 1)
WEIGHT = number(float, 0)
SHARE = number(float, 0, 1)


def progress(total: int, done: int, label: str, unit: str, quiet: bool = False) -> tqdm:
    """Open a progress bar with rate and time left; into a log it writes every ten seconds."""
    options = {"dynamic_ncols": True, "disable": quiet, "mininterval": 0.1 if sys.stderr.isatty() else 10}
    return tqdm(total=total, initial=done, desc=label, unit=unit, **options)


def report(ids: Iterable[str | int], what: str, unit: str = "records") -> None:
    """Print the number of affected records and the first five ids."""
    ids = sorted(ids)
    if ids:
        print(f"{len(ids)} {unit} {what}: {', '.join(map(str, ids[:5]))}{', …' if len(ids) > 5 else ''}")
