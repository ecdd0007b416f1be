"""The prompt of prometheus-eval (Apache-2.0), in its own wording: judges know it by heart.

On the scores 1 to 5 and with the suffix "[RESULT]" it is theirs to the letter.
"""

from pathlib import Path

TEMPLATE = (Path(__file__).parent / "prompt.txt").read_text("utf-8").strip()
PARTS = ("instruction", "response", "rubric")


def render_prompt(record: dict, grid) -> str:
    """Fill the template with PARTS and (optional) `reference`; ask for the scores and the suffix of a Grid.

    `rubric` is a text, or an object as in `rubric_text`; `response` may be empty. Raises ValueError where one
    of them is missing or no text.
    """
    texts = {name: record.get(name) for name in PARTS}
    for name, text in texts.items():
        if text is None:
            needed = "a record without a prompt needs instruction, response and rubric"
            raise ValueError(f"field '{name}' is missing; {needed}")
    if record.get("reference") is not None:
        texts["reference"] = record["reference"]
    if isinstance(texts["rubric"], dict):
        texts["rubric"] = rubric_text(texts["rubric"], grid)
    for name, text in texts.items():
        if not isinstance(text, str) or (name in ("instruction", "rubric") and not text.strip()):
            raise ValueError(f"field '{name}' is no text; write one")

    scores = [
        token if token == f"{value:.12g}" else f"{token} (worth {value:.12g})"
        for token, value in zip(grid.tokens, grid.values, strict=True)
    ]
    score = f"one of {', '.join(scores)}"
    number = f"one of {', '.join(grid.tokens)}"
    if scores == [str(int(grid.values[0]) + i) for i in range(len(scores))]:
        score = f"an integer between {scores[0]} and {scores[-1]}"
        number = f"an integer number between {scores[0]} and {scores[-1]}"
    given = "a response to evaluate, and"
    reference = ""
    if texts.get("reference", "").strip():
        given = f"a response to evaluate, a reference answer that gets a score of {scores[-1]}, and"
        reference = f"###Reference Answer (Score {grid.tokens[-1]}):\n{texts['reference']}\n\n"
    asked = {"score": score, "number": number, "suffix": grid.suffix.strip()}
    return TEMPLATE.format(**texts | asked | {"given": given, "reference": reference})


def rubric_text(rubric: dict, grid) -> str:
    """Put a rubric with a description a score into text: {"criteria": "…", "1": "…", "5": "…"}.

    The keys are the grid's tokens or else its values; "score1_description" is prometheus-eval's name of "1".
    Scores between the first and the last may be left out, or all. Raises ValueError.
    """
    for key in ("criteria", *rubric):
        if not isinstance(rubric.get(key), str) or not rubric[key].strip():
            raise ValueError(f"field 'rubric' has no text in '{key}'; write one, or a rubric in plain text")
    texts = {
        key.removeprefix("score").removesuffix("_description"): text
        for key, text in rubric.items()
        if key != "criteria"
    }
    names = grid.tokens if set(texts) <= set(grid.tokens) else [f"{value:.12g}" for value in grid.values]
    if texts and not {names[0], names[-1]} <= set(texts) <= set(names):
        scores = f"{', '.join(grid.tokens)}: describe the first and the last of them, and no others"
        raise ValueError(f"field 'rubric' describes {', '.join(texts)}; the scores of --grid are {scores}")
    token_of = dict(zip(names, grid.tokens, strict=True))
    return "\n".join([f"[{rubric['criteria']}]", *(f"Score {token_of[k]}: {t}" for k, t in texts.items())])
