"""Stage 3: p_tract writes CoTs; those after which it judged better are reinforced (REAL, arXiv 2603.17145).

    python stage3_train.py --model out/run/stage2 --data train.jsonl --valid valid.jsonl --out out/run/stage3

It takes stage 1's steps, on K CoTs (--num-cots) that the model in training writes itself for each prompt x.
The CE of CoT i is weighted by A_i: its reward −(ŷ_i − y*)² less the mean of its siblings' (`advantages` in
loss.py). The squared error flows through the expected score ŷ_i after it, as ever:

    1/K Σ_i (−A_i log p(CoT_i | x) + β (ŷ_i − y*)²)        cot_raft_loss with the weights A, and λ = β

With β = 1 and the default --reward and --advantage, its gradient is an unbiased estimate of ∇ E[(ŷ − y*)²]
over the model's own CoTs. For that they have to be drawn from p itself: temperature, top_p and repetition
penalty are 1 by default. REAL's reward also has a multiple of log p(y* | x, CoT), here left out. Before,
after and every 10 steps held-out records (--valid) are judged on CoTs of the model's own; --out gets the
weights with the lowest RMSE there, maybe those before training. Without --valid it gets the last.
"""

import time
from pathlib import Path
from statistics import mean

import torch

from loss import advantages
from stage1_train import DEFAULTS, take_step
from tract import curves, hub, models, rollout, runs, training
from tract.encode import Example
from tract.examples import check_training_options, print_memory
from tract.options import choose_grid
from tract.records import InputError
from tract.runs import Fault
from tract.writing import Cot, Loaded, load_judge, random_numbers

# Options of cot_raft_loss: CE is summed over each CoT, and the score's position has none
LOSS = {"ce_sum": True, "score_ce": "none", "penalty": "squared", "ce_weight": 1.0, "score_weight": None}


def rewards_of(args, step: int, prompt: Example, cots: list[Cot]) -> torch.Tensor:
    """Return what each CoT of a prompt has earned, (K,)."""
    if args.reward == "random":  # a control: to reinforce CoTs at random teaches nothing
        return random_numbers(f"{args.seed}/{step}/{prompt.id}/reward", len(cots))
    if args.reward == "exact":
        likeliest = torch.tensor([cot.scores.probs for cot in cots]).argmax(-1)
        return (likeliest == args.grid.nearest(prompt.score)).float()
    return -(torch.tensor([cot.scores.expected for cot in cots]) - prompt.score).square()


def examples_of(prompt: Example, cot: Cot, advantage: float) -> list[Example]:
    """Return what to train on for a CoT: A weighs all tokens that were sampled, and none that was forced."""
    start = len(prompt.ids)
    end = len(cot.ids)  # cot.ids: prompt, CoT and suffix
    # Any token will do as the score, 0 here: only its distribution is looked at
    scored = prompt._replace(ids=[*cot.ids, 0], start=end, score_position=end)
    if cot.ids[start:] == cot.sampled:
        return [scored._replace(start=start, weight=advantage)]
    # The suffix was forced, or the text is encoded otherwise than it was sampled: what was sampled becomes an
    # example of its own. Its score_position lies past its end, so it has no score
    sampled = [*prompt.ids, *cot.sampled]
    policy = prompt._replace(ids=sampled, start=start, score_position=len(sampled), weight=advantage)
    return [policy, scored]


def write_window(args, judge: Loaded, prompts: list[Example], step: int) -> tuple[list[Example], dict]:
    """Return the examples of a step, and what its line in log.jsonl says of their CoTs."""
    groups = rollout.write_own(args, judge, prompts, step, args.num_cots)
    window = []
    rewards = []
    absolute = []  # |A| of each CoT
    for prompt, cots in zip(prompts, groups, strict=True):
        rewards_of_prompt = rewards_of(args, step, prompt, cots)  # (K,)
        rewards += rewards_of_prompt.tolist()
        advantages_of_prompt = advantages(rewards_of_prompt, args.advantage).tolist()
        for cot, advantage in zip(cots, advantages_of_prompt, strict=True):
            window += examples_of(prompt, cot, advantage)
            absolute.append(abs(advantage))
    return window, {"reward": mean(rewards), "advantage": mean(absolute), **rollout.facts_of(groups)}


def train(args, judge: Loaded, plan: list, held_out: list[Example], folder: Path) -> dict:
    """Take a step for each list of prompts in the plan; leave the best weights in the model, return facts."""
    model = judge.model
    # No schedule is stepped, and warmup is 0 (rollout.py): the learning rate stays --lr
    optimiser, schedule = training.make_optimiser(model, args, args.steps)
    loss_options = judge.score_tensors | LOSS | {"lam": args.lam}  # λ = β
    with training.Journal(args, folder, model, optimiser, schedule, args.steps) as journal:
        log = curves.read_log(folder) if journal.done else []
        # The initial weights, or those of a step that was killed before its own keep_best
        rollout.keep_best(folder, model, journal.done, log, held_out)
        for step, prompts in journal.remaining(plan):
            window, facts = write_window(args, judge, prompts, step)
            if held_out and step == 1:
                facts["valid_before"] = rollout.evaluate(args, judge, held_out)
            loss_options["n_sequences"] = len(prompts) * args.num_cots  # some CoTs are two examples
            line = {"step": step, **take_step(model, window, loss_options, optimiser, args), **facts}
            if held_out and (step % rollout.EVERY == 0 or step == args.steps):
                line["valid"] = rollout.evaluate(args, judge, held_out)
            log.append(line)
            rollout.say_collapse(log, journal.bar.write)
            journal.end_step(window, line)
            rollout.keep_best(folder, model, step, log, held_out)
    rollout.check_weights(args, judge, plan[-1])  # without --valid nothing has tried the last ones yet
    return rollout.load_best(folder, model, log)


def main() -> None:
    args = rollout.read_options(__doc__, DEFAULTS, LOSS)  # LOSS goes into args, too, where shared code looks
    started = time.time()
    if torch.distributed.is_torchelastic_launched():
        raise InputError("stage 3 runs in one process: start it with python, not with torchrun")
    if hub.training_arguments(args.model).get("stage") != 2:
        raise InputError(f"{args.model}: stage 3 starts from p_tract; give the --out of stage 2")
    args.grid = choose_grid(args)  # p_tract's
    check_training_options(args)
    tokenizer = models.load_tokenizer(args.model)
    prompts = rollout.load_prompts(args, args.data, tokenizer)
    held_out = rollout.load_prompts(args, args.valid, tokenizer)  # [] without --valid
    print(f"{len(prompts)} prompts, {len(held_out) or 'none'} held out; {args.steps} steps")
    plan = rollout.plan_steps(prompts, args.prompts, args.steps, args.seed)  # args.prompts: how many a step
    folder, settings, _lock = training.begin(args)  # the lock is held until the end
    torch.manual_seed(args.seed)
    checkpointing = args.gradient_checkpointing
    model = models.load_for_training(args.model, args.lora, checkpointing, args.bf16, args.four_bit)
    print_memory(model)
    judge = load_judge(args.model, args.grid, args.bf16, model=model)
    try:
        facts = train(args, judge, plan, held_out, folder)
    except torch.OutOfMemoryError:
        raise Fault(f"{folder}: out of memory; lower --batch-size or --max-new-tokens") from None
    training.save_checkpoint(args, model, tokenizer, folder, settings, started, facts)


if __name__ == "__main__":
    runs.run(main)
