"""LoRA and full fine-tuning, and the models that this code refuses because it would not follow them."""

import json
import shutil
import sys
from collections import defaultdict
from importlib import resources
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from huggingface_hub import constants, errors
from peft import LoraConfig, PeftModel, PolyConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tract import hub, models, runs
from tract.models import TINY_SEED
from tract.records import Grid, InputError
from tract.writing import load_judge


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
    assert not files & {"model.safetensors", *runs.PASSING}
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
    assert "the checkpoint of stage 1; give the seed, or p_s" in said
    # A.4: the adapter itself goes on, so that without a learning rate it stays as it is; or all weights do
    train += ["--model", adapter, "--continue-from-stage1", "--lr", 0]
    lab.run(*train, "--out", path / "a4", "--lora", 4)
    same = [(folder / "adapter_model.safetensors").read_bytes() for folder in (path / "a4", adapter)]
    assert same[0] == same[1]
    lab.run(*train, "--out", path / "full", "--full")
    for name, rank in (("a4", 4), ("full", None)):  # what goes on from them gets the defaults of the seed
        assert hub.origin(str(path / name), False) == (TINY_SEED, {"lora": rank, "four_bit": False})
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


def refused(folder, load=lambda name: models.load_model(name, torch.float32)) -> str:
    with pytest.raises(InputError) as error:
        load(str(folder))
    return str(error.value)


def save_adapter(lab, tokenizer, kind: type = LoraConfig, tied: bool = False, **config):
    """Save a base, and an adapter on it without a tokenizer of its own."""
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint(tokenizer, tie_word_embeddings=tied))
    adapter = get_peft_model(model, kind(task_type="CAUSAL_LM", **config))
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapter.save_pretrained(lab.path / "adapter")
    return lab.path / "adapter"


def to_train(rank: int | None):
    return lambda name: models.load_for_training(name, rank, False, bf16=True)


LORA = {"r": 4, "target_modules": ["q_proj"]}
ADAPTERS = [  # config, rank of the training (None: all weights), message
    ({"kind": PrefixTuningConfig, "num_virtual_tokens": 2}, 4, "(PREFIX_TUNING) depends on the prompt"),
    ({"kind": PolyConfig, "target_modules": ["q_proj"]}, 4, "task_ids should not be None"),
    (LORA | {"alora_invocation_tokens": [5]}, 4, "(LORA) depends on the prompt"),
    (LORA | {"target_modules": ["lm_head"], "tied": True}, None, "are tied; train it with --lora"),
    (LORA | {"modules_to_save": ["embed_tokens"], "tied": True}, None, "are tied; train it with --lora"),
    (LORA | {"lora_bias": True}, None, "its adapter can't be merged"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config, rank, message", ADAPTERS, ids=[message for *_, message in ADAPTERS])
def test_adapters_that_would_not_be_followed_are_refused(config, rank, message, lab, tiny_tokenizer):
    assert message in refused(save_adapter(lab, tiny_tokenizer, **config), to_train(rank))


def test_what_an_adapter_trains_beside_itself_is_fp32(lab, tiny_tokenizer):
    model = to_train(4)(str(save_adapter(lab, tiny_tokenizer, **LORA, modules_to_save=["lm_head"])))
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("lm_head" in name for name in trained) and {*trained.values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_scores_of_an_adapted_head_are_its_own(how, lab, tiny_tokenizer, capsys):
    """Read the adapter's logits, not those of the base, and say that they are rounded."""
    model = models.load_model(str(save_adapter(lab, tiny_tokenizer, **LORA | how)), torch.bfloat16)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        hidden, logits = model.get_decoder()(ids).last_hidden_state, model(ids).logits
        assert torch.equal(models.next_token_logits(model, hidden, torch.tensor([7, 8, 9])), logits.float())
    assert "--fp32 is exact" in capsys.readouterr().out


def test_an_adapter_goes_on_with_its_rank_and_the_tokenizer_of_its_base(lab, tiny_tokenizer):
    train = ["stage1_train", "--model", save_adapter(lab, tiny_tokenizer, **LORA)]
    train += [
        "--data",
        lab.write("few.jsonl", lab.rows[:2]),
        "--epochs",
        1,
        "--out",
        lab.path / "out",
        "--lora",
    ]
    code, said = lab.fail(*train, 16)
    assert code == 2 and "has adapters of rank 4" in said
    lab.run(*train)
    assert json.loads((lab.path / "out/run.json").read_text())["arguments"]["lora"] == 4


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:2\n"
SPOILT = [  # file → its new text, or what changes in its JSON; message
    ("adapter/adapter_model.safetensors", POINTER, "git lfs pull"),
    ("adapter/adapter_model.safetensors", None, "has no adapter_model"),
    ("seed/tokenizer.json", POINTER, "git lfs pull"),
    ("seed/model.safetensors", None, "can't be loaded"),
    (
        "seed/config.json",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantized model requires",
    ),
    ("seed/config.json", {"hidden_size": 64}, "can't be loaded"),
    ("seed/config.json", {"vocab_size": 55}, "token 55 is beyond the 55 embeddings"),
    ("seed/config.json", {"pad_token_id": 99}, "token 99 is beyond the 56 embeddings"),
    ("adapter/adapter_config.json", {"r": 5}, "size mismatch"),
    ("adapter/adapter_config.json", {"peft_type": "NEW"}, "(KeyError: 'NEW')"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": None}, "names no base"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": "/gone"}, "as its base /gone: neither"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": "adapter"}, "is an adapter itself"),
    ("adapter/adapter_config.json", "[1]", "adapter_config.json: is broken"),
    ("adapter/run.json", "[1]", "run.json: is broken"),
]


@pytest.mark.parametrize("name, change, message", SPOILT, ids=[message for *_, message in SPOILT])
def test_what_can_not_be_loaded_is_named_in_one_line(name, change, message, lab, tiny_tokenizer, monkeypatch):
    model, file = save_adapter(lab, tiny_tokenizer, **LORA), lab.path / name
    if isinstance(change, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    elif change is None:
        file.unlink()
    else:
        file.write_text(change)
    monkeypatch.chdir(lab.path)
    data = lab.write("few.jsonl", lab.rows[:2])
    code, said = lab.fail("predict", "--model", model, "--data", data, "--out", "out.jsonl")
    assert code == 2 and message in said.strip().splitlines()[-1]


def test_a_padding_token_without_embedding_is_never_used(lab, tiny_tokenizer):
    model, longer = lab.checkpoint(tiny_tokenizer), lab.rows[1] | {"cot": lab.rows[1]["cot"] + " right"}
    data = lab.write("few.jsonl", [lab.rows[0], longer])
    tokenizer = models.load_tokenizer(str(model))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    batch = ["--epochs", 1, "--batch-size", 2]
    lab.run("stage1_train", "--model", model, "--data", data, *batch, "--out", lab.path / "out")


WEB = [(errors.GatedRepoError, "accept its licence at https://huggingface.co/mistralai/Mistral-7B")]
WEB += [(errors.RepositoryNotFoundError, "neither a folder nor on the hub")]
WEB += [(errors.LocalEntryNotFoundError, "can't reach the hub")]


@pytest.mark.parametrize("kind, message", WEB, ids=[kind.__name__ for kind, _ in WEB])
def test_why_the_hub_does_not_give_a_model_is_said_before_data_is_fetched(kind, message, lab, monkeypatch):
    def fail(*_, **__):
        raise OSError("long\nexplanations") from kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("tract.examples.subprocess.run", lambda *_: pytest.fail("data is fetched"))
    code, said = lab.fail("stage1_train", "--model", "mistral-7b", "--out", lab.path / "out")
    assert code == 2 and message in said.strip().splitlines()[-1]


def publish(folder, name: str, cache) -> str:
    """Lay a folder out as the hub's cache has it; returns the hub id."""
    commit = cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, commit)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text(commit.name)
    return name


class FakeEngine:
    """Stand in for vllm.LLM: refuse what vLLM refuses, and write the same tokens again and again."""

    def __init__(self, max_model_len: int = 80, **options):
        self.options = options
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))

    def generate(self, texts, params, **_) -> list:
        assert all(
            len(text["prompt_token_ids"]) < self.llm_engine.model_config.max_model_len for text in texts
        )
        params = params if isinstance(params, list) else [params] * len(texts)
        answers = []
        for text, wish in zip(texts, params, strict=True):
            room = self.llm_engine.model_config.max_model_len - len(text["prompt_token_ids"])
            probs = defaultdict(lambda: SimpleNamespace(logprob=-2.0))
            assert 0 < wish.max_tokens <= room
            answers.append(SimpleNamespace(token_ids=[5] * wish.max_tokens, logprobs=[probs]))
        return [SimpleNamespace(outputs=[answer]) for answer in answers]


def test_vllm_is_asked_for_what_it_allows(lab, tiny_tokenizer, monkeypatch):
    """Leave out records that reach its max_model_len; ask for the next LoRA rank that it has."""
    vllm = SimpleNamespace(LLM=FakeEngine, SamplingParams=SimpleNamespace, __version__="0.32.0")
    modules = {"vllm": vllm}
    modules["vllm.lora.request"] = SimpleNamespace(LoRARequest=lambda *x: x)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = save_adapter(lab, tiny_tokenizer, **LORA | {"r": 20})
    judge = load_judge(str(model), Grid(), False, "vllm")
    assert judge.model.llm.options["max_lora_rank"] == 32 and judge.model.adapter[-1] == str(model)
    assert judge.model.llm.options["tokenizer"] == str(lab.path / "seed")
    judge = load_judge(str(model), Grid(), False, "vllm", [("hf_overrides", {"rope_theta": 1e6})])
    assert judge.model.llm.options["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1e6}
    long = lab.rows[3] | {"prompt": lab.rows[3]["prompt"] + " right" * 30}
    data, out = lab.write("few.jsonl", [*lab.rows[:3], long]), lab.path / "out.jsonl"
    lab.run("predict", "--model", model, "--data", data, "--engine", "vllm", "--out", out)
    assert len(lab.read("out.jsonl")) == 3
    assert json.loads((lab.path / "out.run.json").read_text())["vllm"] == "0.32.0"
    assert f"1 records left out, longer than 71 tokens: {long['id']}" in lab.capsys.readouterr().out
    lab.run("eval", out, "--resamples", 5, "--out", lab.path / "eval")
    assert "   1 more were too long to be judged\n" in lab.capsys.readouterr().out
    judge = ("gen_cot", "--model", model, "--data", data, "--out", out.with_name("cots"), "--engine", "vllm")
    assert "longer than" in lab.fail(*judge, "--engine-args", "max_model_len=10")[1]
    config = json.loads((model / "adapter_config.json").read_text())
    (model / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    assert "vLLM takes LoRA" in lab.fail(*judge)[1]


def test_a_judge_on_the_hub_has_its_grid_its_stage_and_its_adapter(lab, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(lab.path / "cache"))
    data, there = lab.write("few.jsonl", lab.rows[:4]), lab.path / "cache"
    seed = publish(TINY_SEED, "org/seed", there)
    train = ["--data", data, "--epochs", 1, "--lora", 4, "--lr", 0.01, "--grid", "1=0,2=50,5=100"]
    lab.run(
        "stage1_train",
        "--model",
        seed,
        *train,
        "--suffix",
        "the score is",
        "--no-cot",
        "--out",
        lab.path / "here",
    )
    judge = publish(lab.path / "here", "org/judge", there)
    for name, model in (("a", lab.path / "here"), ("b", judge)):
        lab.run("predict", "--model", model, "--data", data, "--no-cot", "--out", lab.path / f"{name}.jsonl")
    assert lab.read("a.jsonl") == lab.read("b.jsonl") and len(lab.read("b.jsonl")[0]["score_probs"][0]) == 3
    assert json.loads((lab.path / "b.run.json").read_text())["inputs"]["base revision"] == "0" * 40
    out = ("--data", data, "--out", lab.path / "out")
    assert "trained without CoTs" in lab.fail("gen_cot", "--model", judge, *out)[1]
    assert "the checkpoint of stage 1" in lab.fail("stage2_train", "--model", judge, *out)[1]
    assert "rank 4, on all linear" in " ".join(
        lab.fail("stage1_train", "--model", judge, "--help")[1].split()
    )


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
    assert "are its files whole" in refused(tmp_path / "m")
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
