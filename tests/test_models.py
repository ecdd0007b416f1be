"""LoRA and full fine-tuning, and the models that this code refuses because it would not follow them."""

import json
from importlib import resources

import pytest
import torch
from conftest import random_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
import runs
from models import TINY_SEED
from records import InputError


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_records, run_script):
    """Run stage 1 with LoRA and checkpointing: what goes into a block has no gradient of its own."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "train.jsonl").write_text("".join(map(runs.to_line, tiny_records[:60])))
    options = ["--data", folder / "train.jsonl", "--lora", 4, "--epochs", 2, "--lr", 0.01]
    run_script("stage1_train", *options, "--gradient-checkpointing", "--out", folder / "p_s")
    return folder / "p_s"


def test_an_adapter_is_an_ordinary_one_and_goes_through_the_other_stages(adapter, lab):
    files = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "tokenizer.json"} <= files
    assert not files & {"model.safetensors", "README.md", *runs.PASSING}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert len({name.split(".")[-1] for name in config["target_modules"]}) == 7
    ids, seed = torch.arange(5, 29).view(2, 12), AutoModelForCausalLM.from_pretrained(TINY_SEED)
    with torch.no_grad():
        before, ours = seed(ids).logits, models.load_model(str(adapter), torch.float32)(ids).logits
        torch.testing.assert_close(PeftModel.from_pretrained(seed, adapter).eval()(ids).logits, ours)
    assert (ours - before).abs().max() > 0.1  # it has learned something

    cots, path = lab.path / "cots.jsonl", lab.path
    lab.run("gen_cot", "--model", adapter, "--data", adapter.parent / "train.jsonl", "--out", cots)
    train = ["stage2_train", "--data", cots, "--epochs", 1, "--keep-unfinished"]
    said = lab.fail(*train, "--model", adapter, "--out", path / "a4")[1]
    assert "stage 2 starts from the seed model" in said
    # A.4: the adapter itself goes on, so that without a learning rate it stays as it is; or all weights do
    train += ["--model", adapter, "--continue-from-stage1", "--lr", 0]
    lab.run(*train, "--out", path / "a4", "--lora", 4)
    same = [(folder / "adapter_model.safetensors").read_bytes() for folder in (path / "a4", adapter)]
    assert same[0] == same[1]
    lab.run(*train, "--out", path / "full", "--full")
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(path / "full")(ids).logits
    torch.testing.assert_close(full, ours, atol=1e-4, rtol=1e-4)


def test_what_is_trained_is_fp32_and_nothing_else_is_trained(tiny_tokenizer, tmp_path):
    random_model(tiny_tokenizer).save_pretrained(tmp_path)
    lora = models.load_for_training(str(tmp_path), 8, False, bf16=True)
    trained = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.dtype == torch.bfloat16 for name, p in lora.named_parameters() if name not in trained)
    # Adapters see what autocast made: peft's own cast to fp32, undone by autocast, is turned off
    assert not any(getattr(module, "cast_input_dtype_enabled", False) for module in lora.modules())
    full = models.load_for_training(str(tmp_path), None, False, bf16=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())


def refused(folder) -> str:
    with pytest.raises(InputError) as error:
        models.load_model(str(folder), torch.float32)
    return str(error.value)


def test_broken_checkpoints_are_refused(tiny_tokenizer, adapter, tmp_path):
    random_model(tiny_tokenizer, tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    weights = load_file(file)
    head = weights.pop("lm_head.weight")
    save_file(weights, file, {"format": "pt"})
    assert "lacks weights (lm_head.weight)" in refused(tmp_path / "m")
    save_file(weights | {"lm_head.weight": head * torch.nan}, file, {"format": "pt"})
    assert "logits that are not finite" in refused(tmp_path / "m")
    file.write_bytes(file.read_bytes()[:-100])
    assert "weights can't be loaded" in refused(tmp_path / "m")
    lora = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file({f"other.{name}": x for name, x in lora.items()}, tmp_path / "a/adapter_model.safetensors")
    assert "does not fit its base" in refused(tmp_path / "a")


STATE, HEAD = "keeps more than keys and values", "scales or caps its logits"
WIDE = {"head_dim": 8, "sliding_window": 8}
KINDS = [(kind, {}, None) for kind in ("llama", "gpt2", "gpt_neox", "bloom", "falcon", "olmo2", "granite")]
KINDS += [(kind, {"pad_token_id": 0}, None) for kind in ("phi3", "smollm3")]
KINDS += [(kind, WIDE, None) for kind in ("qwen3", "gemma3_text")]
KINDS += [("gemma2", WIDE | {"final_logit_softcapping": 3.0}, HEAD), ("cohere", {"logit_scale": 0.1}, HEAD)]
KINDS += [("lfm2", {"layer_types": ["full_attention", "conv"]}, STATE), ("mamba", {"state_size": 4}, STATE)]
KINDS += [("qwen3_next", {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}, STATE)]


@pytest.mark.parametrize("kind, config, message", KINDS, ids=[kind for kind, *_ in KINDS])
def test_models_that_would_not_be_followed_are_refused(kind, config, message, tiny_tokenizer, tmp_path):
    random_model(tiny_tokenizer, model_type=kind, **config).save_pretrained(tmp_path)
    if message is None:
        assert models.load_model(str(tmp_path), torch.float32).config.model_type == kind
    else:
        assert message in refused(tmp_path)


def test_thinking_is_off_in_every_stage_and_noted(lab, gpt2_tokenizer, monkeypatch):
    template = (resources.files("trl") / "chat_templates/qwen3.jinja").read_text("utf-8")
    monkeypatch.setattr(gpt2_tokenizer, "chat_template", template)
    data, model = lab.write("few.jsonl", lab.rows[:4]), lab.checkpoint(gpt2_tokenizer)
    lab.run("stage1_train", "--model", model, "--data", data, "--epochs", 1, "--out", lab.path / "p_s")
    judge = ("--model", lab.path / "p_s", "--data", data, "--max-new-tokens", 2)
    lab.run("predict", *judge, "--out", lab.path / "judged.jsonl")
    for name in ("p_s/run.json", "judged.run.json"):
        assert json.loads((lab.path / name).read_text())["enable_thinking"] is False
