"""What a run leaves behind, and how it ends: files that are whole or not there, errors in one line. No torch here."""

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent


class InputError(Exception):
    """Something the caller can mend; its text says what is wrong, where, and what to do."""


class Fault(Exception):
    """Something that went wrong while running; its text says what is kept and how to go on."""


GO_ON = "what was finished is kept: mend it (is the disk full?) and give the same command to go on"


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. What the caller can mend ends in one line on stderr and exit code 2, a fault of the machine
    (a full disk, a loss that is not finite) in exit code 1, an interruption in 130; none with a traceback."""
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except Fault as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        print(
            f"{error.filename or 'output'}: {error.strerror}; what was finished is kept, the same command goes on",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        print(error.args[0] if error.args else "interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


# ------------------------------------------------------------------------------------------------- files of a run


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_whole(path: str | Path, content: str | Iterable[bytes]) -> None:
    """Write beside `path`, flush to disk and rename: `path` is either whole or as it was before. Raises Fault."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as out:
            out.writelines([content.encode()] if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Fault(f"{path}: {error.strerror}; {GO_ON}") from None
    beside.replace(path)


def write_run(path: Path, *, arguments: dict, inputs: Iterable[str], started: float, **facts: Any) -> None:
    """Write the record of a finished run: what was asked, on what, with which versions, and what came out."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    packages = ("torch", "transformers", "tokenizers", "numpy", "scipy")
    run = {
        "script": Path(sys.argv[0]).name,
        "arguments": arguments,
        "inputs": {str(path): sha256(path) for path in inputs},
        "git_commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "wall_seconds": round(time.time() - started, 1),
        **facts,
    }
    write_whole(path, json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n")


def model_settings(model: str) -> dict:
    """What tells one model from another of the same name: of a checkpoint of ours its run.json, else the sizes of its files."""
    run = Path(model) / "run.json"
    sizes = {path.name: path.stat().st_size for path in sorted(Path(model).glob("*.safetensors"))}
    return {"model": model, "model_is": sha256(run) if run.is_file() else sizes}


def read_run(model: str) -> dict:
    """The run.json inside a checkpoint folder of ours; {} for any other model."""
    path = Path(model) / "run.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def lock(path: Path) -> IO:
    """Hold `path` for this process, as long as the file returned is open; a second process is refused."""
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing this output; wait for it, or choose another --out") from None
    return file


def same_settings(path: Path, before: dict, now: dict) -> None:
    """Refuse to go on at `path` with other settings than it was begun with, and name what differs."""
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        was = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
        raise InputError(f"{path}: begun with other settings ({was}); give those again, or --overwrite to start anew")


def choose_out(out: Path, overwrite: bool) -> None:
    """Refuse to write over what another run finished, and in any case over what is no run of ours."""
    if out.is_dir() and any(out.iterdir()) and not (out / "run.json").is_file():
        raise InputError(f"{out}: a folder that holds something else; choose another --out")
    if (out.is_file() or (out / "run.json").is_file()) and not overwrite:
        raise InputError(f"{out}: already holds a finished run; choose another --out, or --overwrite to replace it")


# ---------------------------------------------------------------------------------------- the same words everywhere


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring of the script as it stands, and every default."""


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of this kind from `low` to `high`, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


COUNT = number(int, 1)
SHARE = number(float, 0, 1)
WEIGHT = number(float, 0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that mean the same in every script that runs a model."""
    group = parser.add_argument_group("common")
    group.add_argument(
        "--grid",
        help="scores as tokens, 1,2,3,4,5, or token=value pairs, 1=0,3=50,5=100; None: the checkpoint's, else 1,2,3,4,5",
    )
    group.add_argument("--suffix", help="words between CoT and score; None: the checkpoint's, else 'So the overall score is'")
    group.add_argument(
        "--max-length", type=COUNT, default=3000, help="tokens; longer records are left out and counted, never cut"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed")
    group.add_argument("--overwrite", action="store_true", help="replace what an earlier run left at --out")


def report(ids: Iterable[str], what: str) -> None:
    """Say at the end of a run how many records something befell, and which (the first few)."""
    if ids := list(ids):
        print(f"{len(ids)} records {what}: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}")
