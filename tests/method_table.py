"""Every method with arguments for a short run; a method that is not covered here fails the collection of its tests."""

from hf_bimp.methods import METHODS, setting_names

GOAL = 0.75
SHORT: dict[str, dict] = {
    "bimp": {"target_sparsity": GOAL, "num_cycles": 2},
    "gmp": {"target_sparsity": GOAL, "num_prunings": 3},
    "gsm": {"target_sparsity": GOAL, "weight_decay": 0.1},
    "lc": {"target_sparsity": GOAL, "weight_decay": 0.1},
    "dpf": {"target_sparsity": GOAL, "num_prunings": 3, "dpf_interval": 2},
    "dnw": {"target_sparsity": GOAL},
    "cs": {"target_sparsity": None, "cs_initial_mask": 0.01, "cs_penalty": 1e-3},
    "str": {"target_sparsity": None, "str_initial_threshold": -3.0, "weight_decay": 0.1},
    "dst": {"target_sparsity": None, "dst_penalty": 0.02},
    "movement": {"target_sparsity": GOAL, "method_config": {"num_prunings": 3}},
    "rigl": {"target_sparsity": GOAL, "method_config": {"interval": 2}},
}
ours = {name for name, method in METHODS.items() if method.__module__.startswith("hf_bimp.")}
missing = ours - SHORT.keys() - {"dense"}
assert not missing, f"tests/method_table.py covers no {missing}: add arguments for a short run."
PRUNING_STABLE = [name for name in SHORT if not METHODS[name].traits.has_dense_phase]
SPARSE_EARLY = ["gmp", "dpf", "dnw", "str", "dst", "movement", "rigl"]  # sparse in the middle of a run too


def settings_of(name: str) -> dict:
    """The fields of its `Config` for a short run."""
    own = {key: value for key, value in SHORT[name].items() if key in setting_names(METHODS[name])}
    return own | SHORT[name].get("method_config", {})
