"""Make the embedded seed model: a Mistral of 0.4 M parameters that can write the task's CoTs and knows nothing of scores.

It is pretrained on fresh records of the same layout whose verdict word is random and whose text ends before the score, so
that what a judge has to learn, what the rating is and what the verdict is worth, is left to fine-tuning. About two minutes.

    python data/tiny/make_seed.py          # the seed/ folder beside this file
"""

import argparse
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import records  # noqa: E402
import runs  # noqa: E402
from data.tiny.prepare import WORDS, sample  # noqa: E402
from loss import cot_raft_loss  # noqa: E402
from models import device  # noqa: E402
from stage1_train import make_optimiser, train  # noqa: E402

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: every word of the task and every digit is one token. The chat template is BOS and the prompt."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }}"
    return tokenizer


def make_model(tokenizer, seed: int, *, hidden: int, layers: int):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=256,
        sliding_window=None, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=hidden**-0.5,  # at the default .02 this small a model does not learn to compare two digits
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(device())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--out", type=Path, default=HERE / "seed", help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of 32 fresh records")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--hidden", type=int, default=128, help="size of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    grid = records.Grid()
    score_ids = records.score_tokens(tokenizer, grid).score_ids
    rng = random.Random(f"{args.seed}/pretrain")
    drawn = [sample(rng, random_verdict=True) | {"id": str(i), "score": None} for i in range(32 * args.steps)]
    examples = [records.encode(tokenizer, record, grid=grid, score_ids=score_ids) for record in drawn]

    model = make_model(tokenizer, args.seed, hidden=args.hidden, layers=args.layers)
    values = {
        "score_ids": torch.tensor(score_ids, device=device()),
        "score_values": torch.tensor(grid.values, device=device()),
    }
    plan = [range(i, i + 32) for i in range(0, len(examples), 32)]
    optimiser, schedule = make_optimiser(model, lr=args.lr, warmup=0.05, weight_decay=0.01, steps=len(plan))
    *_, last = train(
        model, optimiser, schedule, examples, plan, loss=partial(cot_raft_loss, lam=0.0, **values), score_in_ce=True,
        pad_id=tokenizer.pad_token_id, clip=1.0, batch_size=32, bf16=False, label="seed model",
    )  # fmt: skip
    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size} parameters, {len(tokenizer)} words, final CE {last['ce']:.3f}")


if __name__ == "__main__":
    main()
