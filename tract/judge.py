"""Judge from Python: `Judge("out/stage2")(instruction=…, response=…, rubric=…)`.

Its first half is shared with predict.py, which does the same from file to file, and with rollout.py.
"""

import json
from typing import NoReturn

from tract import hub, intervals
from tract.encode import encode_prefix
from tract.files import check_writing_options, has_to_sample, longest_prompt
from tract.options import choose_grid, make_judging_parser
from tract.records import InputError, predicted, records_of, significant, updated
from tract.text import encode_prompt
from tract.writing import Cot, Loaded, load_judge, score, write_cots

NEEDS = {  # --given → fields that records must have
    None: ("id", "prompt"),
    "cot": ("id", "prompt", "cot"),
    "cots": ("id", "prompt", "cots", "finished"),
}


def ready_cots_of(judge: Loaded, record: dict, prompt_ids: list[int], given: str | None) -> list[Cot]:
    """Return the CoTs in the field `given` of a record, an empty one for None (--no-cot); without scores."""
    if given == "cots":
        texts = record["cots"]
        finished = record["finished"]
    else:
        texts = [record["cot"]] if given == "cot" else [""]
        finished = [True]
    cots = []
    for text, is_finished in zip(texts, finished, strict=True):
        ids = encode_prefix(judge.tokenizer, prompt_ids, text, judge.grid)  # prompt, CoT and suffix
        cots.append(Cot(text, is_finished, ids))
    return cots


def read_missing_scores(judge: Loaded, cots_of_records: list[list[Cot]]) -> None:
    """Read the score distributions that CoTs lack: those that reached the suffix when written have theirs."""
    unscored = [cot for cots in cots_of_records for cot in cots if cot.scores is None]
    distributions = score(judge, [cot.ids for cot in unscored])
    for cot, distribution in zip(unscored, distributions, strict=True):
        cot.scores = distribution


def predict_from(judge: Loaded, cots_of_records: list[list[Cot]], args) -> list[dict]:
    """Return what predict.py adds to each record; the prediction is the mean over its CoTs."""
    grid = judge.grid
    read_missing_scores(judge, cots_of_records)
    found = []
    for cots in cots_of_records:
        # Round before computing, so that anyone can compute the prediction from the file
        score_probs = [[significant(p) for p in cot.scores.probs] for cot in cots]
        prediction, decoded = predicted(score_probs, grid, args.renormalise)
        fields = {
            "cots": [cot.text for cot in cots],
            "finished": [cot.finished for cot in cots],
            "suffix": grid.suffix.strip(),
            "score_probs": score_probs,
            "off_grid": [significant(cot.scores.off_grid) for cot in cots],
            "grid": str(grid),
            "renormalised": args.renormalise,
            "prediction": prediction,  # the mean of Σ_v p(v) · v over the CoTs
            "decoded": decoded,  # the mean of the likeliest scores
            **intervals.fields(prediction, args.intervals, grid),
        }
        found.append(fields)
    return found


class Judge:
    """Judge records as predict.py would, the same way with the same seed; it loads the model once.

    The options are predict.py's, by name, as in num_cots=4, seed=1, renormalise=True, bf16=False. Grid,
    suffix and whether there is a CoT come with the checkpoint. Raises InputError.
    """

    def __init__(self, model: str, **options):
        parser = make_judging_parser("")
        parser.error = refuse  # argparse's own would end the process
        known = vars(parser.parse_args([])).keys() - {"model", "data", "out", "shard"}
        if options.keys() - known:
            refuse(f"no option {min(options.keys() - known)}; there are {', '.join(sorted(known))}")
        if hub.training_arguments(str(model)).get("no_cot"):
            options.setdefault("no_cot", True)
        arguments = [f"--model={model}"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            if name == "bf16" and value is False:
                arguments.append("--fp32")
            elif value is True:
                arguments.append(flag)
            elif isinstance(value, list):
                arguments += [flag, *map(str, value)]
            elif value is not None and value is not False:
                arguments.append(f"{flag}={value}")
        args = parser.parse_args(arguments)
        args.grid = choose_grid(args)
        args.intervals = intervals.read(args)
        check_writing_options(args)
        self.args = args
        self.loaded = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)

    def __call__(self, records: list[dict] | dict | None = None, **record) -> dict | list[dict]:
        """Return a record with the fields of predict.py, or a list of such for a list. Raises InputError."""
        if records is None or isinstance(records, dict):
            return self([(records or {}) | record])[0]
        if record or not isinstance(records, list):
            refuse("give a list of records, or the fields of one: judge(instruction=…, response=…, rubric=…)")
        lines = []  # as in a file, so that all is checked that would be there
        for number, row in enumerate(records, 1):
            try:
                lines.append(json.dumps(row).encode())
            except (TypeError, ValueError) as error:
                raise InputError(f"record {number}: not JSON ({error}); give texts, numbers, lists") from None
        rows = records_of(lines, "record ", self.args.grid, NEEDS[self.args.given])
        if not rows:
            return []
        args = self.args
        samples_cots = has_to_sample(args)
        longest = longest_prompt(self.loaded, args)
        prompts = []
        cots = []  # of each record
        for number, row in enumerate(rows, 1):
            prompts.append(encode_prompt(self.loaded.tokenizer, row["prompt"]))
            length = len(prompts[-1])
            if not samples_cots:
                cots.append(ready_cots_of(self.loaded, row, prompts[-1], args.given))
                length = max(len(cot.ids) for cot in cots[-1])
            if length > longest:
                raise InputError(f"record {number}: has {length} tokens, more than {longest}; shorten it")
        if samples_cots:
            cots = write_cots(self.loaded, rows, prompts, args, args.batch_size)
        predicted_fields = predict_from(self.loaded, cots, args)
        return [updated(row, fields) for row, fields in zip(rows, predicted_fields, strict=True)]


def refuse(message: str) -> NoReturn:
    raise InputError(f"Judge: {message}")
