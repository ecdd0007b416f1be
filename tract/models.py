"""Load a model and its tokenizer, run its decoder and head; refuse what these can't follow."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from tract.adapters import add_lora, four_bit_options, load_adapter, merge
from tract.hub import base_of, folder_of, is_four_bit, one_line, place_of, refusal, resolve
from tract.records import ROOT, Grid, InputError
from tract.text import encode_prompt

logging.set_verbosity_error()  # its tracebacks and hints would bury our one line
logging.disable_progress_bar()

TINY_SEED = str(ROOT / "data/tiny/seed")  # the seed model of the embedded task


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(bf16: bool) -> torch.autocast:
    """Compute matrix products in bf16, if so asked. No autocast cache: each weight is used once per pass."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def has_bf16() -> bool:
    """Tell whether a GPU computes in bf16 itself; most CPUs do so slowly, so they get fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def load_tokenizer(name: str):
    """Load a tokenizer; its `positions` are the tokens that the model was made for. Raises InputError."""
    folder = folder_of(name)
    base = base_of(name)
    if Path(name).is_dir() and not base and not (folder / "config.json").is_file():
        raise InputError(f"{name}: a folder without config.json; give the --out of a training stage")
    borrows = base and not (folder / "tokenizer_config.json").is_file()
    try:
        config = AutoConfig.from_pretrained(resolve(base or name), trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(place_of(base if borrows else name))
    except Exception as error:  # transformers can raise anything
        raise refusal(name, error) from None
    tokenizer.positions = getattr(config, "max_position_embeddings", None) or 10**9
    check_ids(name, tokenizer, config)
    if not tokenizer.chat_template:
        print(f"{name}: no chat template; prompts are given as they are, with a newline after them")
    return tokenizer


def check_ids(name: str, tokenizer, config) -> None:
    """Refuse token ids beyond the embeddings, but for added tokens that nothing ever writes."""
    added = tokenizer.added_tokens_decoder
    ids = [id for id in tokenizer.get_vocab().values() if id not in added]
    ids += [*encode_prompt(tokenizer, "a"), tokenizer.eos_token_id or 0, config.pad_token_id or 0]
    if max(ids) >= config.vocab_size:
        what = f"token {max(ids)} is beyond the {config.vocab_size} embeddings of the model"
        raise InputError(f"{name}: {what}; give it the tokenizer and the pad_token_id that it came with")


def load_model(name: str, dtype: torch.dtype, trainable: bool = False, four_bit: bool = False):
    """Load a causal language model, or an adapter (in fp32) on its base, in eval mode. Raises InputError.

    four_bit: the base in 4 bits, as that of an adapter which was trained so always is.
    """
    base = base_of(name)
    if base:
        base_model = load_model(base, dtype, four_bit=four_bit or is_four_bit(name))
        model = load_adapter(name, base_model, trainable)
    else:
        model = load_base(name, dtype, four_bit)
    try:
        check_model(name, model)
    except InputError:
        raise
    except Exception as error:  # models can raise anything
        if base:  # which has passed by itself: it is the adapter that fails
            raise refusal(name, error) from None
        what = "keeps more than keys and values; choose another model"
        raise InputError(f"{name}: {what} ({one_line(error)})") from None
    return model


def load_base(name: str, dtype: torch.dtype, four_bit: bool):
    """Load a model with all its weights. Raises InputError."""
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options |= four_bit_options(four_bit, dtype)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(resolve(name), **options)
        model = model.to(device()).eval()
    except Exception as error:  # transformers can raise anything
        raise refusal(name, error) from None
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise InputError(f"{name}: lacks weights ({', '.join(missing[:3])}); give a causal language model")
    if four_bit and not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise InputError(f"{name}: has no layer that could be in 4 bits; leave out --4bit")
    return model


@torch.no_grad()
def check_model(name: str, model) -> None:
    """Raise an error where our head, padding or cache would give other logits than the model itself."""
    ids = torch.arange(1, 6, device=device())[None]
    logits = model(ids).logits[0]
    if not logits.isfinite().all():
        what = "its weights give logits that are not finite"
        raise InputError(f"{name}: {what}; get the files anew, or train with a lower --lr")
    by_our_head = head(model, model.get_decoder()(ids).last_hidden_state)[0]
    if not torch.allclose(by_our_head, logits, rtol=1e-2, atol=1e-2):
        raise InputError(f"{name}: scales or caps its logits after the head; choose another model")
    cache = DynamicCache()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]], device=device())
    decode(model, cache, F.pad(ids, (2, -1)), mask[:, :-1])  # two of padding, all but the last token
    by_our_cache = head(model, decode(model, cache, ids[:, -1:], mask))[0, -1]
    close = 1e-2 if logits.dtype == torch.float32 else 0.05 * float(logits.abs().max())  # bf16 rounds
    if not torch.allclose(by_our_cache, logits[-1], atol=close):
        raise ValueError("its logits differ where its text is padded and cached")


def decode(model, cache: DynamicCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Append `ids` (B, N) to the cache and return their hidden states (B, N, D), without the head.

    mask (B, T + N) is 1 where there is text, in the cache and in `ids`; all padding is on the left.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    return model.get_decoder()(input_ids=ids, **options).last_hidden_state


def score_tensors(score_ids: list[int], grid: Grid) -> dict[str, Tensor]:
    """Return the score tokens as the loss takes them: score_ids (S,) and score_values (S,)."""
    values = torch.tensor(grid.values, device=device())
    return {"score_ids": torch.tensor(score_ids, device=device()), "score_values": values}


def head(model, hidden_states: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden_states)  # (..., D) → (..., V)


def next_token_logits(model, hidden_states: Tensor, score_ids: Tensor) -> Tensor:
    """Return the logits of positions that may predict a score, (..., D) → (..., V), in fp32.

    A logit near 30 has steps of .125 in bf16: likely scores would tie, and their expectation be blurred. So
    the columns of the score tokens are multiplied in fp32 once more. The other tokens only enter the sum of
    the softmax, where the rounding of many averages out.
    """
    layer = model.get_output_embeddings()
    logits = layer(hidden_states)
    is_rounded = logits.dtype != torch.float32
    logits = logits.float()
    if is_rounded and isinstance(layer, torch.nn.Linear):  # one that an adapter wraps stays rounded
        with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
            weight = layer.weight[score_ids].float()  # (S, D)
            bias = None if layer.bias is None else layer.bias[score_ids].float()
            # .data: the values alone are replaced, the gradient goes through the product above
            logits.data[..., score_ids] = F.linear(hidden_states.float(), weight, bias)
    return logits


def load_for_training(
    name: str, lora_rank: int | None, checkpointing: bool, bf16: bool, four_bit: bool = False
):
    """Load a model with what is to be trained in fp32: at lr 1e-5, weights in bf16 would not move at all.

    lora_rank: train adapters on a frozen base, kept in bf16 if `bf16`; an adapter folder goes on with its
    own. None: train all weights, an adapter's added to its base's. checkpointing: recompute activations.
    four_bit: keep the linear layers of the base in 4 bits.
    """
    dtype = torch.bfloat16 if lora_rank and bf16 else torch.float32
    model = load_model(name, dtype, trainable=True, four_bit=four_bit)
    is_adapter = hasattr(model, "peft_config")
    if lora_rank is None:
        if is_adapter:
            model = merge(name, model)
        if getattr(model, "is_quantized", False):
            raise InputError(f"{name}: its weights are quantised, which --full can't train; use --lora 8")
        model.requires_grad_(True)
    elif not is_adapter:
        model = add_lora(model, lora_rank)
    for weight in model.parameters():
        if weight.requires_grad:  # an adapter folder may train whole layers, too, or biases
            weight.data = weight.data.float()
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Turn off peft's fp32 cast of adapter inputs: autocast would undo it and keep a copy per layer
            module.cast_input_dtype_enabled = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()
