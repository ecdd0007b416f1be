"""Stage 2: fine-tune the *seed* model again, now on self-generated CoTs with the true scores → p_tract.

    python stage2_train.py --model SEED --data out/run/cots.jsonl --out out/run/stage2

Stage 1's loop on other data. Training now sees the kind of CoTs that prediction will see: the judge learns
what its own words are worth. It starts from the seed, not from p_s, which has learned to trust the annotated
CoTs. --valid, like --data, takes a file of gen_cot.py.
"""

from stage1_train import DEFAULTS, run_stage
from tract import hub, runs
from tract.options import choose_grid, make_training_parser
from tract.records import InputError


def main() -> None:
    parser = make_training_parser(__doc__, stage=2, defaults=DEFAULTS)
    add = parser.add_argument_group("stage 2").add_argument
    add("--keep-unfinished", action="store_true", help="also train on CoTs that never reached the suffix")
    add("--continue-from-stage1", action="store_true", help="--model is p_s, not the seed (ablation A.4)")
    args = parser.parse_args()

    stage = hub.training_arguments(args.model).get("stage")  # None for a model that was not trained here
    found = "a model that was not trained here" if stage is None else f"the checkpoint of stage {stage}"
    if args.continue_from_stage1 and stage != 1:
        raise InputError(f"{args.model}: {found}; give p_s, which --continue-from-stage1 goes on from")
    if stage is not None and not args.continue_from_stage1:
        raise InputError(f"{args.model}: {found}; give the seed, or p_s with --continue-from-stage1 (A.4)")
    grid_was_given = args.grid is not None
    args.grid = choose_grid(args)  # that of --grid, else that of p_s (A.4), else 1 to 5
    shortened = []  # ids of records that lost a CoT; cots_of fills it while run_stage reads the data

    def cots_of(record: dict) -> list[str]:
        """Return a record's CoTs to train on; if one is left out, the record's id goes into `shortened`."""
        if "prediction" in record:  # a file of predict.py, which has the same fields
            raise InputError(f"record {record['id']!r} is a prediction; make training data with gen_cot.py")
        # Not every file says it. What it says of the suffix was checked as it was read
        written_for = record.get("grid", str(args.grid))
        if written_for != str(args.grid) and not grid_was_given:  # a --grid that was given wins
            what = f"its CoT was written for the scores {written_for}, not {args.grid}"
            raise InputError(f"record {record['id']!r}: {what}; give --grid {written_for}")
        cots = []
        for cot, finished in zip(record["cots"], record["finished"], strict=True):
            if finished or args.keep_unfinished:
                cots.append(cot)
        if len(cots) < len(record["cots"]):
            shortened.append(record["id"])
        return cots

    run_stage(args, ("id", "prompt", "score", "cots", "finished"), cots_of)
    runs.report(shortened, "with a CoT left out: it did not reach the suffix (--keep-unfinished keeps it)")


if __name__ == "__main__":
    runs.run(main)
