"""The prompt of prometheus-eval (Apache-2.0), in its own wording: judges know it by heart."""

from pathlib import Path

TEMPLATE = (Path(__file__).parent / "prometheus_prompt.txt").read_text("utf-8").strip()


def render_prompt(record: dict) -> str:
    """Fill the template with `instruction`, `response`, `rubric` and (optional) `reference`.

    `rubric` is a text, or an object with a description a score: {"criteria": "…", "1": "…", "5": "…"}. Raises
    ValueError where one of them is no text.
    """
    texts = {name: record[name] for name in ("instruction", "response", "rubric")}
    if record.get("reference") is not None:
        texts["reference"] = record["reference"]
    if isinstance(rubric := texts["rubric"], dict) and "criteria" in rubric:
        scores = [f"Score {score}: {text}" for score, text in rubric.items() if score != "criteria"]
        texts["rubric"] = "\n".join([f"[{rubric['criteria']}]", *scores])
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"field '{empty[0]}' is no text; write one")
    given, reference = "a response to evaluate, and", texts.pop("reference", "")
    if reference:
        given = "a response to evaluate, a reference answer that gets a score of 5, and"
        reference = f"###Reference Answer (Score 5):\n{reference}\n\n"
    return TEMPLATE.format(given=given, reference=reference, **texts)
