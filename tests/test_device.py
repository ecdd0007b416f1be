"""That everything is where the model is, tested without a GPU: `cpu:0` stands for one, and who was put there is remembered."""

import json
import traceback

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import gen_cot
import models
import stage1_train

GPU = torch.device("cpu", 0)
# These may have tensors of both: an index, what is copied, what is assigned, what asks whether it can be
ACROSS = ("__getitem__", "copy_", "__set__", "_has_compatible_shallow_copy_type")


class Apart(TorchFunctionMode):
    """Where tensors of both devices meet, which is an error on a GPU, is noted in `mixed`."""

    def __init__(self):
        super().__init__()
        self.there, self.mixed = WeakIdKeyDictionary(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        there = [x in self.there for x in given]
        if func == Tensor.device.__get__:
            return GPU if there[0] else func(*args, **kwargs)
        found = func(*args, **kwargs)
        if func == Tensor.data.__set__:
            found, there = given[0], there[1:]
        name, asked = func.__name__, [x for x in leaves if isinstance(x, torch.device)]
        goes_there = asked[0] == GPU if asked else any(there) and name != "cpu"
        if any(there) and not asked and name not in ACROSS:
            if any(x.ndim and not t for x, t in zip(given, there, strict=False)):  # a single number may come from anywhere
                self.mixed.add(f"{name}, {[line for line in traceback.format_stack() if '/torch/' not in line][-2].strip()}")
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and goes_there:
                self.there[x] = True
            elif isinstance(x, Tensor):
                self.there.pop(x, None)
        return found


# peft makes fp32 parameters of adapters in bf16 where no mode can see it
@pytest.mark.parametrize("options, bf16", [("--full --accumulation 2", True), ("--lora --gradient-checkpointing", False)])
def test_no_tensor_is_left_behind(options, bf16, tiny_records, write_jsonl, run_script, tmp_path, monkeypatch):
    """Training, judging what is held out, and judging from a file, where rows leave the batch and others join it."""
    for module in (models, gen_cot, stage1_train):
        monkeypatch.setattr(module, "device", lambda: GPU)
        monkeypatch.setattr(module, "has_bf16", lambda: bf16)
    data, few = write_jsonl("train.jsonl", tiny_records[:16]), write_jsonl("few.jsonl", tiny_records[:3])
    with Apart() as devices:
        options = ["--epochs", 1, "--batch-size", 8, "--val-fraction", 0.2, "--eval-size", 1, *options.split()]
        run_script("stage1_train", "--data", data, "--out", tmp_path / "p_s", *options)
        options = ["--num-cots", 2, "--batch-size", 4, "--out", tmp_path / "predictions.jsonl"]
        run_script("predict", "--model", tmp_path / "p_s", "--data", few, *options)
        assert not devices.mixed
        torch.ones(2, device=GPU) + torch.ones(2)
        assert len(devices.mixed) == 1
    assert json.loads((tmp_path / "p_s/run.json").read_text())["bf16"] == bf16
