"""What decides a run's result: an interrupted run goes on with just these."""

import argparse
import json
from importlib import metadata

from tract import hub
from tract.hub import sha256
from tract.records import ROOT

LIBRARIES = ("torch", "transformers", "tokenizers", "peft")
# Files that read results and make none
READS_RESULTS = {f"{name}.py" for name in "eval scores report page pairs curves card".split()}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("tract/*.py"), *ROOT.glob("tract/*.txt")]
CODE = sorted(path for path in FILES if path.name not in READS_RESULTS)
FREE = {"out", "save_every", "model", "engine_args"}  # do not decide, or not by themselves
FREE_OF_VLLM = set(
    "gpu_memory_utilization tensor_parallel_size pipeline_parallel_size max_num_seqs"
    " max_num_batched_tokens max_lora_rank swap_space cpu_offload_gb".split()
)


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Return the versions of the libraries that decide: also of bitsandbytes and vLLM, where they do."""
    libraries = [*LIBRARIES]
    if getattr(args, "four_bit", False) or hub.is_four_bit(args.model):
        libraries.append("bitsandbytes")
    found = {name: metadata.version(name) for name in libraries}
    if getattr(args, "engine", "torch") == "vllm":
        import vllm  # as a package it has several names

        found["vllm"] = vllm.__version__
    return found


def arguments(args: argparse.Namespace) -> dict:
    return vars(args) | {"grid": str(args.grid), "suffix": args.grid.suffix}


def settings_of(args: argparse.Namespace) -> dict:
    """Return all that decides a run's result: options, files by their contents, versions, this code."""
    settings = {name: value for name, value in arguments(args).items() if name not in FREE}
    for name in ("data", "valid"):
        if settings.get(name):
            settings[name] = sha256(settings[name])
    vllm = dict(getattr(args, "engine_args", []))
    groups = {
        "model": hub.identity(args.model),
        "base": hub.identity(hub.base_of(args.model)),
        "vLLM": {name: value for name, value in vllm.items() if name not in FREE_OF_VLLM},
        "version of": versions(args),
        "code of": {path.name: sha256(path) for path in CODE},
    }
    for group, entries in groups.items():
        for name, value in entries.items():
            settings[f"{group} {name}"] = value
    return json.loads(json.dumps(settings, default=str))
