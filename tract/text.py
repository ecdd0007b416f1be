"""Texts as token ids: a prompt in its chat template, and text that can't become a control token."""

import itertools
import re
from functools import cache

from tract.records import InputError

MARKUP = re.compile(r"[<\[|].+[>\]|]")  # <think>, [INST], |end|
PLACEHOLDER = "§PROMPT§"  # stands for the prompt where a chat template is rendered around it
# Some templates write today's date, which would make prompts of training and prediction differ
DATE = "26 Jul 2024"  # what such a template gets as its variable `date_string`
# Put before a template, this stands in for the function strftime_now that some call (jinja drops the newline)
SAME_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro %}\n"


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
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]  # to any text
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
            enable_thinking=False,  # all reasoning belongs into the CoT, which is trained on and read
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


def cut_inside(text: str, tokens: set[str]) -> list[str]:
    """Cut after the first character of every one of these tokens: "a<think>b" becomes "a<" and "think>b"."""
    if not tokens:
        return [text]
    any_token = "|".join(map(re.escape, tokens))
    # Looked for ahead, for one token may begin inside another
    cuts = [match.start() + 1 for match in re.finditer(f"(?={any_token})", text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
