"""The model: loading it, LoRA, and how much memory training it will take. The one place that knows about either."""

import os
import resource
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import records
from runs import InputError

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still asks for it
transformers_logging.set_verbosity_error()  # its tracebacks and hints would bury our one line
transformers_logging.disable_progress_bar()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16() -> bool:
    """bf16 where the hardware computes in it; on a CPU it is mostly slower, so fp32 there."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def peak_memory() -> int:
    """Bytes: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------ loading


def resolve(name: str) -> str:
    """What `--model NAME` stands for: an alias is a hub id, a folder is its absolute path (adapters remember it)."""
    name = records.MODELS.get(name, str(name))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_tokenizer(name: str):
    """Tokenizer of an alias, a checkpoint folder or a hub id. Raises InputError where there is none."""
    name = resolve(name)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise InputError(f"{name}: a folder, but no checkpoint (no config.json in it); give the --out of a training stage")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: neither a checkpoint folder nor a model that can be had from the hub; known names are "
            f"{', '.join(records.MODELS)} ({str(error).splitlines()[0][:120]})"
        ) from None
    if not tokenizer.chat_template:
        print(f"{name}: no chat template; prompts are given as they are, with a newline after them")
    return tokenizer


def base_of(name: str) -> str | None:
    """The base model of a folder with a LoRA adapter; None for any other model."""
    if not (Path(resolve(name)) / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(resolve(name)).base_model_name_or_path


def load_model(name: str, *, dtype: torch.dtype, trainable: bool = False):
    """Causal language model of an alias, a checkpoint or adapter folder, or a hub id, on the device, in eval mode.

    An adapter is loaded on top of its base, in fp32 whatever the base is in, and can be trained further if `trainable`.
    """
    if base := base_of(name):
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(base, dtype=dtype), resolve(name), is_trainable=trainable).eval()
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, use_safetensors=True).to(device()).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: its weights can't be loaded ({str(error).splitlines()[0][:160]})") from None
    # The loss applies the head to supervised rows alone; that is the whole model only if nothing comes after the head.
    ids = torch.arange(3, device=device())[None]
    with torch.no_grad():
        if not torch.allclose(head(model, model.get_decoder()(ids).last_hidden_state), model(ids).logits, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"{name}: scales or caps its logits after the head, which this code does not follow; choose another"
            )
    return model


# Logits that training holds at a time: 64 MiB in fp32, and with what the loss makes of them four times that
LOGITS = 2**24


def head(model, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden)  # (..., D) → (..., V)


def checkpoint_activations(model) -> None:
    """Keep only what goes into each block, and compute the rest again in the backward pass."""
    # Two names of one method: transformers renamed it after 5.17
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_blocks(model) -> None:
    """torch.compile for the training of each block: all are alike, so one is compiled, once."""
    for block in model.get_decoder().layers:
        block.compile(dynamic=True)


# --------------------------------------------------------------------------------------------------------- LoRA


class Lora(NamedTuple):
    """Low-rank adapters on all linear layers but the head; the defaults are the paper's."""

    rank: int = 8
    alpha: int = 16


def load_for_training(name: str, lora: Lora | None):
    """The model with what is to be trained in fp32: at lr 1e-5, weights in bf16 would not move at all.

    With LoRA the base is frozen, in bf16 where there is bf16, and only the adapters are trained; an adapter folder goes on
    with its own. Without LoRA all weights are trained, an adapter's having been added to its base.
    """
    if lora is None:
        model = load_model(name, dtype=torch.float32)
        model = model.merge_and_unload() if base_of(name) else model
        return model.requires_grad_(True)
    model = load_model(name, dtype=torch.bfloat16 if has_bf16() else torch.float32, trainable=True)
    return cast_by_autocast(model) if base_of(name) else with_adapters(model, lora)


def with_adapters(model, lora: Lora):
    """The model, to be trained, with fresh adapters in fp32, which change nothing yet; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    linear = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return cast_by_autocast(get_peft_model(model, linear))


def cast_by_autocast(model, yes: bool = True):
    """Keep peft from casting what its adapters see to fp32, only for autocast to cast it back to bf16.

    The numbers are the same; but else every layer would make, and keep for its backward pass, a copy of its own.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = not yes
    return model


def merged(name: str):
    """The model of an adapter folder with the adapter added to its weights, in fp32 on the CPU.

    Not in bf16: an update much smaller than a weight would be rounded away, as it would in training.
    """
    return load_model(name, dtype=torch.float32).cpu().merge_and_unload()


# ------------------------------------------------------------------------------------------------- will it fit?


class Memory(NamedTuple):
    """Bytes that training is expected to take at its peak, by what takes them."""

    weights: int
    gradients: int
    optimiser: int  # AdamW's two moments
    activations: int  # of one micro-batch, kept for its backward pass
    working: int  # what the loss makes of the logits that it takes at a time or, if that is more, what a block recomputes

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in self._asdict().items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def empty_model(name: str):
    """The model's shapes without its weights: needs its config only. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(resolve(base_of(name) or name))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: its config can't be read ({str(error).splitlines()[0][:160]})") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def expected_memory(
    name: str, lora: Lora | None, *, sequences: int, length: int, supervised: int, bf16: bool, gradient_checkpointing: bool
) -> Memory:
    """What a training step takes on a micro-batch of `sequences` × `length` tokens with `supervised` rows.

    An estimate from the shapes alone, for the blocks of Llama, Mistral and their like: RMSNorm, attention that stores no
    matrix of scores, a gated MLP. bench/memory.py compares it with what was measured.
    """
    model = empty_model(name)
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    trained = sum((m.in_features + m.out_features) * lora.rank for m in linear) if lora else parameters

    compute = 2 if bf16 else 4  # bytes of a number in the matrix products
    stream = compute if lora else 4  # of one between the blocks: weights in fp32 make it fp32
    layers, h, m = config.num_hidden_layers, config.hidden_size, getattr(config, "intermediate_size", None)
    m = m or 4 * h  # GPT-2 and its like do not say
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or h // heads
    q, kv = heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width
    # What a block keeps for its backward pass, bytes a token: each norm its input, in fp32, and for its own weight what it
    # made of that; attention its q, k, v and output; the MLP gate, its activation, up and their product
    block = 2 * 4 * h * (1 if lora else 2) + compute * (2 * q + 2 * kv + 4 * m)
    # and what the layers (with LoRA the adapters) see, which each casts for itself if the stream is in fp32 and they in bf16
    block += compute * h * (5 if compute < stream else 2)
    kept = layers * (stream * h if gradient_checkpointing else block)
    if bf16 and not lora and not gradient_checkpointing:  # the bf16 copies of the weights
        kept += 2 * sum(layer.weight.numel() for layer in linear) // (sequences * length)
    # The logits in fp32, their log-softmax, and the gradients before and after it; beside them the head's weights in bf16
    logits = min(supervised, max(1, LOGITS // config.vocab_size)) * config.vocab_size * 16
    logits += 2 * config.vocab_size * h if bf16 and not lora else 0
    return Memory(
        weights=parameters * (compute if lora else 4) + (4 * trained if lora else 0),
        gradients=4 * trained,
        optimiser=8 * trained,
        activations=sequences * length * kept,
        working=max(logits, sequences * length * block if gradient_checkpointing else 0),
    )


def memory_there() -> int:
    """Bytes of memory that the device has, or the machine where there is no device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rows_that_fit(model, length: int) -> int:
    """As many sequences of `length` tokens as can be generated at once with the memory that is free; on a CPU 32.

    A sequence takes its keys and values, twice while rows are moved, and the logits with what sampling makes of them.
    """
    if not torch.cuda.is_available():
        return 32
    config, size = model.config.get_text_config(), next(model.parameters()).element_size()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    row = 2 * length * cache * size + 24 * config.vocab_size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, min(512, int(0.8 * free) // row))
