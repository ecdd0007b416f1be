"""The prompt of prometheus-eval (Apache-2.0), in its own wording: judges know it by heart.

On the scores 1 to 5 and with the suffix "[RESULT]" it is theirs to the letter.
"""

import re
from pathlib import Path

TEMPLATE = (Path(__file__).parent / "prompt.txt").read_text("utf-8").strip()
PARTS = ("instruction", "response", "rubric")
SUFFIX = " So the overall score is "  # between CoT and score, unless --suffix says otherwise


def render_prompt(record: dict, grid) -> str:
    """Fill the template with PARTS and (optional) `reference`; ask for the scores and the suffix of a Grid.

    `rubric` is a text, or an object as in `rubric_text`; `response` may be empty. Raises ValueError where one
    of them is missing or no text.
    """
    texts = {}
    for name in (*PARTS, "reference"):
        text = record.get(name)
        if text is None and name in PARTS:
            needed = "a record without a prompt needs instruction, response and rubric"
            raise ValueError(f"field '{name}' is missing; {needed}")
        if isinstance(text, dict) and name == "rubric":
            text = rubric_text(text, grid)
        texts[name] = "" if text is None else text
        if not isinstance(texts[name], str) or (name in ("instruction", "rubric") and not text.strip()):
            raise ValueError(f"field '{name}' is no text; write one")

    # Scores in words: 1 to 5 where they count up one by one, else a list, with what each is worth
    scores = []
    for token, value in zip(grid.tokens, grid.values, strict=True):
        scores.append(token if token == f"{value:.12g}" else f"{token} (worth {value:.12g})")
    first = scores[0]
    last = scores[-1]
    texts["score"] = f"one of {', '.join(scores)}"
    texts["number"] = f"one of {', '.join(grid.tokens)}"
    if scores == [str(int(grid.values[0]) + i) for i in range(len(scores))]:
        texts["score"] = f"an integer between {first} and {last}"
        texts["number"] = f"an integer number between {first} and {last}"
    texts["suffix"] = grid.suffix.strip()
    texts["given"] = "a response to evaluate, and"
    if texts["reference"].strip():
        texts["given"] = f"a response to evaluate, a reference answer that gets a score of {last}, and"
        texts["reference"] = f"###Reference Answer (Score {grid.tokens[-1]}):\n{texts['reference']}\n\n"
    else:
        texts["reference"] = ""
    return TEMPLATE.format(**texts)


def rubric_text(rubric: dict, grid) -> str:
    """Put a rubric with a description a score into text: {"criteria": "…", "1": "…", "5": "…"}.

    The keys are the grid's tokens or else its values, also as "Score 1" or "score1_description".
    Scores between the first and the last may be left out, or all. Raises ValueError.
    """
    for key in ("criteria", *rubric):
        if not isinstance(rubric.get(key), str) or not rubric[key].strip():
            raise ValueError(f"field 'rubric' has no text in '{key}'; write one, or a rubric in plain text")
    texts = {}
    for key, text in rubric.items():
        if key != "criteria":
            texts[re.sub(r"(?i)\Ascore[ _]?|_description\Z|\.0\Z", "", key)] = text
    names = grid.tokens if set(texts) <= set(grid.tokens) else [f"{value:.12g}" for value in grid.values]
    if texts and not {names[0], names[-1]} <= set(texts) <= set(names):
        scores = f"{', '.join(grid.tokens)}: describe the first and the last of them, and no others"
        raise ValueError(f"field 'rubric' describes {', '.join(texts)}; the scores of --grid are {scores}")
    token_of = dict(zip(names, grid.tokens, strict=True))
    lines = [f"Score {token_of[name]}: {text}" for name, text in texts.items()]
    return "\n".join([f"[{rubric['criteria']}]", *lines])
