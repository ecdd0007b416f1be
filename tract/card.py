"""Describe a checkpoint to those who get it, in the README.md of its folder."""

from pathlib import Path

from huggingface_hub import ModelCardData

CARD = """---
{metadata}
---
# A judge of responses
It predicts the expected score of a response. Trained in stage {stage} of
[TRACT](https://arxiv.org/abs/2503.04381), on {kind}:

    base model   {base}
    trained      {weights}
    data         {data_file}
    grid         {grid!r}
    suffix       {suffix!r}
    loss         {ce_weight} · CE + {lam} · penalty ({penalty})
    CE at score  {score_ce}, {weight}

To judge with it, in a clone of TRACT; FOLDER is this folder, or its id on the hub:

    python predict.py --model FOLDER --data mine.jsonl --out judged.jsonl{option}

or from Python: `from tract.judge import Judge; Judge("FOLDER")(instruction="…", response="…", rubric="…")`

## Limits
- Nothing here says how it judges tasks, rubrics and languages that its one data file has not.
- The prediction is not renormalised: probability off the grid counts as a score of 0; predict.py reports it.
- No licence is given here; it depends on those of base model and data.

## Measured
{held_out}
![Loss, held-out error and learning rate over the steps](curves.png)

How it judges in use, on CoTs that it writes itself, eval.py measures; where it was run, its table follows.

"""


def card(run: dict) -> str:
    """Return the model card of a training, with metadata for the hub. run: what its run.json holds."""
    args = run["arguments"]
    base = run["inputs"].get("model name")  # its id on the hub; a folder has none
    adapter = args["lora"]
    bits = ", its base in 4 bits (needs bitsandbytes)" if args["four_bit"] else ""
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        tags=["tract", "llm-as-a-judge"],
        grid=args["grid"],
        suffix=args["suffix"],
    )
    weight = "one token's share" if args["score_weight"] is None else f"weight {args['score_weight']:g}"
    kinds = {  # stage → what the model was trained on
        1: "annotators' CoTs",
        2: "CoTs that the judge of stage 1 wrote",
        3: "its own CoTs, weighted by how much better each did than its siblings",
    }
    kind = "scores alone, without CoTs" if args["no_cot"] else kinds[args["stage"]]
    cots = "without CoTs" if args["no_cot"] else "CoTs given"
    held_out = "No records were held out in training."
    if "kept" in run:  # of stage 3
        held_out = "On {n} held-out records, own CoTs: RMSE {rmse:.3f}, r {r:.3f}; chosen by that RMSE."
        held_out = held_out.format(**run["kept"]["valid"])
    elif "valid" in run["last_step"]:
        held_out = "On {n} held-out records, {cots}: CE {ce:.3f} a token, RMSE {rmse:.3f}."
        held_out = held_out.format(cots=cots, **run["last_step"]["valid"])
    facts = {  # of a folder or file only the name: where it lies on a machine is private
        "metadata": metadata.to_yaml(),
        "kind": kind,
        "base": base or repr(Path(args["model"]).resolve().name),
        "weight": weight,
        "weights": f"an adapter of rank {adapter}{bits}" if adapter else "all weights",
        "data_file": "{!r}, SHA-256 {}".format(Path(args["data"]).name, run["inputs"]["data"]),
        "held_out": held_out,
        "option": " --no-cot" if args["no_cot"] else "",
    }
    return CARD.format(**args, **facts)
