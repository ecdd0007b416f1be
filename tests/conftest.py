"""Real tokenizers, small random models and ways to run a script; everything is made on the spot."""

import json
import os
import shutil
import signal
import sys
from importlib import import_module, resources
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may need the hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor a GPU: their tensors are on the CPU

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

os.umask(0o022)  # files are made so that others may read them
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

MISTRAL_TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
LLAMA_TEMPLATE = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n
Cutting Knowledge Date: December 2023
Today Date: {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n
<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ '\n\n' }}
{{- m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"""
SPECIAL = "begin_of_text end_of_text r0 r1 pad_id r2 start_header_id end_header_id eom_id eot_id".split()
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLIT += r"|\s*[\r\n]+|\s+(?!\S)|\s+"

session = pytest.fixture(scope="session")


@session
def mistral_tokenizer(tmp_path_factory):
    """Load Mistral-7B-Instruct's tokenizer (SentencePiece, 32,000 tokens) from the package mistral-common."""
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(resources.files("mistral_common") / "data/tokenizer.model.v1", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, chat_template=MISTRAL_TEMPLATE)


@session
def llama31_tokenizer():
    """Load Llama-3.1-Instruct's tokenizer (BPE, 128,000 tokens) from the package llama-models."""
    vocabulary = str(resources.files("llama_models") / "llama3/tokenizer.model")
    special = [f"<|{name}|>" for name in SPECIAL]
    bpe = TikTokenConverter(vocabulary, SPLIT, extra_special_tokens=special).converted()
    named = {"bos_token": special[0], "eos_token": special[-1], "chat_template": LLAMA_TEMPLATE}
    return FastTokenizer(tokenizer_object=bpe, **named)


@session
def gpt2_tokenizer():
    """Train a BPE tokenizer, in which " 4" is one token; it has no chat template, as base models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["The answer is good. So the overall score is 1 2 3 4 5", "So the overall score is 10 " * 3] * 50
    options = {"initial_alphabet": ByteLevel.alphabet(), "special_tokens": ["<|end|>"]}
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(**options))
    return FastTokenizer(tokenizer_object=bpe, eos_token="<|end|>")


byte_tokenizer = session(lambda: ByT5Tokenizer(extra_ids=0))  # ids are the bytes plus 3; no BOS, no template
tiny_tokenizer = session(lambda: AutoTokenizer.from_pretrained(ROOT / "data/tiny/seed"))  # of words


def random_model(tokenizer, model_type: str = "mistral", **config):
    """Make a model of two layers for this tokenizer, with random weights."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "sliding_window": None, "initializer_range": 0.3}
    small |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small | config)).eval()


def run(script: str, *arguments) -> None:
    """Run a script's main() in this process with the given arguments; training's signal handlers go again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
            import_module("tract.runs").run(import_module(script).main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Spare trainings and eval.py their picture, a second each, but in the tests of pictures."""
    if request.node.get_closest_marker("pictures") is None:
        blank = SimpleNamespace(savefig=lambda out: None)
        monkeypatch.setattr("tract.curves.draw", lambda logs: blank)
        monkeypatch.setattr("eval.draw", lambda common, report: b"\x89PNG")


class Lab:
    """Offer what most tests need: records, files and the scripts' own words."""

    run = staticmethod(run)

    def __init__(self, path: Path, rows: list[dict], capsys: pytest.CaptureFixture):
        self.path, self.rows, self.capsys = path, rows, capsys

    def fail(self, script: str, *arguments) -> tuple[int, str]:
        """Run a script that has to fail; returns its exit code and all that it said."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            self.run(script, *arguments)
        said, code = self.capsys.readouterr(), exit.value.code
        del exit  # and with it the frame that holds the lock
        return code, said.out + said.err

    def write(self, name: str, rows: list[dict]) -> Path:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (self.path / name).write_text("".join(lines), "utf-8")
        return self.path / name

    def checkpoint(self, tokenizer, **config) -> Path:
        """Save a small random model with this tokenizer."""
        random_model(tokenizer, **config).save_pretrained(self.path / "seed")
        tokenizer.save_pretrained(self.path / "seed")
        return self.path / "seed"

    def read(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / name).read_text("utf-8").splitlines()]


run_script = session(lambda: run)
tiny_records = session(lambda: Lab(ROOT / "data/tiny", [], None).read("train.jsonl"))
lab = pytest.fixture(lambda tmp_path, tiny_records, capsys: Lab(tmp_path, tiny_records, capsys))
