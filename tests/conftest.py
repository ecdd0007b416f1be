"""Real tokenizers and small random models; everything is made on the spot."""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may need the hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

MISTRAL_TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
CORPUS = ["The answer is good. So the overall score is 1 2 3 4 5", "So the overall score is 10 " * 3] * 50


@pytest.fixture(scope="session")
def mistral_tokenizer(tmp_path_factory):
    """Mistral-7B-Instruct's own tokenizer (SentencePiece, 32,000 tokens), from the package mistral-common."""
    import mistral_common

    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def byte_level(pre_tokenizer) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the suffix, without chat template, as base models have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|end|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """GPT-2 style: the space melts into the digit, " 4" is one token."""
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """Llama-3 style: digits are split off first, so the space before a score is a token of its own."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]))


LLAMA_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
    "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d %b %Y') }}{% endif %}{{ '\n\n' }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llama31_tokenizer():
    """Llama-3.1-Instruct's own tokenizer (BPE, 128,000 tokens), from the package llama-models, with its header tokens."""
    import llama_models
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
    names += "reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"
    bpe = TikTokenConverter(
        vocab_file=str(Path(llama_models.__file__).parent / "llama3/tokenizer.model"),
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        extra_special_tokens=[f"<|{name}|>" for name in names.split()],
    ).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Every byte is a token, ids are the byte plus 3; no BOS, no chat template."""
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The embedded task's: word-level."""
    return AutoTokenizer.from_pretrained(ROOT / "data/tiny/seed")


def random_model(tokenizer, seed: int = 0, **config):
    torch.manual_seed(seed)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    small |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, sliding_window=None, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(MistralConfig(**small | config)).eval()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def run_script():
    """Run a script's main() in this process with the given arguments."""
    import importlib

    import runs

    def run(script: str, *arguments) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
            runs.run(importlib.import_module(script).main)

    return run


@pytest.fixture(scope="session")
def tiny_records():
    lines = (ROOT / "data/tiny/train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
