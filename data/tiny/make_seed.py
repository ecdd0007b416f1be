"""Make the embedded seed model: a Mistral of 0.4 M parameters that writes CoTs and knows nothing of scores.

It is pretrained on fresh records of the same layout whose verdict word is random and whose text ends before
the score, so that what a judge has to learn, what the rating is and what the verdict is worth, is left to
fine-tuning. About two minutes.

    python data/tiny/make_seed.py --out out/seed     # seed/ beside this file was made so
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import check_new, whole_folder
from data.tiny.prepare import WORDS, sample
from tract import runs
from tract.encode import encode_target
from tract.records import SUFFIX
from tract.text import encode_prompt

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer: every word of the task and every digit is a token."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }}"
    return tokenizer


def make_model(tokenizer, seed: int, hidden: int, layers: int):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        sliding_window=None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # at the default of .02 this small a model does not learn to compare two digits
        initializer_range=hidden**-0.5,
    )
    return AutoModelForCausalLM.from_config(config)


def pretrain(model, examples: list[tuple[list[int], int]], batch_size: int, lr: float) -> float:
    """Train on (ids, tokens of the prompt) pairs, in order, with CE after the prompt; returns the last CE."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    steps = len(examples) // batch_size
    schedule = get_cosine_schedule_with_warmup(optimiser, round(0.05 * steps), steps)
    for i in tqdm(range(0, len(examples), batch_size), desc="seed model", unit="step"):
        batch = examples[i : i + batch_size]
        ids = torch.full((batch_size, max(len(text) for text, _ in batch)), model.config.pad_token_id)
        labels = torch.full_like(ids, -100)  # no loss
        for b, (text, start) in enumerate(batch):
            ids[b, : len(text)] = torch.tensor(text)
            labels[b, start : len(text)] = ids[b, start : len(text)]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "seed", help="checkpoint folder to make")
    add("--steps", type=runs.COUNT, default=800, help="optimiser steps of 32 fresh records")
    add("--seed", type=runs.SEED, default=0, help="random seed")
    add("--hidden", type=runs.COUNT, default=128, help="size of the model, a multiple of 64")
    add("--layers", type=runs.COUNT, default=2, help="of the model")
    add("--lr", type=runs.WEIGHT, default=3e-3, help="peak learning rate")
    args = parser.parse_args()
    check_new(args.out)

    tokenizer = make_tokenizer()
    rng = random.Random(f"{args.seed}/pretrain")
    examples = []
    for _ in range(32 * args.steps):
        record = sample(rng, random_verdict=True)
        prompt = encode_prompt(tokenizer, record["prompt"])
        text = prompt + encode_target(tokenizer, record["cot"], "1", SUFFIX)[:-1]  # it ends before the score
        examples.append((text, len(prompt)))
    model = make_model(tokenizer, args.seed, args.hidden, args.layers)
    ce = pretrain(model, examples, 32, args.lr)
    with whole_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size} parameters, {len(tokenizer)} words, final CE {ce:.3f}")


if __name__ == "__main__":
    runs.run(main)
