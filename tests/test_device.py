"""Tensors meet on one device only, tested without a GPU: `cpu:0` stands for one."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import stage1_train
from tract import batch, models, writing

GPU = torch.device("cpu", 0)
# These may have tensors of both: an index, what is copied, what is assigned, what asks whether it can be
ACROSS = ("__getitem__", "copy_", "__set__", "_has_compatible_shallow_copy_type")


class Apart(TorchFunctionMode):
    """Note in `mixed` the functions where tensors of both devices meet, which is an error on a GPU."""

    def __init__(self):
        super().__init__()
        self.there, self.mixed = WeakIdKeyDictionary(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        given = [x for x in leaves if isinstance(x, Tensor)]
        there = [x in self.there for x in given]
        if func == Tensor.device.__get__:
            return GPU if there[0] else func(*args)
        found = func(*args, **kwargs or {})
        if func == Tensor.data.__set__:
            found, there = given[0], there[1:]
        name, asked = func.__name__, [x for x in leaves if isinstance(x, torch.device)]
        goes_there = asked[0] == GPU if asked else any(there) and name != "cpu"
        if any(there) and not asked and name not in ACROSS:
            # a single number may come from anywhere
            self.mixed |= {name for x, t in zip(given, there, strict=False) if x.ndim and not t}
        for x in (x for x in tree_leaves(found) if isinstance(x, Tensor)):
            self.there.pop(x, None)
            if goes_there:
                self.there[x] = True
        return found


# In bf16 without LoRA, for peft makes fp32 parameters of adapters where no mode can see it
CASES = [("--accumulation 2", "--bf16"), ("--lora --gradient-checkpointing", "--fp32")]


@pytest.mark.parametrize("options, precision", CASES)
def test_no_tensor_is_left_behind(options, precision, lab, monkeypatch):
    """Train, evaluate, and judge, where rows leave the batch and others join it."""
    for module in (models, batch, writing, stage1_train):
        monkeypatch.setattr(module, "device", lambda: GPU)
    data, few = lab.write("train.jsonl", lab.rows[:16]), lab.write("few.jsonl", lab.rows[:3])
    with Apart() as devices:
        options = ["--epochs", 1, "--batch-size", 8, "--valid", few, precision, *options.split()]
        lab.run("stage1_train", "--data", data, "--out", lab.path / "p_s", *options)
        options = ["--num-cots", 2, "--batch-size", 4, "--out", lab.path / "predictions.jsonl", precision]
        lab.run("predict", "--model", lab.path / "p_s", "--data", few, *options)
        assert not devices.mixed
        torch.ones(2, device=GPU) + torch.ones(2)
        assert devices.mixed
