"""From a record to token ids: chat template, score tokens, and which positions carry loss. No torch here.

    prompt ids | CoT ids, suffix ids | score id     | end of sequence      suffix: "So the overall score is"
    no loss    | CE                  | CE, penalty  | CE

Training, generation and scoring all encode through this file, so a CoT is read exactly as it was trained on.
"""

import re
from array import array
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from tract.records import Grid, InputError

MARKUP = re.compile(r"[<\[|].+[>\]|]")  # <think>, [INST], |end|
PLACEHOLDER = "§PROMPT§"  # stands for the prompt where a chat template is rendered around it
# Some templates write today's date, which would make prompts of training and prediction differ
DATE = "26 Jul 2024"  # what such a template gets as its variable `date_string`
# Put before a template, this stands in for the function strftime_now that some call
SAME_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro %}\n"  # drops this newline itself


class Example(NamedTuple):  # one training sequence
    id: str
    ids: array  # int32; in stage 3 a list
    start: int  # the tokens from here on carry loss, those before are the prompt
    score_position: int  # index of the score token in `ids`; the logits one before it predict the score.
    # In stage 3, beyond the end where there is none
    score: float  # the real-valued target of the squared error
    weight: float = 1.0  # of its CE; in stage 3, by how much its CoT did better than its siblings

    @property
    def n_supervised(self) -> int:
        return len(self.ids) - self.start


def encode(tokenizer, record: dict, grid: Grid, score_ids: list[int], no_cot: bool = False) -> Example:
    """Encode a record with `prompt`, `cot` and `score` as a training sequence. Raises InputError.

    Without CoT the suffix is always given, never predicted: only score and end of sequence carry loss.
    """
    prompt_ids = encode_prompt(tokenizer, record["prompt"])
    nearest = grid.nearest(record["score"])  # index of the grid point whose token stands in the text
    cot = "" if no_cot else record["cot"]
    target = encode_target(tokenizer, cot, grid.tokens[nearest], grid.suffix)
    if target[-1] != score_ids[nearest]:
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
    """Return the token ids of the suffix, as they follow a CoT, and the token id of each score.

    A sample CoT with suffix and score is tokenised: its last token is the score; what precedes that, after
    the CoT, is the suffix. This works where the space melts into the digit (GPT-2: " 4") and where it is a
    token of its own (Mistral, Llama-3). Raises InputError where scores do not differ in just that token.
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
    if len(first) < 2:  # the score alone: neither CoT nor suffix left a token
        raise InputError(f"{name}: its tokenizer knows no word of the suffix; is it the model's own?")
    cot_ids = encode_text(tokenizer, cot)
    # Skip the tokens that the CoT has without a suffix, too; its last one may have melted into the suffix
    n_shared = 0
    while n_shared < len(cot_ids) and cot_ids[n_shared] == first[n_shared]:
        n_shared += 1
    return first[n_shared:-1], score_ids


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Tokenise a prompt in its chat template, ready for the answer, with one BOS where the model has one."""
    before, after = template_halves(tokenizer)
    prompt = prompt.strip()  # as most templates do by themselves
    if any(token in prompt for token in control_tokens(tokenizer).values()):
        # Tokenise the template's halves apart from the prompt: only they may hold control tokens
        ids = tokenizer(before, add_special_tokens=False).input_ids + encode_text(tokenizer, prompt)
        ids += tokenizer(after, add_special_tokens=False).input_ids
    else:  # as one text, which is what the model knows from its own training
        ids = tokenizer(before + prompt + after, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    # Some templates write BOS themselves, some leave it to the tokenizer, and a few models (Qwen) use none
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    if adds_bos and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def template_halves(tokenizer) -> tuple[str, str]:
    """Return what the chat template puts before and after a prompt, up to the answer. Raises InputError."""
    if not tokenizer.chat_template:
        return "", "\n"  # a base model
    messages = [{"role": "user", "content": PLACEHOLDER}]
    try:
        template = SAME_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=DATE,
            enable_thinking=False,  # the CoT is the judge's own, before its score
        )
    except Exception as error:  # a template can raise anything
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails ({error}); mend it") from None
    if text.count(PLACEHOLDER) != 1:
        raise InputError(f"{tokenizer.name_or_path}: its chat template has to hold the prompt exactly once")
    before, after = text.split(PLACEHOLDER)
    return before, after


def thinking_setting(tokenizer) -> bool | None:
    """Return what run.json notes: False if the template knows `enable_thinking` (see above), else None."""
    knows_it = bool(tokenizer.chat_template) and "enable_thinking" in tokenizer.get_chat_template()
    return False if knows_it else None


def encode_text(tokenizer, text: str) -> list[int]:
    """Tokenise somebody's text, in which "</s>" or "<think>" is text: it can't become a control token."""
    control = control_tokens(tokenizer)
    # split_special_tokens breaks up the special ones; all other control tokens have to be cut by hand
    not_special = set(control.values()) - set(tokenizer.all_special_tokens)
    ids = []
    for piece in cut_inside(text, not_special):
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
    # A word-level vocabulary still finds control tokens as whole words; these become its unknown word
    return [tokenizer.unk_token_id if id in control else id for id in ids]


@cache  # Llama-3 has 256, and collecting these takes as long as encoding a CoT
def control_tokens(tokenizer) -> dict[int, str]:
    """Return the tokens that only a chat template may write, such as </s> and <think>, by id.

    These are the special ones, and what was added to the vocabulary and looks like markup. To some
    vocabularies words and runs of spaces were added, too: these are text.
    """
    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    added = {id: token for id, token in added.items() if MARKUP.fullmatch(token)}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def cut_inside(text: str, tokens: Iterable[str]) -> list[str]:
    """Cut after the first character of every one of these tokens: "a<think>b" becomes "a<" and "think>b"."""
    cuts = {len(text)}
    for token in tokens:
        start = text.find(token)
        while start >= 0:
            cuts.add(start + 1)
            start = text.find(token, start + 1)
    pieces = []
    start = 0
    for end in sorted(cuts):
        pieces.append(text[start:end])
        start = end
    return pieces
