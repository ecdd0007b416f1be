"""A base in 4 bits under its adapters: trained, gone on with, judged with, refused."""

import json
import sys

import pytest
import torch

import stage1_train
from tract import hub, models
from tract.encode import encode, score_tokens
from tract.models import TINY_SEED
from tract.options import make_training_parser
from tract.records import Grid

bitsandbytes = pytest.importorskip("bitsandbytes")
TRAIN = ["stage1_train", "--lora", 4, "--4bit", "--epochs", 2, "--batch-size", 4]


def step_of(model, window: list, options: dict) -> tuple[float, torch.Tensor]:
    """Return the loss of a step, and its gradient with all weights in a row."""
    args = make_training_parser("", 1, stage1_train.DEFAULTS).parse_args(["--fp32"])
    loss, _, _ = stage1_train.accumulate_gradients(model, window, options, args).tolist()
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return loss, torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.filterwarnings("ignore")
def test_a_step_on_a_base_in_4_bits_is_one_on_its_weights_rounded(lab, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage1_train.py"])
    _, score_ids = score_tokens(tiny_tokenizer, Grid())
    window = [encode(tiny_tokenizer, row, Grid(), score_ids) for row in lab.rows[:4]]
    options = models.score_tensors(score_ids, Grid())
    torch.manual_seed(0)
    packed = models.load_for_training(TINY_SEED, 4, True, False, four_bit=True)
    adapters = {name: p for name, p in packed.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert (
        type(packed.get_output_embeddings()) is torch.nn.Linear
    )  # which next_token_logits multiplies in fp32

    plain = models.load_for_training(TINY_SEED, 4, True, False)
    plain.load_state_dict(adapters, strict=False)
    loss, _ = step_of(plain, window, options)
    plain.zero_grad()
    assert step_of(packed, window, options)[0] == pytest.approx(loss, rel=0.01)
    packed.zero_grad()
    n_rounded = 0
    for name, module in packed.named_modules():
        if name.endswith("base_layer"):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            n_rounded += int((plain.get_submodule(name).weight != weight).any())
            plain.get_submodule(name).weight.data = weight
    assert n_rounded == 7 * packed.config.num_hidden_layers
    wanted_loss, wanted_gradient = step_of(plain, window, options)
    loss, gradient = step_of(packed, window, options)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_judge_on_a_base_in_4_bits_goes_on_and_is_read_in_4_bits(lab, monkeypatch):
    data = lab.write("few.jsonl", lab.rows[:8])
    lab.run(*TRAIN, "--data", data, "--out", lab.path / "whole")
    # Stop after the second of four steps, and go on
    end_step = stage1_train.training.Journal.end_step

    def stop(journal, window, line) -> None:
        journal.stopping = line["step"] == 2
        end_step(journal, window, line)

    with monkeypatch.context() as patch:
        patch.setattr(stage1_train.training.Journal, "end_step", stop)
        assert lab.fail(*TRAIN, "--data", data, "--out", lab.path / "p_s")[0] == 130
    lab.run(*TRAIN, "--data", data, "--out", lab.path / "p_s")
    assert "going on after step 2" in lab.capsys.readouterr().out
    weights = [(lab.path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "p_s")]
    assert weights[0] == weights[1]
    run = json.loads((lab.path / "p_s/run.json").read_text())
    assert run["arguments"]["four_bit"] and run["bitsandbytes"] == bitsandbytes.__version__

    model = models.load_model(str(lab.path / "p_s"), torch.float32)
    assert {p.dtype for name, p in model.named_parameters() if "base_layer" in name} == {torch.uint8}
    judge = ["--model", lab.path / "p_s", "--data", data]
    lab.run("gen_cot", *judge, "--max-new-tokens", 2, "--out", lab.path / "cots.jsonl")
    cots = json.loads((lab.path / "cots.run.json").read_text())
    assert cots["bitsandbytes"] == bitsandbytes.__version__
    assert "base in 4 bits; use --engine torch" in vllm_refuses(lab, judge, monkeypatch)
    # A.4 goes on with p_s, whose base stays in 4 bits
    a4 = ["--model", lab.path / "p_s", "--data", lab.path / "cots.jsonl", "--continue-from-stage1"]
    a4 += ["--keep-unfinished", "--epochs", 1, "--out", lab.path / "a4"]
    assert "which --full can't train; leave out --full" in lab.fail("stage2_train", *a4, "--full")[1]
    lab.run("stage2_train", *a4)
    assert hub.is_four_bit(str(lab.path / "a4"))


def vllm_refuses(lab, judge: list, monkeypatch) -> str:
    for name in ("vllm", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, type("Fake", (), {"LLM": None, "LoRARequest": None}))
    return lab.fail("predict", *judge, "--engine", "vllm", "--out", lab.path / "v.jsonl")[1]


def test_4bit_is_refused_where_it_can_not_be(lab, tiny_tokenizer, monkeypatch):
    falcon = lab.checkpoint(tiny_tokenizer, model_type="falcon")  # its layers are of its own kind
    train = ["stage1_train", "--data", lab.write("few.jsonl", lab.rows[:2]), "--4bit", "--epochs", 1]
    out = ["--out", lab.path / "out"]
    assert "has no layer that could be in 4 bits" in lab.fail(*train, "--lora", "--model", falcon, *out)[1]
    code, said = lab.fail(*train, "--full", *out)
    assert code == 2 and said.strip().splitlines()[-1].endswith("add --lora")
    quantised = lab.path / "quantised"  # as some on the hub are
    models.load_model(TINY_SEED, torch.float32, four_bit=True).save_pretrained(quantised)
    tiny_tokenizer.save_pretrained(quantised)
    said = lab.fail("stage1_train", "--data", lab.path / "few.jsonl", "--model", quantised, *out)[1]
    assert "its weights are quantised, which --full can't train; use --lora 8" in said
    monkeypatch.setattr("tract.adapters.find_spec", lambda name: None)
    code, said = lab.fail(*train, "--lora", "--out", lab.path / "other")
    assert code == 2 and said.strip().endswith("pip install bitsandbytes")
