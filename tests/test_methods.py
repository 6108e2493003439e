"""Every method does what its definition says: against loops that are written down from it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Adafactor

from hf_bimp import BIMPArguments
from hf_bimp.schedules.plan import gradual_prunings
from method_table import PRUNING_STABLE as STABLE
from method_table import settings_of
from methodical import DECAY, MOMENTUM, RATE, SIZE, Quadratic, flat, make, sgd, step, top, train, weights_of
from trainers import make_trainer, recorded_rates

LOSS = Quadratic()


def attached(name: str, optimizer=sgd, seed: int = 0, **settings):
    weights = weights_of(seed)
    method, chosen = make(name, weights, **settings), optimizer(weights)
    method.attach(chosen)
    return method, chosen


# ---- Gradual pruning ----


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(60, 3000), st.floats(0.05, 0.99))
def test_gradual_prunings_follow_the_cubic(count, steps, goal):
    times, sparsities = gradual_prunings(steps, goal, count)
    assert times == tuple(round(k * steps / (count + 1)) for k in range(1, count + 1))
    expected = [goal * (1 - (1 - t / times[-1]) ** 3) for t in times]
    assert sparsities == pytest.approx(expected, abs=1e-12) and sparsities[-1] == goal


def test_gradual_pruning_at_an_interval_and_without_room():
    assert gradual_prunings(20, 0.9, 1, interval=6)[0] == (6, 12, 18)
    assert gradual_prunings(18, 0.9, 1, interval=6)[0] == (6, 12)
    for arguments in ((10, 0.9, 20), (3, 0.9, 1, 3)):
        with pytest.raises(ValueError, match="no room"):
            gradual_prunings(*arguments)


@pytest.mark.parametrize("hard", [False, True])
def test_gmp_freezes_what_it_masks_and_soft_masks_let_it_return(hard):
    method, optimizer = attached("gmp", steps=40, goal=0.5, num_prunings=4, gmp_hard=hard)
    masked_before = torch.zeros(SIZE, dtype=torch.bool)
    waiting, returned = torch.zeros(SIZE), 0
    for t in range(40):
        due = method.is_due(t)
        if due:
            values = torch.where(masked_before, waiting, flat(method.masks.weights))  # compete with what they had
        step(method, optimizer, t, LOSS)
        masked = flat(method.masks.pruned) if method.masks.pruned else masked_before
        if due:
            goal = method.plan.sparsities[method.cycle - 1]
            assert int(masked.sum()) == round(goal * SIZE)
            if not hard:
                assert torch.equal(masked, ~top(values, 1 - goal))
            returned += int((masked_before & ~masked).sum())
            waiting = torch.where(masked, values, 0)
        assert (flat(method.masks.weights)[masked] == 0).all()
        buffers = flat({n: optimizer.state[w]["momentum_buffer"] for n, w in method.masks.weights.items()})
        assert (buffers[masked] == 0).all()
        masked_before = masked
    assert (returned == 0) == hard


def test_a_weight_comes_back_with_the_value_that_it_had():
    method, optimizer = attached("gmp", steps=12, goal=0.5, num_prunings=2)
    method.prune(optimizer)
    name, index = "a", method.masks.pruned["a"].nonzero()[0].tolist()
    value = method.frozen[name][tuple(index)].item()
    assert value != 0 and method.masks.weights[name][tuple(index)] == 0
    with torch.no_grad():
        method.masks.weights[name][~method.masks.pruned[name]] *= 1e-3  # all others become smaller
    method.prune(optimizer)
    assert method.masks.weights[name][tuple(index)].item() == value


def test_gmp_cyclic_rate_is_linear_between_each_two_prunings():
    method = make("gmp", weights_of(), steps=25, num_prunings=3, gmp_schedule="cyclic", finetune_steps=5)
    assert method.plan.prune_steps == (5, 10, 15)
    cycle = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [method.rate(t) for t in range(25)] == pytest.approx(cycle * 4 + [0.2] * 5)


def test_gmp_cyclic_rate_warms_up_and_stepped_rate_falls_at_half_and_three_quarters(tmp_path):
    given = {"method": "gmp", "target_sparsity": 0.5, "num_prunings": 3, "warmup_steps": 4, "max_steps": 40}
    settings = given | {"num_cycles": None, "learning_rate": 1.0, "lr_scheduler_type": "linear"}
    cycle = [1 - i / 10 for i in range(10)]
    warmup = [t / 4 for t in range(4)] + [1.0] * 36
    expected = {
        "cyclic": [x * y for x, y in zip(warmup, cycle * 4, strict=True)],
        "stepped": [x * (1.0 if t < 20 else 0.1 if t < 30 else 0.01) for t, x in enumerate(warmup)],
        "linear": [t / 4 for t in range(4)] + [1 - t / 36 for t in range(36)],
    }
    for schedule, rates in expected.items():
        trainer = make_trainer(tmp_path / schedule, **settings, gmp_schedule=schedule)
        assert recorded_rates(trainer) == pytest.approx(rates)


# ---- Dense weights behind ----


def reference(masks: dict[int, float], steps: int = 20, renew: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense weights after `steps` steps of SGD with the gradient at the masked ones, and those.

    `masks` are the sparsities from a step on; the mask is taken anew there and, with `renew`, at its multiples.
    """
    dense, buffer = flat(weights_of()), torch.zeros(SIZE)
    mask, sparsity = torch.ones(SIZE, dtype=torch.bool), 0.0
    for t in range(steps):
        if t in masks or (renew and sparsity and t % renew == 0):
            sparsity = masks.get(t, sparsity)
            mask = top(dense, 1 - sparsity)
        gradient = LOSS.gradient(dense * mask) + DECAY * dense
        buffer = gradient if t == 0 else MOMENTUM * buffer + gradient
        dense = dense - RATE * buffer
    return dense, mask


def test_dpf_feeds_the_error_back_to_the_dense_weights():
    method, optimizer = attached("dpf", steps=20, goal=0.5, num_prunings=3, dpf_interval=4)
    assert method.plan.prune_steps == (5, 10, 15, 20)
    plan = dict(zip(method.plan.prune_steps[:3], method.plan.sparsities, strict=False))
    dense, mask = reference(plan, renew=4)

    def look(t: int) -> None:
        if t == 19:
            torch.testing.assert_close(flat(method.behind), dense)

    train(method, optimizer, look=look)
    torch.testing.assert_close(flat(method.masks.weights), dense * top(dense, 0.5))
    assert not method.behind


def test_dnw_gives_all_weights_the_gradient_at_the_top_ones():
    method, optimizer = attached("dnw", steps=20, goal=0.6)
    dense, _ = reference({t: 0.6 for t in range(20)})
    shares = []
    train(method, optimizer, look=lambda t: shares.append(int((flat(method.masks.weights) == 0).sum())))
    assert shares == [round(0.6 * SIZE)] * 20
    torch.testing.assert_close(flat(method.masks.weights), dense * top(dense, 0.4))


def test_the_last_pruning_of_dnw_changes_nothing():
    method, optimizer = attached("dnw")
    last = {}
    train(method, optimizer, look=lambda t: last.update(weights=flat(method.masks.weights)))
    assert torch.equal(flat(method.masks.weights), last["weights"])


# ---- Gradient edits ----


def test_gsm_gives_the_gradient_to_the_top_by_first_order_alone():
    method, optimizer = attached("gsm", steps=20, goal=0.7)
    w, buffer = flat(weights_of()), torch.zeros(SIZE)
    for t in range(20):
        gradient = LOSS.gradient(w)
        edited = gradient * top(w * gradient, 0.3) + DECAY * w
        buffer = edited if t == 0 else MOMENTUM * buffer + edited
        w = w - RATE * buffer
        step(method, optimizer, t, LOSS)
        torch.testing.assert_close(flat(method.masks.weights), w)
    assert method.is_due(20)
    method.prune(optimizer)
    torch.testing.assert_close(flat(method.masks.weights), w * top(w, 0.3))


def test_lc_decays_the_smallest_with_sgd():
    method, optimizer = attached("lc", steps=20, goal=0.7)
    w, buffer = flat(weights_of()), torch.zeros(SIZE)
    for t in range(20):
        gradient = LOSS.gradient(w) + DECAY * w * ~top(w, 0.3)
        buffer = gradient if t == 0 else MOMENTUM * buffer + gradient
        w = w - RATE * buffer
        step(method, optimizer, t, LOSS)
        torch.testing.assert_close(flat(method.masks.weights), w)
    method.prune(optimizer)
    assert int((flat(method.masks.weights) == 0).sum()) == round(0.7 * SIZE)


def test_lc_decays_the_smallest_with_adamw():
    def adamw(weights):
        return torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=DECAY)

    method, optimizer = attached("lc", optimizer=adamw, steps=20, goal=0.7)
    w, m, v = flat(weights_of()), torch.zeros(SIZE), torch.zeros(SIZE)
    for t in range(20):
        gradient = LOSS.gradient(w)
        w = w * (1 - RATE * DECAY * ~top(w, 0.3))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w - RATE * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        step(method, optimizer, t, LOSS)
        torch.testing.assert_close(flat(method.masks.weights), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gsm", "lc"])
def test_without_weight_decay_an_optimizer_of_ones_own_is_refused(name):
    weights = weights_of()
    with pytest.raises(ValueError, match="works by weight decay"):
        make(name, weights).attach(sgd(weights, decay=0.0))


def test_lc_refuses_a_decay_that_it_cannot_undo():
    weights = weights_of()
    optimizer = Adafactor(weights.values(), lr=RATE, relative_step=False, weight_decay=DECAY)
    with pytest.raises(ValueError, match="scale_parameter=False"):
        make("lc", weights).attach(optimizer)


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, Adafactor])
def test_every_tested_optimizer_drives_it(name, optimizer):
    extra = {"relative_step": False, "scale_parameter": False} if optimizer is Adafactor else {}

    def chosen(weights):
        return optimizer(weights.values(), lr=0.01, weight_decay=DECAY, **extra)

    knobs = settings_of(name) | ({"str_initial_threshold": -1.0} if name == "str" else {})
    method, used = attached(name, optimizer=chosen, **knobs)
    train(method, used)
    assert method.is_complete and flat(method.masks.weights).isfinite().all()
    if not method.traits.finds_sparsity:
        assert int((flat(method.masks.weights) == 0).sum()) == round(0.5 * SIZE)


# ---- All of them ----


@pytest.mark.parametrize("name", STABLE)
def test_fine_tuning_holds_zeros_and_the_last_rate(name):
    rates = [1 - t / 15 for t in range(15)]
    knobs = settings_of(name) | ({"str_initial_threshold": -1.0} if name == "str" else {})
    method, optimizer = attached(name, steps=20, finetune_steps=5, rates=rates, **knobs)
    for t in range(15):
        step(method, optimizer, t, LOSS)
    if method.is_due(15):
        method.prune(optimizer)
    w = flat(method.masks.weights)
    mask = w != 0
    assert method.is_complete and 0 < mask.sum() < SIZE
    weights = method.masks.weights.items()
    buffer = flat({name: optimizer.state[weight]["momentum_buffer"] for name, weight in weights}) * mask
    for t in range(15, 20):  # plain SGD on what is left
        buffer = MOMENTUM * buffer + LOSS.gradient(w) * mask + DECAY * w
        w = w - RATE * rates[-1] * buffer
        step(method, optimizer, t, LOSS)
        torch.testing.assert_close(flat(method.masks.weights), w)
        assert torch.equal(flat(method.masks.weights) != 0, mask)
    assert [method.rate(t) for t in range(20)] == rates + [rates[-1]] * 5


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("at", [1, 7, 13, 17])
def test_restored_method_goes_on_bit_for_bit(name, at):
    knobs = settings_of(name)
    whole, optimizer = attached(name, steps=20, finetune_steps=4, **knobs)
    train(whole, optimizer)

    first, optimizer = attached(name, steps=20, finetune_steps=4, **knobs)
    for t in range(at):
        step(first, optimizer, t, LOSS)
    state = copy.deepcopy(first.state_dict()), optimizer.state_dict()
    weights = weights_of()
    for weight_name, weight in first.masks.weights.items():
        weights[weight_name].data.copy_(weight.data)
    second, optimizer = make(name, weights, steps=20, finetune_steps=4, **knobs), sgd(weights)
    second.attach(optimizer)
    optimizer.load_state_dict(state[1])
    second.masks.pruned = {n: mask.clone() for n, mask in first.masks.pruned.items()}
    second.masks.statistics = copy.deepcopy(first.masks.statistics)
    second.load_state_dict(state[0])
    second.step = at
    train(second, optimizer)
    assert torch.equal(flat(second.masks.weights), flat(whole.masks.weights))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"method": "dnw", "num_cycles": 2}, "num_cycles=2 is an argument of bimp"),
        ({"method": "dnw", "keep_zeros": True}, "keep_zeros=True does not go with method='dnw'"),
        ({"method": "dpf", "gmp_hard": True}, "gmp_hard=True is an argument of gmp"),
        ({"method": "bimp", "num_prunings": 7}, "num_prunings=7 is an argument of dpf, gmp"),
        ({"method": "cs"}, "finds its own sparsity"),
        ({"method": "str", "target_sparsity": None, "allocation": "erk"}, "does not go with"),
        ({"method": "gsm", "weight_decay": 0.1, "allocation": "erk"}, "does not go with"),
        ({"method": "gsm"}, "works by weight decay"),
        ({"method": "lc", "weight_decay": 0.1, "fp16": True}, "Use bf16"),
        ({"method": "gsm", "weight_decay": 0.1, "fp16": True}, "Use bf16"),
        ({"method": "bimp", "finetune_ratio": 0.1}, "comes after a pruning-stable method"),
        ({"method": "dnw", "finetune_ratio": 1.0}, r"must lie in \[0, 1\)"),
        ({"method": "gmp", "gmp_schedule": "cosine"}, "none of stepped, linear, cyclic"),
        ({"method": "gmp", "lr_scheduler_type": "cosine"}, "gmp_schedule"),
        ({"method": "gmp", "gmp_schedule": "cyclic", "lr_milestones": [0.5]}, "gmp_schedule"),
        ({"method": "gmp", "num_prunings": 7, "prune_interval": 5}, "give one of them"),
        ({"method": "dpf", "dpf_interval": 0}, "at least 1"),
        ({"method": "cs", "target_sparsity": None, "cs_temperature": 0.5}, "at least 1"),
        ({"method": "dst", "target_sparsity": None, "dst_penalty": -1.0}, "at least 0"),
        ({"method": "dnw", "target_sparsity": None}, "strictly between 0 and 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        BIMPArguments(output_dir=str(tmp_path), use_cpu=True, **{"target_sparsity": 0.5} | given)
