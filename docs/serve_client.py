"""Judge records with a vLLM server: write a CoT, then read the score distribution (see docs/serving.md)."""

import json
import math
import sys
import urllib.request

from transformers import AutoTokenizer

from tract import encode, hub, records, runs, text


def complete(url: str, ids: list[int], **settings) -> dict:
    """Return what the server writes after token ids. Raises InputError."""
    body = json.dumps({"model": "judge", "prompt": ids, **settings}).encode()
    try:
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["choices"][0]
    except OSError as error:
        raise records.InputError(f"{url}: {error}; is a model named judge served there?") from None


def main() -> None:
    if len(sys.argv) != 4:
        raise records.InputError("give URL of the server, folder of the checkpoint and a file of records")
    url, folder, data = sys.argv[1:]
    trained = hub.training_arguments(folder)  # its run.json
    if not trained:
        raise records.InputError(f"{folder}: no run.json of this repository; give the --out of a training")
    if trained.get("no_cot"):
        raise records.InputError(
            f"{folder}: was trained without CoTs, which are asked for here; use predict.py"
        )
    if hub.is_four_bit(folder):
        raise records.InputError(
            f"{folder}: was trained on a base in 4 bits, served it is not; use predict.py"
        )
    grid = records.Grid.parse(trained["grid"], trained["suffix"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, score_ids = encode.score_tokens(tokenizer, grid)
    stop = grid.suffix.strip()
    # All that a model's generation_config.json might set otherwise
    sampling = {"temperature": 1, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.03, "max_tokens": 1024}
    wanted = {"logprobs": 1, "logprob_token_ids": score_ids, "return_tokens_as_token_ids": True}
    for record in records.read_records(data, grid):
        prompt = text.encode_prompt(tokenizer, record["prompt"])
        cot = complete(url, prompt, stop=stop, **sampling)
        # Prompt, CoT and suffix, as in training
        ids = encode.encode_prefix(tokenizer, prompt, cot["text"], grid)
        found = complete(url, ids, max_tokens=1, **wanted)["logprobs"]["top_logprobs"][0]
        probs = [math.exp(found[f"token_id:{id}"]) for id in score_ids]  # over the whole vocabulary
        record["prediction"], record["decoded"] = records.predicted([probs], grid)
        record |= {"cots": [cot["text"]], "finished": [cot["stop_reason"] == stop]}
        record |= {"score_probs": [probs], "off_grid": [1 - sum(probs)], "grid": str(grid)}
        print(runs.to_line(record), end="", flush=True)


if __name__ == "__main__":
    runs.run(main)
