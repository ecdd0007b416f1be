"""Write CoTs and read scores with vLLM; tract/writing.py loads this file for --engine vllm alone.

vLLM batches by itself and spreads a model over GPUs and machines (--engine-args tensor_parallel_size=4).
Token ids go in as training encodes them, with the sampling settings, the suffix as a stop and a seed for each
CoT. CoTs differ from those of writing.py, for vLLM draws other random numbers; the scores of a CoT do not.
"""

import math
from collections.abc import Iterator

from loss import Rail
from tract import hub, runs
from tract.records import InputError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has room for


class Engine:
    """Stand in for a model in writing.Loaded; the adapter of a LoRA folder goes along with every request."""

    def __init__(self, name: str, tokenizer, bf16: bool, options: dict):
        """Load a model; vLLM's `max_model_len` limits the tokenizer's positions. Raises InputError."""
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            remedy = "pip install vllm, in an environment of its own, then requirements.txt without torch"
            raise InputError(f"--engine vllm: {error}; {remedy}") from None
        if hub.is_four_bit(name):
            raise InputError(f"{name}: was trained on a base in 4 bits; use --engine torch")
        base = hub.base_of(name)
        self.adapter = None
        if base:
            config = hub.read(name, "adapter_config.json")
            rank = max([config.get("r", 0), *config.get("rank_pattern", {}).values()])
            rooms = [room for room in LORA_RANKS if room >= rank]
            if config.get("peft_type") != "LORA" or not rooms:
                raise InputError(f"{name}: vLLM takes LoRA of rank 512 or less; use --engine torch")
            options = {"enable_lora": True, "max_lora_rank": rooms[0]} | options
            self.adapter = LoRARequest("adapter", 1, hub.place_of(name))
        defaults = {"dtype": "bfloat16" if bf16 else "float32", "tokenizer": tokenizer.name_or_path}
        fp32_head = {"head_dtype": "float32"}  # bf16 would round the logits of the scores
        options = options | {"hf_overrides": fp32_head | options.get("hf_overrides", {})}
        try:
            self.llm = LLM(model=hub.resolve(base or name), **defaults | options)
        except Exception as error:  # vLLM can raise anything
            raise hub.refusal(f"--engine vllm: {name}", error) from None
        limit = self.llm.llm_engine.model_config.max_model_len - 1  # which it has to be left to write
        tokenizer.positions = min(tokenizer.positions, limit)

    def run(self, texts: list[list[int]], params) -> list:
        prompts = [{"prompt_token_ids": ids} for ids in texts]
        try:
            return self.llm.generate(prompts, params, lora_request=self.adapter, use_tqdm=False)
        except ValueError as error:
            raise InputError(f"--engine vllm: {hub.one_line(error)}") from None

    def write(self, judge, prompts: list[list[int]], names: list[str], args) -> Iterator[tuple]:
        """Sample a CoT for each name, as writing.write does, but yield no scores with it."""
        from vllm import SamplingParams

        room = judge.tokenizer.positions - len(judge.suffix_ids) - 2  # they, score and end have to fit
        texts = [prompts[row // args.num_cots] for row in range(len(names))]
        params = []
        for name, text in zip(names, texts, strict=True):
            settings = SamplingParams(
                temperature=args.temperature,
                top_p=args.top_p,
                repetition_penalty=args.repetition_penalty,
                max_tokens=min(args.max_new_tokens, room - len(text)),
                stop=[judge.grid.suffix.strip()],
                include_stop_str_in_output=True,
                seed=runs.seed_of(name) >> 31,  # of which vLLM takes 32 bits
            )
            params.append(settings)
        for row, answer in enumerate(self.run(texts, params)):
            yield row, list(answer.outputs[0].token_ids), None

    def score(self, judge, texts: list[list[int]]) -> list[Rail]:
        """Read the score distribution after each text, over the whole vocabulary, as writing.score does."""
        from vllm import SamplingParams

        ids = judge.score_tensors["score_ids"].tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=ids)
        rails = []
        for answer in self.run(texts, params):
            logprobs = answer.outputs[0].logprobs[0]
            probs = [math.exp(logprobs[id].logprob) for id in ids]
            expected = sum(p * value for p, value in zip(probs, judge.grid.values, strict=True))
            rails.append(Rail(expected, 1 - sum(probs), probs))
        return rails
