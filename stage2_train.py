"""Stage 2: fine-tune the *seed* model again, now on self-generated CoTs with the true scores → p_tract.

    python stage2_train.py --model SEED --data out/run/cots.jsonl --out out/run/stage2

Stage 1's loop on other data. Training now sees the CoTs that prediction will see, so the judge learns what its own words are
worth. It starts from the seed, not from p_s, which has already learned to trust the annotator's words.
"""

import records
import runs
from runs import InputError
from stage1_train import fit_each, make_parser


def main() -> None:
    parser = make_parser(__doc__, stage=2)
    group = parser.add_argument_group("stage 2")
    group.add_argument("--keep-unfinished", action="store_true", help="also train on CoTs that never reached the suffix")
    group.add_argument("--continue-from-stage1", action="store_true", help="--model is p_s and this is meant (ablation A.4)")
    args = parser.parse_args()

    stage = runs.read_run(args.model).get("stage")
    if stage is not None and not args.continue_from_stage1:
        raise InputError(
            f"{args.model}: the checkpoint of stage {stage}, but stage 2 starts from the seed model; "
            "give that, or --continue-from-stage1 if you mean ablation A.4"
        )
    args.grid = records.choose_grid(args.grid, vars(args).pop("suffix"), args.model)
    all_records = records.read_records(args.data, grid=args.grid, need=("id", "prompt", "score", "cots", "finished"))
    if any("prediction" in record for record in all_records):
        raise InputError(f"{args.data}: these are predictions, not training data; make the file with gen_cot.py")

    def cots_of(record: dict) -> list[str]:
        pairs = zip(record["cots"], record["finished"], strict=True)
        return [cot for cot, finished in pairs if finished or args.keep_unfinished]

    unfinished = [r["id"] for r in all_records if len(cots_of(r)) < len(r["cots"])]
    fit_each(all_records, stage=2, cots_of=cots_of, unfinished=len(unfinished), **vars(args))
    runs.report(unfinished, "with a CoT left out because it did not reach the suffix (--keep-unfinished keeps it)")


if __name__ == "__main__":
    runs.run(main)
