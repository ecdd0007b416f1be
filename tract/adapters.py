"""PEFT adapters: load one, add LoRA, merge one into its base, a base in 4 bits."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from tract.hub import one_line, place_of, refusal
from tract.records import InputError

# peft still asks for a deprecated name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def load_adapter(name: str, base, trainable: bool):
    """Put an adapter on its base; refuse one that decoder and head alone do not follow. Raises InputError."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        folder = place_of(name)
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            what = f"its adapter ({config.peft_type.value}) depends on the prompt, or adds to it"
            raise InputError(f"{name}: {what}; only one that changes layers, as LoRA, is followed")
        if not any(Path(folder).glob("adapter_model.*")):
            raise InputError(f"{name}: has no adapter_model.safetensors; get that, too")
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable).eval()
        if get_peft_model_state_dict(model).keys() != load_peft_weights(folder).keys():
            raise ValueError("it does not fit its base")
    except Exception as error:  # peft can raise anything
        raise refusal(name, error) from None
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        print(f"{name}: adapts the head; with --bf16 its scores are rounded to bf16, --fp32 is exact")
    return model


def add_lora(model, rank: int):
    """Add fp32 adapters to all linear layers but the head, scaled by 2 (LLaMA-Factory); freeze the rest."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def merge(name: str, model):
    """Add an adapter to the weights of its base. Raises InputError where that would change others, too."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    changed = any(p.requires_grad for module in ends for p in module.parameters())
    if changed and model.config.get_text_config().tie_word_embeddings:
        raise InputError(f"{name}: changes the head or the embeddings, which are tied; train it with --lora")
    try:
        return model.merge_and_unload()
    except Exception as error:  # not all types can
        what = "its adapter can't be merged; train it with --lora"
        raise InputError(f"{name}: {what} ({one_line(error)})") from None


def four_bit_options(four_bit: bool, dtype: torch.dtype) -> dict:
    """Return what from_pretrained takes for a base in 4 bits; nothing where it is not. Raises InputError.

    This is QLoRA's NF4 (arXiv 2305.14314), 4.13 bits a weight of a linear layer; embeddings and head keep
    their dtype, and products are computed in it.
    """
    if not four_bit:
        return {}
    if find_spec("bitsandbytes") is None:
        raise InputError("--4bit: a base in 4 bits needs bitsandbytes; pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}
