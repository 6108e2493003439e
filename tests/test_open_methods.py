"""Methods of a user's own: registered, given settings that are checked, driven, resumed and reported like ours."""

import json
import pickle
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import torch
from transformers import HfArgumentParser

import hf_bimp
from helpers import sparsity
from hf_bimp import BIMPArguments, Method
from hf_bimp.methods import METHODS, Run
from hf_bimp.methods.registry import make_config
from hf_bimp.methods.settings import at_least, between
from trainers import assert_same_tensors, make_trainer


@hf_bimp.register_method
class Shrinking(Method):
    """Scales the gradients, counts its steps, and prunes at the end."""

    name = "shrinking"
    description = "Shrinking gradients"

    @dataclass
    class Config:
        alpha: Annotated[float, between(0, 1)] = 0.1
        rounds: int = 3
        label: str | None = None
        layers: list[str] = field(default_factory=list)

    def __init__(self, run: Run, config: Any = None):
        super().__init__(run, config)
        self.seen, self.total = 0, torch.zeros(2)

    def edit_gradients(self) -> None:
        super().edit_gradients()
        self.seen += 1
        self.total += self.seen
        for weight in self.masks.weights.values():
            weight.grad.mul_(self.config.alpha)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        self.seen, self.total = state["seen"], state["total"]


def arguments(tmp_path, **given) -> BIMPArguments:
    return BIMPArguments(output_dir=str(tmp_path), use_cpu=True, method="shrinking", target_sparsity=0.5, **given)


OWN = {"method": "shrinking", "method_config": {"alpha": 0.5}, "num_cycles": None, "target_sparsity": 0.5}


def test_it_runs_resumes_and_is_told_of(tmp_path) -> None:
    saved = OWN | {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", **saved)
    whole.train()
    assert type(whole.method) is Shrinking and whole.method.config.alpha == 0.5 and whole.method.seen == 12
    assert sparsity(whole.model) == pytest.approx(0.5, abs=3e-3)
    resumed = make_trainer(tmp_path / "resumed", **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.method.seen == 12 and torch.equal(resumed.method.total, whole.method.total)
    assert_same_tensors(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    results = json.loads((tmp_path / "whole" / "bimp_results.json").read_text())
    assert results["method"] == "shrinking" and results["knobs"] == {
        "alpha": 0.5,
        "rounds": 3,
        "label": None,
        "layers": [],
    }
    whole.create_model_card()
    assert "Shrinking gradients with alpha 0.5" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(ValueError, match="knobs: .*0.5.*0.25"):
        other = saved | {"method_config": {"alpha": 0.25}}
        make_trainer(tmp_path, **other).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_settings_come_from_the_command_line_and_files_too(tmp_path) -> None:
    line = f"--output_dir {tmp_path} --use_cpu --method shrinking --target_sparsity 0.5 --method_config".split()
    (args,) = HfArgumentParser(BIMPArguments).parse_args_into_dataclasses([*line, '{"alpha": 0.25, "layers": ["a"]}'])
    assert args.method_settings == Shrinking.Config(alpha=0.25, layers=["a"])
    (args,) = HfArgumentParser(BIMPArguments).parse_dict(
        {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "method": "rigl",
            "target_sparsity": 0.5,
            "method_config": {"interval": 7},
        }
    )
    assert args.method_settings == METHODS["rigl"].Config(interval=7)


def test_arguments_are_pickled_and_loaded(tmp_path) -> None:
    args = arguments(tmp_path, method_config={"alpha": 0.25})
    assert pickle.loads(pickle.dumps(args)).method_settings == args.method_settings
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(loaded) is BIMPArguments and loaded.method_config == {"alpha": 0.25}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"beta": 1}, "beta is no setting of method='shrinking'. It has: alpha, rounds, label, layers"),
        ({"alpha": "0.1"}, "alpha='0.1' must be a finite number"),
        ({"alpha": True}, "alpha=True must be a finite number"),
        ({"alpha": 1.5}, "alpha.*1.5 must lie strictly between 0 and 1"),
        ({"alpha": float("nan")}, "alpha=nan must be a finite number"),
        ({"rounds": 2.5}, "rounds=2.5 must be a whole number"),
        ({"label": 3}, "label"),
        ({"layers": ["a", 1]}, "layers"),
        ([1], "method_config=.* must be a mapping"),
        ("{", "is no JSON"),
        ("3", "must be a mapping"),
    ],
)
def test_settings_are_checked(tmp_path, config, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        arguments(tmp_path, method_config=config)


def test_a_whole_number_will_do_for_a_float(tmp_path) -> None:
    with pytest.raises(ValueError, match="alpha=1: 1.0 must lie strictly between 0 and 1"):
        arguments(tmp_path, method_config={"alpha": 1})
    with pytest.raises(ValueError, match="interval=0: 0 must be at least 1"):
        BIMPArguments(output_dir=str(tmp_path), method="rigl", target_sparsity=0.5, method_config={"interval": 0})


@dataclass
class AnyConfig:
    share: float | None = None
    times: list[float] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    steps: tuple[int, ...] = ()
    bound: Annotated[float | None, at_least(0)] = None
    named: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"share": 1}, 1.0),
        ({"share": None}, None),
        ({"times": [1, 2.5]}, [1.0, 2.5]),
        ({"pair": [1, 2]}, (1.0, 2.0)),
        ({"steps": [1, 2, 3]}, (1, 2, 3)),
        ({"bound": None}, None),
        ({"bound": 2}, 2.0),
        ({"named": {"a": 1}}, {"a": 1.0}),
    ],
)
def test_values_are_taken_as_json_and_yaml_write_them(given, value) -> None:
    method = type("Any", (Method,), {"name": "any", "description": "", "Config": AnyConfig})
    ((name, _),) = given.items()
    taken = getattr(make_config(method, given), name)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize("given", [{"share": True}, {"times": [True]}, {"pair": [1]}, {"steps": [1.5]}, {"bound": -1}])
def test_values_that_do_not_fit_are_refused_by_name(given) -> None:
    method = type("Any", (Method,), {"name": "any", "description": "", "Config": AnyConfig})
    with pytest.raises(ValueError, match=f"method_config of method='any': {next(iter(given))}="):
        make_config(method, given)


def test_settings_of_methods_with_arguments_of_their_own_go_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="arguments of their own: .*num_prunings"):
        BIMPArguments(output_dir=str(tmp_path), method="gmp", target_sparsity=0.5, method_config={"num_prunings": 3})
    with pytest.raises(ValueError, match="num_prunings=3 is an argument of dpf, gmp"):
        arguments(tmp_path, num_prunings=3)
    with pytest.raises(ValueError, match="it has: none|It has: none"):
        BIMPArguments(output_dir=str(tmp_path), method="dnw", target_sparsity=0.5, method_config={"alpha": 1})


def test_ranges_of_ones_own() -> None:
    at_least(0)(0)
    with pytest.raises(ValueError, match="-1 must be at least 0"):
        at_least(0)(-1)
    with pytest.raises(ValueError, match="strictly"):
        between(0, 1)(1)


def test_what_cannot_be_registered(tmp_path) -> None:
    hf_bimp.register_method(Shrinking)  # the same again, as where a module is reloaded
    with pytest.raises(TypeError, match="no subclass of hf_bimp.Method"):
        hf_bimp.register_method(dict)
    with pytest.raises(TypeError, match="needs a name"):
        hf_bimp.register_method(type("Nameless", (Method,), {}))
    with pytest.raises(ValueError, match="already"):
        hf_bimp.register_method(type("Other", (Method,), {"name": "gmp", "description": ""}))
    assert METHODS["gmp"].__name__ == "GradualMagnitudePruning"
    with pytest.raises(ValueError, match="method='absent' is none of bimp, .*register_method"):
        BIMPArguments(output_dir=str(tmp_path), method="absent")
