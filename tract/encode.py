"""From a record to token ids: score tokens, and which positions carry loss. No torch here.

    prompt ids | CoT ids, suffix ids | score id     | end of sequence
    no loss    | CE                  | CE, penalty  | CE

The suffix (grid.suffix) is by default " So the overall score is ", with these spaces. Training, writing and
scoring all encode through this file, so a CoT is read exactly as it was trained on. Chat templates, and text
that looks like a control token: text.py.
"""

from array import array
from typing import NamedTuple

from tract.records import Grid, InputError
from tract.text import encode_prompt, encode_text


class Example(NamedTuple):  # one training sequence; in stage 3 also a prompt that has no CoT yet
    id: str
    ids: array  # int32; a list in the examples that stage 3 makes of its CoTs
    start: int  # tokens from here on carry loss; before are the prompt and, without a CoT, the suffix
    score_position: int  # index of the score token in `ids`; in stage 3 len(ids) where there is none
    score: float  # the real-valued target of the squared error
    weight: float = 1.0  # of its CE; in stage 3, by how much its CoT did better than its siblings

    @property
    def n_supervised(self) -> int:
        return len(self.ids) - self.start


def encode(tokenizer, record: dict, grid: Grid, score_ids: list[int], no_cot: bool = False) -> Example:
    """Encode a record with `prompt`, `cot` and `score` as a training sequence. Raises InputError.

    With no_cot the suffix is given, not predicted: only score and end of sequence carry loss.
    """
    prompt_ids = encode_prompt(tokenizer, record["prompt"])
    nearest = grid.nearest(record["score"])  # index of the grid point whose token stands in the text
    cot = "" if no_cot else record["cot"]
    target = encode_target(tokenizer, cot, grid.tokens[nearest], grid.suffix)
    if target[-1] != score_ids[nearest]:  # a few tokenizers split the end of a text by what precedes it
        raise InputError(f"record {record['id']!r}: its score became token {target[-1]}; change its cot")
    ids = array("i", [*prompt_ids, *target, tokenizer.eos_token_id])
    score_position = len(ids) - 2
    start = score_position if no_cot else len(prompt_ids)
    return Example(record["id"], ids, start, score_position, float(record["score"]))


def encode_target(tokenizer, cot: str, score_token: str, suffix: str) -> list[int]:
    """Tokenise CoT, suffix and score (the last token) as one text, without end of sequence.

    The prompt is tokenised by itself, so no token straddles the border, in training and generation alike.
    """
    text = cot.strip() + suffix + score_token
    return encode_text(tokenizer, text.lstrip())  # without a CoT, the leading space of the suffix goes


def encode_prefix(tokenizer, prompt_ids: list[int], cot: str, grid: Grid) -> list[int]:
    """Return the ids up to the position that predicts the score: prompt, CoT ("" for none) and suffix."""
    target = encode_target(tokenizer, cot, grid.tokens[0], grid.suffix)
    return prompt_ids + target[:-1]  # without the score, whichever it is


def score_tokens(tokenizer, grid: Grid) -> tuple[list[int], list[int]]:
    """Return (suffix ids, score ids): the token ids of the suffix, as they follow a CoT, and of each score.

    A sample CoT with suffix and score is tokenised: its last token is the score; what lies between CoT
    and score is the suffix. This works where space and digit are one token (GPT-2: " 4") and where the space
    is one of its own (Mistral, Llama-3). Raises InputError where scores do not differ in just that token,
    and where the tokenizer has no end of sequence or does not know the suffix.
    """
    name = tokenizer.name_or_path or "tokenizer"
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: has no end-of-sequence token; add one to its tokenizer_config.json")
    cot = "The answer is good."
    first = encode_target(tokenizer, cot, grid.tokens[0], grid.suffix)
    score_ids = []
    for token in grid.tokens:
        ids = encode_target(tokenizer, cot, token, grid.suffix)
        same_before = ids[:-1] == first[:-1]
        is_known = ids[-1] != tokenizer.unk_token_id
        is_new = ids[-1] not in score_ids
        if not (same_before and is_known and is_new):
            what = f"{name}: scores {grid.tokens[0]!r} and {token!r} do not differ in exactly one token"
            remedy = "name each by one: --grid 1,2,3,4,5,6,7,8,9,0=10 for 1 to 10, or letters, A=1,B=2,C=3"
            raise InputError(f"{what} ({first[-3:]}, {ids[-3:]}); {remedy}")
        score_ids.append(ids[-1])
    cot_ids = encode_text(tokenizer, cot)
    # Skip the start that `first` shares with cot_ids. Where the suffix has changed the CoT's last token, that
    # token counts as suffix
    n_shared = 0
    while n_shared < len(cot_ids) and cot_ids[n_shared] == first[n_shared]:
        n_shared += 1
    suffix_ids = first[n_shared:-1]
    if not suffix_ids or tokenizer.unk_token_id in suffix_ids:  # then no CoT is seen to reach it
        raise InputError(f"{name}: its tokenizer does not know the suffix; is it the model's own?")
    return suffix_ids, score_ids
