"""Every algorithm against its formula, written once more as plain loops; and what no algorithm may depend on."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.advantages import gae, returns_to_go, token_rewards, whiten
from raytron.rl.algorithms import ALGORITHMS, make
from raytron.rl.config import AlgorithmConfig
from raytron.rl.packing import micro_batches
from raytron.rl.types import Group, Tokens
from tests.rl.batches import (
    batch_of,
    batches,
    difference_quotients,
    gradient,
    properties,
    tokens_of,
    total_loss,
    trajectory,
)

NAMES = list(ALGORITHMS)


def config(name: str, **changes) -> AlgorithmConfig:
    """Stated settings; those that want it are told the longest response."""
    return AlgorithmConfig(name, **{"constant_length": 10 if name == "dr_grpo" else None, **changes})


def algorithm(name: str, **changes):
    return make(config(name, **changes))


VARIANTS = {
    **{name: config(name) for name in NAMES},
    "dual clip": config("dapo", dual_clip=1.1, clip_low=0.05),
    "k3 in the loss": config("grpo", kl="loss", kl_coefficient=0.5),
    "k2 in the loss": config("gspo", kl="loss", kl_coefficient=0.5, kl_estimator="k2"),
    "KL in the reward": config("reinforce_pp", kl="reward", kl_coefficient=0.5),
    "entropy": config("rloo", entropy_coefficient=0.1),
    "tis": config("ppo", correction="tis", correction_high=1.05),
    "sequence mask": config("dr_grpo", correction="mask-sequence", correction_high=1.05),
    "overlong": config("dapo", overlong_buffer=4, constant_length=6, overlong_filtering=True),
}


# --- the formulas -----------------------------------------------------------------------------------------------------


def rows_of(batch):
    """Of each trajectory the places of its chosen tokens in T."""
    return [[t for t in range(a, b) if batch.chosen[t]] for a, b in zip(batch.starts, batch.starts[1:], strict=False)]


def group_of(batch, i):
    return [batch.rewards[j] for j in range(len(batch)) if batch.groups[j] == batch.groups[i]]


def expected_advantages(name, batch):
    """One for each trajectory of the group family; tests below hold the others."""
    result = []
    for i, reward in enumerate(batch.rewards):
        group = group_of(batch, i)
        if len(group) == 1 or np.ptp(group) == 0:
            result.append(0.0)
        elif name == "dr_grpo":
            result.append(reward - np.mean(group))
        elif name == "rloo":
            result.append(reward - (sum(group) - reward) / (len(group) - 1))
        else:
            result.append((reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-6))
    return result


def token_advantages(name, batch):
    """What the others prepare: token returns or GAE, whitened over the batch's tokens."""
    baseline = [np.mean(group_of(batch, i)) for i in range(len(batch))] if name == "reinforce_pp_baseline" else 0.0
    rewards_T = token_rewards(batch.rewards - baseline, np.zeros(len(batch.tokens)), batch)
    if name == "ppo":
        return whiten(gae(rewards_T, batch.fields["values"].astype(float), batch, 1.0, 1.0), batch.chosen)
    returns_T = returns_to_go(rewards_T, batch, 1.0)
    compared_T = batch.chosen.copy()
    if name == "reinforce_pp_baseline":
        compared_T &= np.array([len(group_of(batch, i)) > 1 for i in range(len(batch))])[batch.rows]
    return whiten(returns_T, compared_T)


def expected_loss(name, batch, advantages_T, at):
    """The scalar loss as a function of current log-probabilities; `at`: where detached parts are held."""
    rows = rows_of(batch)
    count, longest = sum(map(len, rows)), 10
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}.get(name, (0.2, 0.2))

    def clip(r):
        return min(max(r, 1 - low), 1 + high)

    def loss(lp):
        total = 0.0
        for row in rows:
            anchor = (batch.fields["old"] if name == "gspo" else batch.logprobs).astype(float)
            sequence_ratio = math.exp(np.mean([lp[t] - anchor[t] for t in row]))
            for t in row:
                A = advantages_T[t]
                if name == "cispo":
                    l = -clip(math.exp(at[t] - anchor[t])) * A * lp[t]
                else:
                    r = sequence_ratio if name == "gspo" else math.exp(lp[t] - anchor[t])
                    l = -min(r * A, clip(r) * A)
                if name in ("grpo", "gspo"):
                    total += l / len(row) / len(rows)
                elif name == "dr_grpo":
                    total += l / (len(rows) * longest)
                else:
                    total += l / count
        return total

    return loss


@pytest.mark.parametrize("name", NAMES)
@properties
@given(drawn=batches())
def test_equals_its_formula(name, drawn):
    batch, logprobs = drawn
    prepared = algorithm(name).prepare(batch)
    if name in ("reinforce_pp", "reinforce_pp_baseline", "ppo"):
        advantages_T = token_advantages(name, batch)
    else:
        advantages_T = np.array(expected_advantages(name, batch))[batch.rows] * batch.chosen
    np.testing.assert_allclose(prepared.fields["advantages"], advantages_T, atol=1e-5)

    advantages_T = prepared.fields["advantages"].astype(float)  # as the loss sees them, in float32
    formula = expected_loss(name, batch, advantages_T, logprobs)
    loss = partial(total_loss, algorithm(name), prepared)
    assert loss(torch.tensor(logprobs)).item() == pytest.approx(formula(logprobs), abs=1e-6)
    scale = 1e-6 * (1 + np.abs(advantages_T).max())
    np.testing.assert_allclose(gradient(loss, logprobs), difference_quotients(formula, logprobs), atol=scale)


# --- what nothing may depend on ---------------------------------------------------------------------------------------


def parts_of(batch, random):
    """Cut into micro-batches, whole trajectories each, in any order."""
    rows = list(range(len(batch)))
    random.shuffle(rows)
    cuts = sorted(random.choices(range(len(rows) + 1), k=3))
    return [part for part in (rows[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)) if part]


@pytest.mark.parametrize("variant", VARIANTS)
@properties
@given(drawn=batches(), random=st.randoms(use_true_random=False))
def test_any_cut_into_micro_batches_gives_the_same_gradient(variant, drawn, random):
    batch, logprobs = drawn
    algorithm = make(VARIANTS[variant])
    prepared = algorithm.prepare(batch)
    entropy = torch.ones(len(logprobs), dtype=torch.float64)
    whole = gradient(partial(total_loss, algorithm, prepared, entropy=entropy), logprobs)
    of_parts = np.zeros_like(whole)
    for rows in parts_of(batch, random):
        at = np.concatenate([np.arange(batch.starts[i], batch.starts[i + 1]) for i in rows])
        part = partial(total_loss, algorithm, prepared.select(rows), entropy=entropy[: len(at)])
        of_parts[at] += gradient(part, logprobs[at])
    np.testing.assert_allclose(of_parts, whole, rtol=1e-12, atol=1e-15)


def packed_gradient(algorithm, prepared, logprobs, entropy, order, budget, packed):
    """As a trainer takes it: from micro-batches of rows of tokens, padding and all."""
    lp = torch.tensor(logprobs, requires_grad=True)
    for micro in micro_batches(prepared, order, budget, packed=packed):
        fields = {name: x_BS.reshape(-1) for name, x_BS in micro.fields_BS.items()}
        at = fields["index"].clamp(min=0)
        changes = {
            name: fields[name].double() for name in ("behaviour", "advantages", "old", "reference") if name in fields
        }
        tokens = Tokens(
            logprobs=lp[at],
            mask=micro.loss_mask_BS.reshape(-1),
            sequence=fields["sequence"],
            sequences=len(micro.fields_BS["sequences"]),
            entropy=torch.tensor(entropy)[at],
            **changes,
        )
        (fields["weights"] * algorithm.loss(tokens)[0]).sum().backward()
    return lp.grad.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@properties
@given(
    drawn=batches(prompt="."), random=st.randoms(use_true_random=False), budget=st.integers(1, 30), packed=st.booleans()
)
def test_any_packing_gives_the_same_gradient(variant, drawn, random, budget, packed):
    batch, logprobs = drawn
    algorithm, entropy, order = make(VARIANTS[variant]), np.ones(len(logprobs)), list(range(len(batch)))
    prepared = algorithm.prepare(batch)
    random.shuffle(order)
    whole = gradient(partial(total_loss, algorithm, prepared, entropy=torch.tensor(entropy)), logprobs)
    found = packed_gradient(algorithm, prepared, logprobs, entropy, order, budget, packed)
    np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("garbage", [7.0, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_tokens_change_nothing(variant, garbage):
    """Neither their log-probabilities of any model, nor their values, nor an advantage somebody gave them."""
    batch = batch_of([trajectory(".##.#.", 1.0), trajectory("..##", 0.0)], [trajectory("#.#", 2.0, truncated=True)])
    random, T = np.random.default_rng(0), len(batch.tokens)
    fields = {name: random.normal(-1, 0.1, T) for name in ("old", "reference", "values")}
    logprobs, entropy = random.normal(-1, 0.1, T), torch.ones(T, dtype=torch.float64)
    algorithm = make(VARIANTS[variant])

    def observed(fill):
        def filled(x):
            return np.where(batch.chosen, x, fill).astype(np.float64)

        noisy = dataclasses.replace(batch, logprobs=filled(batch.logprobs))
        prepared = algorithm.prepare(noisy.having(**{name: filled(x) for name, x in fields.items()}))
        prepared = prepared.having(advantages=filled(prepared.fields["advantages"]))
        lp = torch.tensor(filled(logprobs), requires_grad=True)
        tokens = tokens_of(prepared, lp, entropy=torch.where(torch.tensor(batch.chosen), entropy, fill))
        loss_T, metrics = algorithm.loss(tokens)
        (torch.tensor(prepared.fields["weights"], dtype=torch.float64) * loss_T).sum().backward()
        chosen = [x_T[batch.chosen].detach().numpy() for x_T in (loss_T, *metrics.values())]
        return [*chosen, lp.grad.numpy(), prepared.fields["weights"], prepared.fields["advantages"][batch.chosen]]

    for clean, dirty in zip(observed(0.0), observed(garbage), strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_micro_batch_of_nothing_chosen_has_a_backward(variant):
    """Every rank takes part in every collective of the backward pass."""
    algorithm = make(VARIANTS[variant])
    batch = batch_of([trajectory("##", 1.0)]).having(values=np.zeros(2), reference=np.zeros(2))
    lp = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    nothing = {"mask": torch.zeros(2), "entropy": torch.zeros(2)}
    loss_T, _ = algorithm.loss(tokens_of(algorithm.prepare(batch), lp, **nothing))
    loss_T.sum().backward()
    assert lp.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reports_what_it_says_it_reports(variant):
    algorithm = make(VARIANTS[variant])
    batch = batch_of([trajectory("##", 1.0)]).having(values=np.zeros(2), reference=np.zeros(2))
    lp = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss_T, metrics = algorithm.loss(tokens_of(algorithm.prepare(batch), lp, entropy=torch.zeros(2)))
    assert tuple(metrics) == algorithm.metrics
    assert all(m.shape == loss_T.shape and not m.requires_grad for m in metrics.values())


# --- choices ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="'trpo' is unknown; there are grpo, dr_grpo"):
        make(AlgorithmConfig("trpo"))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("grpo", {"lam": 0.9}, "does not use lam"),
        ("rloo", {"normalize_std": True}, "does not use normalize_std"),
        ("cispo", {"dual_clip": 3.0}, "does not use dual_clip"),
        ("grpo", {"kl_coefficient": 0.1}, "does not use kl_coefficient"),
        ("grpo", {"correction_high": 2.0}, "does not use correction_high"),
        ("dapo", {"overlong_penalty": 2.0}, "does not use overlong_penalty"),
        ("grpo", {"kl": "loss", "kl_estimator": "k1"}, "wrong gradient"),
        ("rloo", {"kl": "reward", "kl_estimator": "k3"}, "wrong gradient"),
        ("grpo", {"kl": "reward"}, "normalize_std=False"),
        ("grpo", {"correction": "tis", "decoupled": False}, "decoupled=True"),
        ("grpo", {"correction": "mask-token", "correction_low": 9.0}, "must be below correction_high"),
        ("gspo", {"reduction": "token"}, "its reduction is sequence"),
        ("dr_grpo", {"constant_length": None}, "need constant_length"),
        ("dapo", {"overlong_buffer": 5}, "need constant_length"),
        ("dapo", {"overlong_buffer": 5, "constant_length": 4}, "exceeds constant_length"),
    ],
)
def test_settings_that_would_not_mean_what_they_say(name, changes, words):
    with pytest.raises(ValueError, match=words):
        algorithm(name, **changes)


@pytest.mark.parametrize(
    ("field", "value"), [("clip_low", 1.5), ("clip_high", -0.1), ("dual_clip", 0.5), ("gamma", 2.0), ("epochs", 0)]
)
def test_numbers_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"algorithm.{field} is"):
        AlgorithmConfig(**{field: value})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stated_holds(name):
    """A configuration read back from a run is the one that ran, and asking for a default changes nothing."""
    full = algorithm(name).config
    assert make(full).config == full
    assert algorithm(name, clip_high=0.05).config == dataclasses.replace(full, clip_high=0.05)


def test_defaults_that_hang_on_another_choice():
    assert algorithm("rloo", kl="reward").config.kl_estimator == "k1"
    assert algorithm("rloo", kl="loss").config.kl_estimator == "k3"
    assert algorithm("reinforce_pp_baseline", kl="loss").config.kl_estimator == "k2"
    icepop = algorithm("grpo", correction="icepop").config
    assert (icepop.decoupled, icepop.correction_low, icepop.correction_high) == (True, 0.5, 5.0)
    assert not algorithm("grpo", correction="mask-token").config.decoupled


def test_needs():
    assert not algorithm("grpo", minibatches=4).needs_old
    assert not algorithm("grpo", decoupled=True).needs_old
    assert algorithm("grpo", decoupled=True, minibatches=4).needs_old
    assert algorithm("gspo", epochs=2).needs_old
    assert not algorithm("grpo").needs_reference
    assert algorithm("grpo", kl="loss").needs_reference
    assert [name for name in NAMES if ALGORITHMS[name].needs_critic] == ["ppo"]
    assert not algorithm("grpo").entropy
    assert algorithm("grpo", entropy_coefficient=0.01).entropy


def test_dynamic_sampling_looks_at_raw_rewards():
    """Not at those that shaping made differ, and not at rounding."""
    dapo = algorithm("dapo", overlong_buffer=3, constant_length=4)
    alike = Group(0, (trajectory("#", 1.0), trajectory("####", 1.0), trajectory("#", 1.0 + 1e-9)))
    differing = Group(1, (trajectory("#", 1.0), trajectory("#", 0.0)))
    one_left = Group(2, (trajectory("#", 1.0), trajectory("#", None)))
    assert [dapo.keep(group) for group in (alike, differing, one_left)] == [False, True, False]
    assert algorithm("grpo").keep(alike)


def test_a_reward_that_is_no_number_stops_the_step():
    with pytest.raises(ValueError, match="group 1 is not finite"):
        algorithm("grpo").prepare(batch_of([trajectory("#", 1.0)], [trajectory("#", math.nan)]))


# --- numbers by hand --------------------------------------------------------------------------------------------------


def test_overlong_shaping_and_filtering_by_hand():
    group = [trajectory("#" * 6, 1.0), trajectory("#" * 4, 1.0, truncated=True)]
    dapo = algorithm("dapo", overlong_buffer=4, constant_length=8, overlong_filtering=True, normalize_std=False)
    batch = dapo.prepare(batch_of(group))
    assert dapo.shaped(batch).tolist() == [0.5, 1.0]
    np.testing.assert_allclose(batch.fields["advantages"], [-0.25] * 6 + [0.25] * 4)
    np.testing.assert_allclose(batch.fields["weights"], [0.1] * 6 + [0.0] * 4)  # the denominator stays 10


def test_kl_in_the_reward_by_hand():
    group = [trajectory("#.#", 1.0, [-1.0, -2.0]), trajectory("#", 0.0, [-1.0])]
    batch = batch_of(group).having(reference=np.array([-1.5, 55.0, -1.0, -1.0]))
    kl = {"kl": "reward", "kl_coefficient": 0.2}
    # k1: 0.5, -1 and 0. RLOO: R - 0.2 x (-0.5) = 1.1 against 0.
    advantages = algorithm("rloo", **kl).prepare(batch).fields["advantages"]
    np.testing.assert_allclose(advantages, [1.1, 0.0, 1.1, -1.1], rtol=1e-6)
    # REINFORCE++: returns from each token on, charged -0.1 and +0.2.
    advantages = algorithm("reinforce_pp", **kl, normalize_std=False).prepare(batch).fields["advantages"]
    np.testing.assert_allclose(advantages, [1.1, 0.0, 1.2, 0.0], rtol=1e-6)
    # With the trainer's log-probabilities at hand, those are the policy's.
    batch = batch.having(old=batch.fields["reference"])
    advantages = algorithm("rloo", **kl).prepare(batch).fields["advantages"]
    np.testing.assert_allclose(advantages, [1.0, 0.0, 1.0, -1.0])


def test_reinforce_pp_baseline_gives_a_group_of_one_nothing():
    batch = batch_of([trajectory("##", 9.0)], [trajectory("#", 1.0), trajectory("#", 0.0)])
    advantages = algorithm("reinforce_pp_baseline").prepare(batch).fields["advantages"]
    np.testing.assert_allclose(advantages, [0.0, 0.0, 0.707106, -0.707106], atol=1e-5)


def test_ppo_returns_and_value_loss_by_hand():
    ppo = algorithm("ppo", lam=0.5, normalize_std=False)
    batch = batch_of([trajectory("#.#", 1.0)]).having(values=np.array([0.5, 33.0, 0.25]))
    prepared = ppo.prepare(batch)
    # deltas -0.25 and 0.75
    np.testing.assert_allclose(prepared.fields["advantages"], [0.125, 0.0, 0.75])
    np.testing.assert_allclose(prepared.fields["returns"], [0.625, 0.0, 1.0])
    tokens = tokens_of(prepared, torch.zeros(3))
    # 0.5 -> 0.6 is within 0.2: (0.6 - 0.625)^2. 0.25 -> 0.95 counts as 0.45: (0.45 - 1)^2.
    loss = ppo.value_loss(torch.tensor([0.6, 0.0, 0.95], dtype=torch.float64), tokens)
    np.testing.assert_allclose(loss[[0, 2]], [0.5 * 0.025**2, 0.5 * 0.55**2])
    unclipped = algorithm("ppo", value_clip=0.0).value_loss(torch.tensor([0.6, 0.0, 0.95]), tokens)
    np.testing.assert_allclose(unclipped[[0, 2]], [0.5 * 0.025**2, 0.5 * 0.05**2], rtol=1e-5)


def test_value_loss_against_differences():
    ppo = algorithm("ppo")
    batch = ppo.prepare(batch_of([trajectory("####", 1.0)]).having(values=np.array([0.5, 0.5, 0.5, 0.5])))
    values = np.array([0.55, 0.9, 0.1, 1.4])

    def loss(x):
        return ppo.value_loss(torch.as_tensor(x), tokens_of(batch, torch.zeros(4))).sum()

    np.testing.assert_allclose(gradient(loss, values), difference_quotients(loss, values), atol=1e-7)


def test_metrics_by_hand():
    grpo = algorithm("grpo", decoupled=True, kl="loss", correction="mask-token", correction_high=1.2, minibatches=2)
    old, behaviour = [-1.0, -1.0, -2.0], [-1.0, -1.5, -2.0]
    batch = batch_of([trajectory("##", 1.0, behaviour[:2]), trajectory("#", 0.0, behaviour[2:])])
    prepared = grpo.prepare(batch.having(old=np.array(old), reference=np.full(3, -1.0)))
    current = np.array([-1.0, -0.5, -2.5])
    _, metrics = grpo.loss(tokens_of(prepared, torch.tensor(current)))
    rise, fall = math.exp(0.5), math.exp(-0.5)
    expected = {
        "kl": [0.0, rise - 1.5, fall - 0.5],
        "ratio": [1.0, rise, fall],
        "clip_fraction": [0, 1, 1],
        "mismatch": [0.0, 0.5, 0.0],
        "bit_equal": [1, 0, 1],
        "rho": [1.0, rise, 1.0],
        "rho_squared": [1.0, math.e, 1.0],
        "entropy": [1.0, 0.5, 2.5],
        "corrected": [0, 1, 0],
        "reference_kl": [0.0, fall - 0.5, math.exp(1.5) - 2.5],
    }
    assert tuple(expected) == grpo.metrics
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, atol=1e-12, err_msg=name)


def test_entropy_is_that_of_the_whole_distribution_where_it_is_known():
    rloo = algorithm("rloo", entropy_coefficient=0.5)
    batch = rloo.prepare(batch_of([trajectory("##", 1.0), trajectory("#", 0.0)]))
    entropy = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    loss_T, metrics = rloo.loss(tokens_of(batch, torch.full((3,), -1.0, dtype=torch.float64), entropy=entropy))
    np.testing.assert_allclose(loss_T.detach(), [-1.05, -1.1, 0.85])
    assert metrics["entropy"].tolist() == [0.1, 0.2, 0.3]
    loss_T.sum().backward()
    assert entropy.grad.tolist() == [-0.5] * 3


@pytest.mark.parametrize("correction", ["icepop", "mask-token"])
def test_dropping_tokens_leaves_the_others_as_they_were(correction):
    """The denominator is that of all tokens: survivors do not count for more."""
    batch = batch_of([trajectory("###", 1.0, [-1.0, -9.0, -1.0]), trajectory("##", 0.0)])
    lp = np.full(5, -1.0)
    plain, masked = algorithm("dapo", decoupled=True), algorithm("dapo", decoupled=True, correction=correction)
    before, after = (gradient(partial(total_loss, a, a.prepare(batch)), lp) for a in (plain, masked))
    np.testing.assert_allclose(after, np.where(np.arange(5) == 1, 0.0, before))
    assert before[1] != 0


def test_decoupled_loss_by_hand():
    """-w min(r A, clip(r) A): r of current over old, w of old over the engine's (Hilton et al. 2022)."""
    rloo = algorithm("rloo", correction="tis", epochs=2)
    batch = batch_of([trajectory("#", 1.0, [-1.2]), trajectory("#", 0.0, [-3.0])]).having(old=np.array([-1.1, -1.1]))
    loss_T, _ = rloo.loss(tokens_of(rloo.prepare(batch), torch.tensor([-1.0, -1.0], dtype=torch.float64)))
    np.testing.assert_allclose(loss_T, [-math.exp(0.1) * math.exp(0.1), 2.0 * math.exp(0.1)], rtol=1e-6)


def test_stale_samples_are_corrected_by_the_ratio_where_nothing_is_decoupled():
    rloo = algorithm("rloo")
    batch = batch_of([trajectory("#", 1.0, [-1.1]), trajectory("#", 0.0, [-2.0])])
    loss_T, _ = rloo.loss(tokens_of(rloo.prepare(batch), torch.tensor([-1.0, -1.0], dtype=torch.float64)))
    np.testing.assert_allclose(loss_T, [-math.exp(0.1), math.exp(1.0)], rtol=1e-6)


def test_gspo_by_hand():
    """Both tokens have the sequence's ratio exp((0.2 - 0.1) / 2), and each its share of the gradient."""
    gspo = algorithm("gspo", clip_high=0.5, minibatches=2)
    batch = batch_of([trajectory("#.#", 1.0), trajectory("#", 0.0)]).having(old=np.array([-1.2, 7.0, -0.9, -1.0]))
    lp, scale = np.array([-1.0, -3.0, -1.0, -1.0]), 0.5 / math.sqrt(0.5)
    loss_T, metrics = gspo.loss(tokens_of(gspo.prepare(batch), torch.tensor(lp)))
    np.testing.assert_allclose(metrics["ratio"], [math.exp(0.05)] * 3 + [1.0], rtol=1e-6)
    np.testing.assert_allclose(loss_T, [-scale * math.exp(0.05), 0.0, -scale * math.exp(0.05), scale], rtol=1e-5)
    found = gradient(partial(total_loss, gspo, gspo.prepare(batch)), lp)
    np.testing.assert_allclose(found, np.array([-math.exp(0.05), 0.0, -math.exp(0.05), 2.0]) * scale / 4, rtol=1e-5)


def test_cispo_teaches_clipped_tokens():
    """Where PPO's clip would stop the gradient, the bounded weight goes on multiplying it."""
    batch = batch_of([trajectory("#", 1.0, [-3.0]), trajectory("#", 0.0, [-1.0])])
    lp = np.array([-1.0, -1.0])
    scale = 0.5 / math.sqrt(0.5) / 2
    cispo, dapo = algorithm("cispo"), algorithm("dapo")
    np.testing.assert_allclose(
        gradient(partial(total_loss, cispo, cispo.prepare(batch)), lp), [-5 * scale, scale], rtol=1e-5
    )
    np.testing.assert_allclose(gradient(partial(total_loss, dapo, dapo.prepare(batch)), lp), [0.0, scale], rtol=1e-5)


def test_minibatches_are_weighed_by_their_own_counts():
    dapo = algorithm("dapo", minibatches=2, epochs=3)
    prepared = dapo.prepare(batch_of([trajectory("###", 1.0), trajectory(".#", 0.0)], [trajectory("##", 0.0)]))
    updates = dapo.updates(prepared)
    assert [update.tokens.size for update in updates] == [5, 2] * 3
    for update in updates:
        assert update.fields["weights"].sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(updates[0].fields["advantages"], prepared.fields["advantages"][:5])


def test_one_update_is_the_batch():
    prepared = algorithm("grpo").prepare(batch_of([trajectory("###", 1.0), trajectory(".#", 0.0)]))
    (update,) = algorithm("grpo").updates(prepared)
    np.testing.assert_array_equal(update.tokens, prepared.tokens)
    for name, values in prepared.fields.items():
        np.testing.assert_array_equal(update.fields[name], values)
