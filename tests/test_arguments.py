"""Arguments: what cannot work is refused before any training, with the value and a way out in the message."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor, HfArgumentParser
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_bimp import BIMPArguments, BIMPSeq2SeqArguments
from hf_bimp.arguments import TESTED_OPTIMIZERS
from hf_bimp.support import check_devices, check_model, check_optimizer, check_scheduler, check_sharding
from processes import output_of

EVALUATED = {"eval_strategy": "epoch"}
HELD = {"num_cycles": 0, "keep_zeros": True}

# What is given beside a valid target_sparsity, and what the message has to say.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_sparsity": None}, ["target_sparsity=None", "between 0 and 1"]),
    ({"target_sparsity": 0.0}, ["target_sparsity=0.0", "between 0 and 1"]),
    ({"target_sparsity": 1.0}, ["target_sparsity=1.0", "between 0 and 1"]),
    ({"target_sparsity": 90.0}, ["target_sparsity=90.0", "0.9 keeps every tenth"]),
    ({"target_sparsity": -0.5}, ["target_sparsity=-0.5"]),
    ({"target_sparsity": float("nan")}, ["target_sparsity=nan"]),
    ({"method": "gradual"}, ["method='gradual'", "bimp", "dense"]),
    ({"method": "dense"}, ["method='dense'", "leave target_sparsity"]),
    ({"method": "dense", "target_sparsity": None, "keep_zeros": True}, ["method='dense'", "keep_zeros"]),
    ({"num_cycles": 2, "prune_fraction": 0.2}, ["num_cycles", "prune_fraction", "give one of them"]),
    ({"num_cycles": 0}, ["num_cycles=0", "keep_zeros=True", "at least 1"]),
    ({"num_cycles": 0, "keep_zeros": True}, ["num_cycles=0", "without target_sparsity"]),
    ({"num_cycles": 0, "target_sparsity": None}, ["num_cycles=0", "keep_zeros=True"]),
    ({"num_cycles": -1}, ["num_cycles=-1", "at least 1"]),
    ({"prune_fraction": 0.0}, ["prune_fraction=0.0", "between 0 and 1"]),
    ({"prune_fraction": 1.0}, ["prune_fraction=1.0", "between 0 and 1"]),
    ({"dense_ratio": 1.0}, ["dense_ratio=1.0", "[0, 1)"]),
    ({"dense_ratio": -0.1}, ["dense_ratio=-0.1", "[0, 1)"]),
    ({"dense_ratio": float("nan")}, ["dense_ratio=nan"]),
    ({"retrain_schedule": "warm_restart"}, ["'warm_restart'", "allr", "lrw"]),
    ({"retrain_schedule": "constant"}, ["retrain_learning_rate=None", "'constant'", "need it"]),
    ({"retrain_schedule": "stepped"}, ["retrain_learning_rate=None", "'stepped'"]),
    ({"retrain_schedule": "cosine"}, ["retrain_learning_rate=None", "'cosine'"]),
    ({"retrain_schedule": "linear"}, ["retrain_learning_rate=None", "'linear'"]),
    ({"retrain_learning_rate": 0.1}, ["retrain_learning_rate=0.1", "'allr'", "no other schedule"]),
    ({"retrain_schedule": "llr", "retrain_learning_rate": 0.1}, ["retrain_learning_rate=0.1", "'llr'"]),
    ({"retrain_warmup_ratio": 1.0}, ["retrain_warmup_ratio=1.0", "[0, 1)"]),
    ({"retrain_warmup_ratio": -0.1}, ["retrain_warmup_ratio=-0.1", "[0, 1)"]),
    ({"retrain_schedule": "ft", "retrain_warmup_ratio": 0.1}, ["retrain_warmup_ratio=0.1", "'ft'", "Leave it out"]),
    ({"retrain_schedule": "lrw", "retrain_warmup_ratio": 0.1}, ["retrain_warmup_ratio=0.1", "'lrw'"]),
    ({"learning_rate": 0.0}, ["learning_rate=0.0", "positive"]),
    ({"learning_rate": -1e-3}, ["learning_rate=-0.001", "positive"]),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED}, ["'reduce_lr_on_plateau'", "Use linear"]),
    ({"lr_scheduler_type": "greedy", **EVALUATED}, ["'greedy'", "Use linear"]),
    ({"lr_milestones": []}, ["lr_milestones=[]", "(0, 1)"]),
    ({"lr_milestones": [0.5, 1.0]}, ["lr_milestones=[0.5, 1.0]", "fractions"]),
    ({"lr_milestones": [0.0, 0.5]}, ["lr_milestones=[0.0, 0.5]", "fractions"]),
    ({"lr_milestones": [30, 60]}, ["lr_milestones=[30, 60]", "fractions"]),
    ({"lr_milestones": [0.5], "lr_scheduler_type": "cosine"}, ["lr_milestones", "leave lr_scheduler_type out"]),
    ({"lr_gamma": 0.0}, ["lr_gamma=0.0", "positive"]),
    ({"dense_steps": 100}, ["dense_steps=100", "dense_ratio=0.5"]),
    ({"dense_steps": 0, "dense_ratio": 0.0}, ["dense_steps=0", "at least 1"]),
    ({"dense_steps": 9, "dense_ratio": 0.0, "method": "dense", "target_sparsity": None}, ["dense_steps=9"]),
    ({"dense_steps": 9, "dense_ratio": 0.0, "target_sparsity": None, **HELD}, ["dense_steps=9"]),
    ({"optim": "lion_32bit"}, ["lion_32bit", "adamw_torch, ", "sgd"]),
    ({"optim": "adamw_bnb_8bit"}, ["adamw_bnb_8bit", "Tested are"]),
    ({"fsdp": True}, ["FSDP", "Use DDP"]),
    ({"auto_find_batch_size": True}, ["auto_find_batch_size", "per_device_train_batch_size"]),
]  # fmt: skip

ALLOWED: list[dict[str, Any]] = [
    {},
    {"target_sparsity": 1e-6},
    {"target_sparsity": 0.999999, "num_cycles": 50},
    {"method": "dense", "target_sparsity": None},
    {"num_cycles": 0, "keep_zeros": True, "target_sparsity": None},
    {"num_cycles": 3, "keep_zeros": True},
    {"prune_fraction": 0.2},
    {"dense_ratio": 0.0},
    {"dense_ratio": 0.0, "dense_steps": 1},
    {"dense_ratio": 0.99},
    {"retrain_warmup_ratio": 0.0},
    {"retrain_schedule": "ft", "retrain_warmup_ratio": 0.0},
    {"retrain_schedule": "stepped", "retrain_learning_rate": 0.1, "retrain_warmup_ratio": 0.1},
    {"lr_milestones": [0.5, 0.75], "lr_gamma": 0.2},
    {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.5}, "warmup_steps": 10},
    {"prune_modules": ["encoder"], "skip_modules": ["lm_head"]},
    *({"optim": optimizer.value} for optimizer in TESTED_OPTIMIZERS),
    *({"retrain_schedule": name} for name in ("ft", "lrw", "slr", "clr", "llr", "allr_d1", "allr_d2", "acc_allr")),
    *(
        {"retrain_schedule": name, "retrain_learning_rate": 1e-3}
        for name in ("constant", "stepped", "cosine", "linear")
    ),
]


def arguments(tmp_path: Path, **given: Any) -> BIMPArguments:
    return BIMPArguments(**({"output_dir": str(tmp_path), "use_cpu": True, "target_sparsity": 0.9} | given))


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_what_cannot_work_is_refused(tmp_path: Path, given: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **given)
    assert [part for part in said if part not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("given", ALLOWED, ids=str)
def test_what_can_work_passes(tmp_path: Path, given: dict[str, Any]) -> None:
    args = arguments(tmp_path, **given)
    args.validate()
    assert {name: getattr(args, name) for name in given} == given


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("target_sparsity", 1.5, "target_sparsity=1.5"),
        ("retrain_schedule", "linear", "retrain_learning_rate=None"),
        ("lr_scheduler_type", SchedulerType.GREEDY, "lr_scheduler_type='greedy'"),
        ("optim", OptimizerNames.LION, "optim="),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "DeepSpeed.*Use DDP"),
    ],
)
def test_fields_set_later_are_checked_again(tmp_path: Path, name: str, value: Any, said: str) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=said):
        args.validate()


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_a_tuned_rate_that_is_no_rate_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(ValueError, match="retrain_learning_rate"):
        arguments(tmp_path, retrain_schedule="constant", retrain_learning_rate=rate)


def test_the_command_line(tmp_path: Path) -> None:
    line = (
        f"--output_dir {tmp_path} --use_cpu --target_sparsity 0.8 --num_cycles 3 --dense_ratio 0 --dense_steps 500 "
        "--retrain_schedule linear --retrain_learning_rate 3e-4 --retrain_warmup_ratio 0.05 --prune_modules encoder "
        r"^decoder\.block --skip_modules lm_head --keep_zeros --lr_milestones 0.5 0.75 --lr_gamma 0.2 --optim sgd "
        "--evaluate_prunings false --method bimp --max_steps 40"
    )
    (args,) = HfArgumentParser(BIMPArguments).parse_args_into_dataclasses(line.split())
    assert (args.target_sparsity, args.num_cycles, args.dense_ratio, args.dense_steps) == (0.8, 3, 0.0, 500)
    assert (args.retrain_schedule, args.retrain_learning_rate, args.retrain_warmup_ratio) == ("linear", 3e-4, 0.05)
    assert (args.prune_modules, args.skip_modules) == (["encoder", r"^decoder\.block"], ["lm_head"])
    assert (args.lr_milestones, args.lr_gamma, args.optim) == ([0.5, 0.75], 0.2, OptimizerNames.SGD)
    assert args.keep_zeros is True and args.evaluate_prunings is False
    assert (args.method, args.max_steps) == ("bimp", 40)


def test_the_command_line_by_default(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--target_sparsity", "0.5", "--prune_fraction", "0.2", "--use_cpu"]
    (args,) = HfArgumentParser(BIMPArguments).parse_args_into_dataclasses(line)
    assert (args.method, args.retrain_schedule, args.dense_ratio, args.prune_fraction) == ("bimp", "allr", 0.5, 0.2)
    assert args.num_cycles is args.retrain_learning_rate is args.prune_modules is args.lr_milestones is None
    assert args.keep_zeros is False and args.evaluate_prunings is True


def test_the_command_line_refuses_schedules_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--output_dir", str(tmp_path), "--target_sparsity", "0.5", "--retrain_schedule", "warm"]
    with pytest.raises(SystemExit):
        HfArgumentParser(BIMPArguments).parse_args_into_dataclasses(line)
    assert "acc_allr" in capsys.readouterr().err


@pytest.mark.parametrize("from_line", [True, False])
def test_sequence_to_sequence_arguments(tmp_path: Path, from_line: bool) -> None:
    parser = HfArgumentParser(BIMPSeq2SeqArguments)
    given = {"output_dir": str(tmp_path), "target_sparsity": 0.8, "num_cycles": 2, "generation_num_beams": 4}
    given |= {"predict_with_generate": True, "lr_milestones": [0.25], "use_cpu": True}
    values = [[f"--{k}", *(map(str, v) if isinstance(v, list) else [str(v)])] for k, v in given.items()]
    (args,) = parser.parse_args_into_dataclasses(sum(values, [])) if from_line else parser.parse_dict(given)
    assert isinstance(args, BIMPArguments)
    assert {name: getattr(args, name) for name in given} == given
    assert args.to_dict()["target_sparsity"] == 0.8
    with pytest.raises(ValueError, match="target_sparsity=2.0"):
        parser.parse_dict(given | {"target_sparsity": 2.0})


# ---- What is checked with the model at hand ----


def test_optimizers_by_hand() -> None:
    p = [nn.Parameter(torch.zeros(2, 2))]
    good = [torch.optim.SGD(p), torch.optim.Adam(p), torch.optim.AdamW(p), torch.optim.RMSprop(p)]
    for optimizer in [*good, torch.optim.Adagrad(p), Adafactor(p, lr=1e-3, relative_step=False), Adafactor]:
        check_optimizer(optimizer)

    class Reviving(torch.optim.AdamW):
        pass

    for optimizer, name in [(torch.optim.Adadelta(p), "Adadelta"), (Reviving(p), "Reviving"), (Reviving, "Reviving")]:
        with pytest.raises(ValueError, match=f"{name} is not tested.*AdamW"):
            check_optimizer(optimizer)
    with pytest.raises(ValueError, match="Adafactor sets its own learning rate.*relative_step=False"):
        check_optimizer(Adafactor(p))


def test_schedulers_by_hand() -> None:
    check_scheduler(None)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"\(StepLR\).*optimizers=\(optimizer, None\).*lr_milestones"):
        check_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1))


def test_several_gpus_in_one_process() -> None:
    check_devices(0), check_devices(1)
    with pytest.raises(ValueError, match="2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        check_devices(2)


@pytest.mark.parametrize("sharding", [(True, False), (False, True)])
def test_sharding(sharding: tuple[bool, bool]) -> None:
    check_sharding(False, False)
    with pytest.raises(ValueError, match="DeepSpeed and FSDP.*DDP"):
        check_sharding(*sharding)


def test_adapters_are_refused() -> None:
    import peft

    model = nn.Sequential(nn.Linear(4, 4))
    check_model(model)
    with pytest.raises(ValueError, match="PEFT.*merge_and_unload"):
        check_model(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"])))


SHARDED = """
from torch import distributed, nn
from hf_bimp.pruning.layers import find_prunable

find_prunable(nn.Linear(4, 4))
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh

model = nn.Sequential(nn.Linear(4, 4))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
try:
    find_prunable(model)
except ValueError as error:
    print(error)
distributed.destroy_process_group()
"""


def test_sharded_models_are_refused() -> None:
    printed = output_of(sys.executable, "-c", SHARDED)
    assert "sharded (FSDP2, a DTensor)" in printed and "Keep it whole" in printed
