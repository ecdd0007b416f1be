"""From a model's name to what its files say of it, here or on the hub.

A name is an alias of MODELS, a folder, or a hub id. Of the hub's files small ones and adapters are fetched.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from tract.records import InputError

MODELS = {  # what `--model NAME` stands for; any other name is a folder or a hub id
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "prometheus-2-7b": "prometheus-eval/prometheus-7b-v2.0",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
SMALL = ["run.json", "adapter_config.json", "config.json", "tokenizer_config.json"]
ADAPTER = [*SMALL, "adapter_model.*", "tokenizer*", "*_tokens*", "chat_template*", "vocab*", "merges.txt"]
# What tells one model's folder from another's
IDENTIFYING = ["run.json", "*config.json", "*tokens*.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja"]
IDENTIFYING += ["*.model", "*.safetensors*", "adapter_model.bin"]


def one_line(error: Exception, length: int = 200) -> str:
    return " ".join(str(error).split())[:length]


def check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that is empty or has no scheme. Raises InputError."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is not None and not re.match(r"https?://[\w.-]+(:\d+)?(/|\Z)", endpoint):
        remedy = "unset it, or write it with its scheme, as in https://huggingface.co"
        raise InputError(f"HF_ENDPOINT is {endpoint!r}; {remedy}")


def resolve(name: str) -> str:
    """Return the hub id of an alias, the absolute path of a folder (adapters remember it), or the name."""
    return str(Path(name).resolve()) if Path(name).is_dir() else MODELS.get(name, name)


def refusal(name: str, error: Exception) -> InputError:
    """Say in one line why a model can't be loaded, and what to do."""
    from huggingface_hub import errors

    text = f"{type(error).__name__}: {one_line(error)}"
    known = f"known are {', '.join(MODELS)}; a private one needs `hf auth login`"
    absent = f"{name}: neither a folder nor on the hub ({known})"
    page = f"https://huggingface.co/{resolve(name)}"
    kinds = {
        InputError: str(error),
        errors.GatedRepoError: f"{name}: is gated; accept its licence at {page}, then `hf auth login`",
        errors.RepositoryNotFoundError: absent,
        errors.HFValidationError: absent,
        errors.LocalEntryNotFoundError: f"{name}: no such folder, and can't reach the hub ({text[:120]})",
    }
    for kind, what in kinds.items():
        if isinstance(error, kind) or isinstance(error.__cause__, kind):
            return InputError(what)
    locked = [path for path in Path(name).glob("*") if not os.access(path, os.R_OK)]
    if locked:
        return InputError(f"{locked[0]}: can't be read; let its owner give you permission")
    remedy = "are its files whole (hf download, git lfs pull), libraries there and new, memory enough?"
    return InputError(f"{name}: can't be loaded; {remedy} ({text})")


def folder_of(name: str, offline: bool = False, files: list[str] = SMALL) -> Path | None:
    """Return the folder of a model's small files: its own, or the hub's snapshot. Raises InputError.

    offline: do not ask the hub; None where nothing has been fetched yet.
    """
    if Path(name).is_dir():
        return Path(name)
    check_endpoint()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(resolve(name), allow_patterns=files, local_files_only=offline))
    except Exception as error:
        if offline:
            return None
        raise refusal(name, error) from None


def read_json(path: Path) -> dict:
    """Read a file that a run left; {} where there is none. Raises InputError where it is broken."""
    try:
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is broken or another program's; move it away, or make anew what it is of")
    return content


def read(name: str, file: str, offline: bool = False) -> dict:
    """Read run.json or adapter_config.json of a model; {} where it has none, as no alias has."""
    folder = folder_of(name, offline or name in MODELS)
    return read_json(folder / file) if folder else {}


def training_arguments(name: str, offline: bool = False) -> dict:
    """Return the arguments of the training that made a model; {} without a run.json of this repository."""
    arguments = read(name, "run.json", offline).get("arguments")
    keys = ("grid", "suffix", "model")  # others write a run.json, too
    ours = isinstance(arguments, dict) and all(isinstance(arguments.get(key), str) for key in keys)
    return arguments if ours else {}


def origin(name: str, offline: bool) -> tuple[str, dict]:
    """Return the seed that a model goes back to, and how it was trained: {} or its lora and four_bit."""
    arguments = training_arguments(name, offline)
    rank = read(name, "adapter_config.json", offline).get("r")
    adapter = {}
    if arguments or rank:
        adapter = {"lora": rank, "four_bit": bool(rank and arguments.get("four_bit"))}
    ancestors = [name]  # itself, what it was trained from, what that was trained from
    while arguments and arguments["model"] not in ancestors:
        ancestors.append(arguments["model"])
        arguments = training_arguments(ancestors[-1], offline=True)
    return ancestors[-1], adapter


def training_data(name: str) -> str:
    """Return the file that a model was trained on. Raises InputError if that is not known, or has changed."""
    path = training_arguments(name).get("data")
    if path is None:
        raise InputError(f"{name}: was not trained here; name the records with --data")
    if not Path(path).is_file() or sha256(path) != read(name, "run.json").get("inputs", {}).get("data"):
        raise InputError(f"{path}: is not there, or not what {name} was trained on; name a file with --data")
    return path


def is_four_bit(name: str) -> bool:
    """Tell whether a model is an adapter that was trained here on a base in 4 bits, and so needs that."""
    return bool(training_arguments(name).get("four_bit") and read(name, "adapter_config.json"))


def base_of(name: str) -> str | None:
    """Return the base of an adapter; None for any other model. Raises InputError where that is no base."""
    config = read(name, "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if config and not isinstance(base, str):
        raise InputError(f"{name}: adapter_config.json names no base; add its base_model_name_or_path")
    try:
        chained = bool(base and read(base, "adapter_config.json"))
    except InputError as error:
        raise InputError(f"{name}: adapter_config.json names as its base {error}") from None
    if chained:
        raise InputError(f"{name}: its base {base} is an adapter itself; merge that into its own base first")
    return base


def place_of(name: str) -> str:
    """Return where a model is loaded from: a folder, which an adapter of the hub gets, too, or a hub id."""
    return str(folder_of(name, files=ADAPTER).resolve()) if base_of(name) else resolve(name)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(name: str | None) -> dict:
    """Return what tells a model from any other: the hashes of its files, or its revision on the hub."""
    if name is None:
        return {}
    folder = folder_of(name, offline=True)
    if Path(name).is_dir():
        return {path.name: sha256(path) for pattern in IDENTIFYING for path in sorted(folder.glob(pattern))}
    return {"name": resolve(name), "revision": folder.name if folder else None}
