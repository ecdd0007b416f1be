"""The JSONL record, from a line of text to token ids: everything the stages must agree on. No torch here.

One JSON object a line, the same fields through all stages, each stage adding its own:

    id            str, unique in its file
    prompt        str, the whole formatted judge prompt
    cot           str, the annotated chain of thought (without a score)
    instruction, response, rubric, reference (optional)
                  in place of a whole prompt: it is then rendered with the Prometheus template
    score         number inside the range of the score grid; 3.67, a mean of three annotators, is as good as 4
    cots          list of str, self-generated CoTs (gen_cot.py, predict.py)
    finished      list of bool, one a CoT: did it reach the suffix by itself?
    score_probs   list of lists, one a CoT: p(score token | prompt, CoT) in the order of the grid (predict.py)
    off_grid      list of float, one a CoT: probability mass on tokens outside the grid
    prediction    float, CoT-RAIL: the expected score, averaged over the CoTs
    decoded       float, the most likely score, averaged over the CoTs

The target text of a record is its CoT, then the suffix, then the grid token nearest to its score, then end of sequence.
"""

import itertools
import json
import math
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from runs import ROOT, Fault, InputError, read_run, to_line

SUFFIX = " So the overall score is "  # between CoT and score, unless --suffix says otherwise
PLACEHOLDER = "§PROMPT§"  # stands for the prompt where a chat template is tokenised around it
TINY_SEED = str(ROOT / "data/tiny/seed")  # the embedded seed model

MODELS = {  # what `--model NAME` stands for; any other name is a folder or a hub id
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "prometheus-2-7b": "prometheus-eval/prometheus-7b-v2.0",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

PROMPT = """###Task Description:
An instruction (might include an Input inside it), {given} a score rubric representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of the response strictly based on the given score rubric, not evaluating \
in general.
2. After writing a feedback, write a score that is an integer between 1 and 5. You should refer to the score rubric.
3. The output format should look as follows: "Feedback: (write a feedback for criteria) [RESULT] (an integer number between \
1 and 5)"
4. Please do not generate any other opening, closing, and explanations.

###The instruction to evaluate:
{instruction}

###Response to evaluate:
{response}

{reference}###Score Rubrics:
{rubric}

###Feedback:"""


# ---------------------------------------------------------------------------------------------------- score grid


class Grid(NamedTuple):
    """The scores that are single tokens: `tokens[i]` is written in the text and is worth `values[i]`, ascending.

    `suffix` stands between CoT and score, with the spaces around it.
    """

    tokens: tuple[str, ...] = ("1", "2", "3", "4", "5")
    values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    suffix: str = SUFFIX

    @classmethod
    def parse(cls, text: str, suffix: str = SUFFIX) -> "Grid":
        """Read `1,2,3,4,5` or `1=0,3=50,5=100` (token=value).

        >>> Grid.parse("1=0,3=50,5=100")
        Grid(tokens=('1', '3', '5'), values=(0.0, 50.0, 100.0), suffix=' So the overall score is ')
        """
        pairs = [(token.strip(), value.strip()) for token, _, value in (p.partition("=") for p in text.split(","))]
        try:
            values = tuple(float(value or token) for token, value in pairs)
        except ValueError:
            raise InputError(f"--grid {text}: every score needs a number, as in 1,2,3,4,5 or 1=0,3=50,5=100") from None
        tokens = tuple(token for token, _ in pairs)
        ascending = all(a < b for a, b in itertools.pairwise(values))
        if len(tokens) < 2 or len(set(tokens)) < len(tokens) or not ascending or not all(map(math.isfinite, values)):
            raise InputError(f"--grid {text}: give at least two different scores in ascending order")
        return cls(tokens, values, f" {suffix.strip()} ")

    def __str__(self) -> str:
        return ",".join(f"{t}={v:.12g}" for t, v in zip(self.tokens, self.values, strict=True))

    def nearest(self, score: float) -> int:
        """Index of the grid point nearest to `score`, halves up.

        >>> [Grid().tokens[Grid().nearest(s)] for s in (1, 3.49, 3.5, 4.67)]
        ['1', '3', '4', '5']
        """
        return min(range(len(self.values)), key=lambda i: (abs(self.values[i] - score), -self.values[i]))


def predicted(score_probs: list[list[float]], grid: Grid, *, renormalise: bool = False) -> tuple[float, float]:
    """`prediction` (CoT-RAIL: Σ_v p(v) · v) and `decoded` (the most likely score), both averaged over the CoTs.

    score_probs: one list a CoT, p(score token) in the order of the grid. `renormalise` divides each expected score by its
    mass on the grid, which the paper does not.

    >>> predicted([[0.0, 0.2, 0.0, 0.6, 0.0]], Grid())
    (2.8, 4.0)
    >>> predicted([[0.0, 0.2, 0.0, 0.6, 0.0]], Grid(), renormalise=True)
    (3.5, 4.0)
    """
    expected = [sum(p * v for p, v in zip(probs, grid.values, strict=True)) for probs in score_probs]
    if renormalise:
        expected = [e / sum(probs) for e, probs in zip(expected, score_probs, strict=True)]
    decoded = [grid.values[probs.index(max(probs))] for probs in score_probs]
    return significant(sum(expected) / len(expected)), sum(decoded) / len(decoded)


def significant(number: float) -> float:
    """Seven digits, which is what fp32 holds: the files stay readable."""
    return float(f"{number:.7g}")


# ------------------------------------------------------------------------------------------------- reading records


def parse_line(line: bytes, where: str) -> dict:
    """One JSONL line as a dict; NaN and Infinity, which JSON does not have, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); every line must be one JSON object in UTF-8") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__}, not a JSON object; every line must be one record")
    if b"\\ud" in line.lower():
        try:
            to_line(record).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{where}: holds half of a surrogate pair, which no text has; mend or remove it") from None
    return record


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300  # neither NaN nor 400 digits


def check_record(record: dict, grid: Grid, need: Iterable[str]) -> str | None:
    """What is wrong with `record`, in one phrase with its remedy, or None. Checks `need` and whatever else is there."""
    for field in need:
        if record.get(field) is None:
            hint = {
                "cots": "; only gen_cot.py adds self-generated CoTs",
                "prompt": "; give it whole, or as instruction, response and rubric",
            }.get(field, "")
            return f"field '{field}' is missing; this stage needs {', '.join(need)}{hint}"
    for field in ("id", "prompt", "cot"):
        text = record.get(field)
        if text is None:
            continue
        if not isinstance(text, str):
            return f"field '{field}' is {json.dumps(text)[:40]}, not a string; write it as one"
        if not text.strip():
            return f"field '{field}' is empty; fill it in or leave the record out"
    if grid.suffix.strip() in (record.get("cot") or ""):
        return f"field 'cot' holds '{grid.suffix.strip()}'; end the CoT before it, the score is added from 'score'"
    for field in ("score", "prediction", "decoded"):
        number = record.get(field)
        if number is not None and not _is_number(number):
            return f"field '{field}' is {json.dumps(number)[:40]}, not a number; write it without quotes"
    low, high = grid.values[0], grid.values[-1]
    if record.get("score") is not None and not low <= record["score"] <= high:
        return f"score {record['score']:g} lies outside the grid ({low:g} to {high:g}); mend it or set --grid"
    if "finished" in need:
        finished, n = record["finished"], len(grid.tokens)
        if not (isinstance(finished, list) and finished and all(type(f) is bool for f in finished)):
            return "field 'finished' does not hold one true or false a CoT; make this file with gen_cot.py or predict.py"
        shapes = {"cots": lambda x: isinstance(x, str), "off_grid": _is_number}
        shapes["score_probs"] = lambda x: isinstance(x, list) and len(x) == n and all(map(_is_number, x))
        for field, right in shapes.items():
            if field in need and not (
                isinstance(record[field], list) and len(record[field]) == len(finished) and all(map(right, record[field]))
            ):
                per_score = f" with {n} scores (is --grid right?)" if field == "score_probs" else ""
                return f"field '{field}' does not hold one entry a CoT{per_score}; make this file with gen_cot.py or predict.py"
    return None


def render_prompt(record: dict) -> str:
    """The Prometheus prompt of a record with `instruction`, `response`, `rubric` and, if there is one, `reference`.

    `rubric` is a text, or an object with `criteria` and a description a score: {"criteria": "...", "1": "...", "5": "..."}.
    The wording is prometheus-eval's (Apache-2.0), for judges know it by heart; raises ValueError where a field is no text.
    """
    rubric, reference = record["rubric"], record.get("reference")
    if isinstance(rubric, dict) and "criteria" in rubric:
        scores = [f"Score {score}: {text}" for score, text in rubric.items() if score != "criteria"]
        rubric = "\n".join([f"[{rubric['criteria']}]", *scores])
    texts = {"instruction": record["instruction"], "response": record["response"], "rubric": rubric}
    texts |= {"reference": reference} if reference is not None else {}
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"field '{empty[0]}' is no text; write one")
    return PROMPT.format(
        given="a response to evaluate, a reference answer that gets a score of 5, and"
        if reference
        else "a response to evaluate, and",
        instruction=texts["instruction"],
        response=texts["response"],
        reference=f"###Reference Answer (Score 5):\n{reference}\n\n" if reference else "",
        rubric=rubric,
    )


class Lines(Sequence):
    """JSON values, one a line of a file, each read when it is asked for: in memory is only where they start."""

    def __init__(self, file: IO[bytes]):
        self.file, self.starts = file, array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, i: int) -> bytes:
        self.file.seek(self.starts[i])
        return self.file.readline()

    def __getitem__(self, i: int) -> Any:
        return json.loads(self.line(i))

    def append(self, value: Any) -> None:
        self.starts.append(self.file.seek(0, os.SEEK_END))
        self.file.write(to_line(value).encode())
        self.file.flush()


class Spool(Lines):
    """The same for values in a file without a name: what is too large for memory, and needed only while the process runs."""

    def __init__(self):
        super().__init__(tempfile.TemporaryFile())

    def __getitem__(self, i: int) -> Any:
        self.file.seek(self.starts[i])
        return pickle.load(self.file)  # JSON would take ten times as long for a list of ids

    def append(self, value: Any) -> None:
        self.starts.append(self.file.seek(0, os.SEEK_END))
        try:
            pickle.dump(value, self.file)
            self.file.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise Fault(f"{folder}: {error.strerror}; make room there, or set TMPDIR to another folder, and go on") from None


class Records(Lines):
    """The records of a JSONL file, checked by read_records. Raises InputError if the file has changed since."""

    def __init__(self, path: str | Path):
        super().__init__(open(path, "rb"))
        self.path, self.ids, self.changed = path, [], os.fstat(self.file.fileno()).st_mtime_ns

    def __getitem__(self, i: int) -> dict:
        if os.fstat(self.file.fileno()).st_mtime_ns != self.changed:
            raise InputError(f"{self.path}: was changed while it was being read; give the same command again")
        return to_record(self.line(i), self.ids[i], str(self.path))


def to_record(line: bytes, id: str, where: str) -> dict:
    """One line's record, with `id` where it has none, and a rendered prompt where it has what that takes."""
    record = {"id": id} | parse_line(line, where)
    if "prompt" not in record and {"instruction", "response", "rubric"} <= record.keys():
        try:
            record["prompt"] = render_prompt(record)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    return record


def read_records(path: str | Path, *, grid: Grid, need: Iterable[str] = ("id", "prompt")) -> Records:
    """Check every line of a JSONL file of records; what comes back reads them one at a time. Unknown fields are kept.

    A record without id gets the number of its line.

    Raises InputError, `path:line: what is wrong and what to do`, at the first bad line; also for an empty file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a JSONL file of records (data/*/prepare.py make some)")
    need, checked, first_seen, start = tuple(need), Records(path), {}, 0
    for number, line in enumerate(checked.file, 1):
        if line.strip():
            record = to_record(line, str(number), f"{path}:{number}")
            wrong = check_record(record, grid, need)
            if wrong is None and record["id"] in first_seen:
                wrong = f"id {record['id']!r} was already used in line {first_seen[record['id']]}; ids must be unique"
            if wrong:
                raise InputError(f"{path}:{number}: {wrong}")
            first_seen[record["id"]] = number
            checked.starts.append(start)
        start += len(line)
    checked.ids = list(first_seen)
    if not checked.ids:
        raise InputError(f"{path}: no records in it; was it cut off while being made?")
    return checked


def read_items(path: str) -> list[dict]:
    """The rows of somebody else's file, a JSON array or JSONL, for the data sets' prepare.py. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        text = file.read()
    if text.lstrip()[:1] == b"[":
        try:
            items = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}: not a JSON array ({error})") from None
    else:
        items = [parse_line(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not items:
        raise InputError(f"{path}: no rows in it")
    return items


def sort_out(made: list[dict | str], path: str) -> tuple[list[dict], str]:
    """What a prepare.py made of its rows, in their order: the records, and lines that count the reasons for the others.

    Raises InputError where nothing could be kept.
    """
    kept = [record for record in made if isinstance(record, dict)]
    reasons: dict[str, list[int]] = {}
    for number, record in enumerate(made):
        if isinstance(record, str):
            reasons.setdefault(record, []).append(number)
    if not kept:
        raise InputError(f"{path}: nothing to keep, row 0: {made[0] if made else 'there is none'}; is it the right file?")
    lines = [
        f"left out {len(rows)}: {reason} (row {', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})\n"
        for reason, rows in reasons.items()
    ]
    return kept, "".join(lines)


def clean_prompt(instruction: str) -> str:
    """A Prometheus prompt up to its closing "###Feedback:", which some files follow with stray quotes and commas."""
    before, marker, after = instruction.rpartition("###Feedback:")
    return before + marker if marker and not after.strip(" \n\"',") else instruction.strip()


def clean_cot(feedback: str) -> str:
    """GPT-4's feedback as a CoT: cut where it announces the score ("So the overall", else "[RESULT]"), as in the paper."""
    return feedback.partition("So the overall")[0].partition("[RESULT]")[0].removeprefix("Feedback:").strip()


# ------------------------------------------------------------------------------------- from a record to token ids


class ScoreTokens(NamedTuple):
    suffix_ids: list[int]  # what the suffix becomes after a CoT, up to where the scores part
    score_ids: list[int]  # one token id a grid point


def text_ids(tokenizer, text: str) -> list[int]:
    """Somebody's text, in which "</s>" or "<|eot_id|>" is text: it can't become a control token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    control = set(tokenizer.all_special_ids)  # a word-level vocabulary still finds them, as words it knows
    return [tokenizer.unk_token_id if id in control else id for id in ids]


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The prompt in the tokenizer's chat template, ready for the answer, with exactly one BOS where the model has one.

    A tokenizer without a chat template (a base model) gets the plain prompt and a newline.
    """

    def render(prompt: str) -> str:
        if not tokenizer.chat_template:
            return prompt.rstrip() + "\n"
        messages = [{"role": "user", "content": prompt}]
        # Llama-3's templates write a date: one that changed between training and prediction would change every prompt
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")

    if any(token in prompt for token in tokenizer.all_special_tokens):
        # Only the template may write control tokens: tokenise what it puts before and after the prompt on its own
        before, after = render(PLACEHOLDER).split(PLACEHOLDER)
        ids = tokenizer(before, add_special_tokens=False).input_ids + text_ids(tokenizer, prompt)
        ids += tokenizer(after, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(render(prompt), add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    # Some templates write BOS themselves, some leave it to the tokenizer, and a few models (Qwen) have none in use.
    if bos is not None and ids[:1] != [bos] and tokenizer("a").input_ids[:1] == [bos]:
        ids = [bos, *ids]
    return ids


def target_ids(tokenizer, cot: str, score_token: str, suffix: str = SUFFIX) -> list[int]:
    """CoT, suffix and score as one text (no end of sequence): tokenised apart from the prompt, so that no token can
    straddle the border and the prompt is the same in training and in generation. The score is the last token."""
    return text_ids(tokenizer, (cot.strip() + suffix + score_token).lstrip())


def prefix_ids(tokenizer, prompt: list[int], cot: str, grid: Grid) -> list[int]:
    """Everything up to the position that predicts the score: the prompt's ids, CoT and suffix. `cot` is "" without CoT."""
    return prompt + target_ids(tokenizer, cot, grid.tokens[0], grid.suffix)[:-1]


def score_tokens(tokenizer, grid: Grid) -> ScoreTokens:
    """Derive the score tokens in context: tokenise a CoT and the suffix with each score and find where they part.

    So it holds where the space melts into the digit (GPT-2: " 4") as well as where it is a token of its own (Mistral,
    Llama-3). Raises InputError where two scores do not differ in exactly one token, or without end of sequence.
    """
    name = Path(tokenizer.name_or_path or "tokenizer").name
    context = "The answer is good."
    targets = [target_ids(tokenizer, context, token, grid.suffix) for token in grid.tokens]
    prefix = targets[0][:-1]
    for token, ids in zip(grid.tokens, targets, strict=True):
        first = (token, ids) == (grid.tokens[0], targets[0])
        if ids[:-1] != prefix or (not first and ids == targets[0]) or ids[-1] == tokenizer.unk_token_id:
            raise InputError(
                f"tokenizer {name}: scores {grid.tokens[0]!r} and {token!r} do not differ in exactly one token "
                f"({targets[0][-3:]} and {ids[-3:]}); choose single-token scores, as in --grid 1=0,3=50,5=100"
            )
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name}: has no end-of-sequence token; add one to its tokenizer_config.json")
    cot_ids = tokenizer(context, add_special_tokens=False).input_ids
    start = next((i for i, (a, b) in enumerate(zip(cot_ids, prefix, strict=False)) if a != b), len(cot_ids))
    return ScoreTokens(suffix_ids=prefix[start:], score_ids=[ids[-1] for ids in targets])


class Example(NamedTuple):
    """One training sequence. The tokens from `start` on carry loss, those before are the prompt."""

    id: str
    ids: list[int]
    start: int
    score_position: int | None  # index of the score token in `ids`; the logits one before it predict the score
    score: float | None  # the real-valued target of the squared error

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.start


def encode(tokenizer, record: dict, *, grid: Grid, score_ids: list[int], no_cot: bool = False) -> Example:
    """Prompt (no loss), CoT, suffix, score token and end of sequence of one record with `prompt`, `cot`, `score`.

    Without CoT the suffix is always given, never predicted, so only the score and the end of sequence carry loss.
    A record whose score is None ends before its score: text to pretrain a score-free seed model on.
    Raises InputError where the score does not come out as the expected token.
    """
    prompt = prompt_ids(tokenizer, record["prompt"])
    cot = "" if no_cot else record["cot"]
    if record["score"] is None:
        return Example(record["id"], prefix_ids(tokenizer, prompt, cot, grid), len(prompt), None, None)
    point = grid.nearest(record["score"])
    target = target_ids(tokenizer, cot, grid.tokens[point], grid.suffix)
    if target[-1] != score_ids[point]:
        raise InputError(f"record {record['id']!r}: its score became token {target[-1]}, not {score_ids[point]}")
    ids = prompt + target + [tokenizer.eos_token_id]
    score_position = len(ids) - 2
    return Example(record["id"], ids, score_position if no_cot else len(prompt), score_position, float(record["score"]))


def too_long(lengths: dict[str, int], max_length: int) -> set[str]:
    """The ids of what is longer than `max_length` tokens: such a record is left out, never cut.

    Raises InputError if nothing would be left.
    """
    if min(lengths.values()) > max_length:
        shortest = min(lengths.values())
        raise InputError(
            f"all {len(lengths)} records are longer than --max-length {max_length} (the shortest has {shortest} tokens)"
        )
    return {id for id, length in lengths.items() if length > max_length}


# ------------------------------------------------------------------------------------------------- files of a run


def choose_grid(asked: str | None, suffix: str | None, model: str) -> Grid:
    """The grid and suffix asked for, else those that travel with the checkpoint, else the defaults; they may not disagree."""
    run = read_run(model)
    carried = Grid.parse(run["grid"], run.get("suffix", SUFFIX)) if "grid" in run else None
    default = carried or Grid()
    grid = Grid.parse(asked or str(default), suffix or default.suffix)
    if carried and grid != carried:
        given = " and ".join(name for name, value in (("--grid", asked), ("--suffix", suffix)) if value)
        raise InputError(f"{given}: {model} was trained on {carried} after '{carried.suffix.strip()}'; leave {given} away")
    return grid
