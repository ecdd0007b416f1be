"""LoRA and full fine-tuning, and whether the memory they take is what was said."""

import json
from functools import partial

import machine
import pytest
import torch
import workload
from conftest import random_model
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

import models
import records
import runs
import stage1_train
from bench import memory
from models import Lora
from records import Example


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_records, run_script):
    """Stage 1 with LoRA on the embedded task, merged as well."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "train.jsonl").write_text("".join(map(runs.to_line, tiny_records[:60])))
    options = ["--lora", "--merge", "--lora-rank", 4, "--epochs", 2, "--lr", 0.01, "--eval-size", 2]
    run_script("stage1_train", "--data", folder / "train.jsonl", "--out", folder / "p_s", *options)
    return folder / "p_s"


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_adapter_is_an_ordinary_one_and_agrees_with_the_merged_model(adapter, run_script, tmp_path):
    files = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "tokenizer.json"} <= files
    assert not files & {"model.safetensors", "README.md", "state.pt"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.0)
    assert {name.split(".")[-1] for name in config["target_modules"]} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }

    # Without us: peft on the seed model, transformers on the merged one
    ids = torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    seed = AutoModelForCausalLM.from_pretrained(records.TINY_SEED)
    with torch.no_grad():
        before = seed(ids).logits
        ours = models.load_model(str(adapter), dtype=torch.float32)(ids).logits
        torch.testing.assert_close(PeftModel.from_pretrained(seed, adapter).eval()(ids).logits, ours)
        merged = AutoModelForCausalLM.from_pretrained(adapter / "merged")(ids).logits
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-4)
    assert (ours - before).abs().max() > 0.1  # it has learned something

    data = adapter.parent / "train.jsonl"
    for name, model in (("adapter", adapter), ("merged", adapter / "merged")):
        run_script("predict", "--model", model, "--data", data, "--given", "cot", "--out", tmp_path / f"{name}.jsonl")
    for a, m in zip(rows_of(tmp_path / "adapter.jsonl"), rows_of(tmp_path / "merged.jsonl"), strict=True):
        assert a["prediction"] == pytest.approx(m["prediction"], abs=1e-4)


def test_an_adapter_goes_through_the_other_stages(adapter, run_script, tmp_path, capsys):
    cots, data = tmp_path / "cots.jsonl", adapter.parent / "train.jsonl"
    run_script("gen_cot", "--model", adapter, "--data", data, "--out", cots)
    train = ["--data", cots, "--epochs", 1, "--lora", "--lora-rank", 4, "--keep-unfinished"]
    run_script("stage2_train", "--model", records.TINY_SEED, "--out", tmp_path / "p_tract", *train)
    assert (tmp_path / "p_tract/adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit):
        run_script("stage2_train", "--model", adapter, "--out", tmp_path / "a4", *train)
    assert "stage 2 starts from the seed model" in capsys.readouterr().err
    # A.4: the adapter of p_s itself goes on, so that without a learning rate it stays as it is
    run_script("stage2_train", "--model", adapter, "--out", tmp_path / "a4", *train, "--continue-from-stage1", "--lr", 0)
    assert (tmp_path / "a4/adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    # ... and full fine-tuning goes on from both together
    full = [word for word in train if word not in ("--lora", "--lora-rank", 4)] + ["--full", "--lr", 0]
    run_script("stage2_train", "--model", adapter, "--out", tmp_path / "full", *full, "--continue-from-stage1")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits
        torch.testing.assert_close(ours, models.load_model(str(adapter), dtype=torch.float32)(ids).logits, atol=1e-4, rtol=1e-4)


def test_only_adapters_are_trained_and_they_are_fp32(tiny_tokenizer, tmp_path):
    random_model(tiny_tokenizer).to(torch.bfloat16).save_pretrained(tmp_path)
    model = models.with_adapters(models.load_model(str(tmp_path), dtype=torch.bfloat16), Lora())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if name not in trained)
    full = models.load_for_training(str(tmp_path), None)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())


def test_checkpointing_leaves_the_gradients_of_adapters_as_they_are(tiny_tokenizer):
    """The base is frozen and so is its embedding: nothing that goes into a block has a gradient of its own."""
    ids, grads = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = models.with_adapters(random_model(tiny_tokenizer), Lora()).train()
        if checkpointing:
            models.checkpoint_activations(model)
        model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_adapters_see_what_autocast_made_and_no_copy_of_it(tiny_tokenizer):
    """peft would cast it to fp32, and autocast that to bf16 again: the same gradients, but a copy for every layer."""
    batch = stage1_train.collate(workload.random_examples(4, 64, 50), pad_id=0)
    gradients, peaks = [], []
    for autocast in (True, False):
        torch.manual_seed(0)
        model = models.with_adapters(random_model(tiny_tokenizer).bfloat16(), Lora()).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)  # at zero, as they begin, A has no gradient
        if not autocast:
            models.cast_by_autocast(model, False)
        run = partial(stage1_train.backward, model, batch, workload.loss_of(), bf16=True)
        run()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        peaks.append(machine.peak_of(run))
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.any() for gradient in gradients[0].values()) and peaks[0] < 0.95 * peaks[1]


@pytest.mark.parametrize("dtype, share", [(torch.float32, (0.99, 1)), (torch.bfloat16, (0, 0.01))])
def test_at_the_papers_learning_rate_weights_move_only_in_fp32(dtype, share, tiny_tokenizer):
    """Why what is trained is kept in fp32: the same twenty steps at 1e-5 leave bf16 weights where they were."""
    model = random_model(tiny_tokenizer).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    optimiser, _ = stage1_train.make_optimiser(model, lr=1e-5, warmup=0.0, weight_decay=0.0, steps=1)
    for step in range(20):
        ids = torch.randint(5, 50, (4, 24), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = torch.cat([(p != before[name]).flatten() for name, p in model.named_parameters() if name in before])
    assert share[0] <= moved.float().mean() <= share[1]


SMALL = LlamaConfig(
    vocab_size=6000, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
)


@pytest.mark.parametrize(
    "lora, bf16, gradient_checkpointing",
    [(None, False, True), (None, True, False), (Lora(), True, True), (Lora(), True, False), (Lora(), False, False)],
)
def test_expected_memory_is_what_is_measured(lora, bf16, gradient_checkpointing):
    sizes = {"sequences": 4, "length": 128, "gradient_checkpointing": gradient_checkpointing}
    assert 0.96 < memory.measure(SMALL, lora, bf16=bf16, **sizes)["expected_to_measured"] < 1.04


def test_expected_memory_counts_every_adapter(tmp_path, tiny_tokenizer):
    random_model(tiny_tokenizer).save_pretrained(tmp_path)
    model = models.with_adapters(models.load_model(str(tmp_path), dtype=torch.float32), Lora(rank=3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = dict(sequences=1, length=8, supervised=4, bf16=False, gradient_checkpointing=True)
    expected = models.expected_memory(str(tmp_path), Lora(rank=3), **sizes)
    assert expected.gradients == 4 * trained and expected.optimiser == 8 * trained
    assert expected.weights == 4 * sum(p.numel() for p in model.parameters())


def test_as_many_sequences_as_free_memory_takes(tiny_tokenizer, monkeypatch):
    """Half as many where sequences are twice as long, twice as many where twice the memory is free."""
    model = random_model(tiny_tokenizer)
    assert models.rows_that_fit(model, 100) == 32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3000)

    def rows(length: int, free: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
        return models.rows_that_fit(model, length)

    few = rows(2000, 50 * 2**20)
    assert 1 < few < 250 and rows(1000, 50 * 2**20) == pytest.approx(2 * few, rel=0.1)
    assert rows(2000, 100 * 2**20) == pytest.approx(2 * few, rel=0.1)
    assert rows(2000, 1) == 1 and rows(2000, 2**50) == 512


def test_compiled_blocks_train_the_same(tiny_records, write_jsonl, run_script, tmp_path, monkeypatch):
    """Through torch.compile's tracing, with a backend that computes what was traced."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options))
    options = ["--data", write_jsonl("train.jsonl", tiny_records[:40]), "--epochs", 1, "--val-fraction", 0.2, "--eval-size", 3]
    for name, own in (("plain", []), ("compiled", ["--compile", "--gradient-checkpointing"])):
        run_script("stage1_train", *options, *own, "--out", tmp_path / name)
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], abs=1e-4)
    assert compiled[-1]["own_cots"]["n"] == 3


def test_out_of_memory_in_the_loop_names_the_batch(tiny_records, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(stage1_train, "supervised_rows", full)
    data = write_jsonl("train.jsonl", tiny_records[:8])
    with pytest.raises(SystemExit) as exit:
        run_script("stage1_train", "--data", data, "--out", tmp_path / "out", "--val-fraction", 0)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1 and error.startswith("out of memory in step 1, on 8 x 1") and "lower --batch-size" in error


def test_several_lambdas_and_the_best_is_kept(tiny_records, write_jsonl, run_script, tmp_path, capsys):
    data, out = write_jsonl("train.jsonl", tiny_records[:80]), tmp_path / "s1"
    options = ["--data", data, "--out", out, "--val-fraction", 0.3, "--eval-every", 2, "--eval-size", 5, "--epochs", 1]
    run_script("stage1_train", *options, "--lambda", 0.5, "--out", tmp_path / "s1.lambda-0.5")  # an earlier, cut off sweep
    earlier = (tmp_path / "s1.lambda-0.5/run.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        run_script("stage1_train", *options, "--lambda", "0.5,4", "--lr", 0.1)
    assert "lr was 0.001, is 0.1" in capsys.readouterr().err
    run_script("stage1_train", *options, "--lambda", "0.5,4")
    run = runs.read_run(str(out))
    own = {value: metrics["own_cots"]["rmse"] for value, metrics in run["lambdas"].items()}
    best = min(own, key=own.get)
    assert f"λ = {best}" in capsys.readouterr().out and run["arguments"]["lam"] == float(best) and set(own) == {"0.5", "4"}
    assert run["own_cots"]["n"] == 5
    kept = {p.name for p in tmp_path.iterdir()} & {"s1", "s1.lambda-0.5", "s1.lambda-4"}
    assert kept == {"s1", "s1.lambda-4" if best == "0.5" else "s1.lambda-0.5"}
    half = out if best == "0.5" else tmp_path / "s1.lambda-0.5"
    assert best == "0.5" or (half / "run.json").stat().st_mtime_ns == earlier
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    judged = [line["step"] for line in log if "own_cots" in line]
    assert judged == sorted({*range(2, len(log) + 1, 2), len(log)}) and len(judged) > 1
    run_script("eval", "--logs", out / "log.jsonl", "--out", tmp_path / "eval")
    assert (tmp_path / "eval/training.png").read_bytes()[:4] == b"\x89PNG"


def test_dry_run_needs_no_weights_and_no_network(mistral_tokenizer, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    """`--model mistral-7b` from the hub's cache, where only config and tokenizer are: the mask can be read off the screen."""
    commit = tmp_path / "hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text("0" * 40)
    mistral_tokenizer.save_pretrained(commit)
    random_model(mistral_tokenizer).config.save_pretrained(commit)
    rows = [{"id": f"r{i}", "prompt": f"Rate {i}.", "cot": "It is fine.", "score": 4} for i in range(30)]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data, out = write_jsonl("t.jsonl", rows), tmp_path / "out"
    run_script("stage1_train", "--model", "mistral-7b", "--data", data, "--out", out, "--dry-run")
    printed = capsys.readouterr().out
    for shown in (
        "12 tokens without loss:\n<s>[INST] Rate 0. [/INST]\n", "10 tokens with CE:\nIt is fine. So the overall score is",
        "with CE: '4' (id 28781). The squared error to 4 is read here", "last token, with CE: '</s>' (id 2)",
        "expected memory, an estimate: ", '"lora_rank": 8', '"full": false', "nothing was loaded and nothing written",
    ):  # fmt: skip
        assert shown in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_what_is_shown_is_what_is_trained_on(tiny_tokenizer, capsys):
    example = Example("a", [2, 10, 11, 12, 8, 3], 2, 4, 4.5)
    examples = stage1_train.Examples()
    examples.append(example)
    tokens = records.score_tokens(tiny_tokenizer, records.Grid())
    stage1_train.show(tiny_tokenizer, examples, tokens, max_length=9, score_in_ce=False)
    shown = capsys.readouterr().out
    assert "record a, 2 tokens without loss" in shown and "2 tokens with CE" in shown
    assert "token 4, without CE" in shown and "The squared error to 4.5" in shown
