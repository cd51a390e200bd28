"""Distillation losses against hand-computed numbers and per-token loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amoeba_plugin.training.next_token import next_token_rows, shifted_target_mask, sum_over_rows, target_positions
from amoeba_plugin.training.one_for_all.losses import DIVERGENCES, balance, distilled_rows

LN2, LN3 = math.log(2), math.log(3)


def mean(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return a divergence's mean over rows, as a step takes it: chunk by chunk."""
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)

    def row_loss(part: Tensor, place: slice) -> Tensor:
        return DIVERGENCES[name](part, teacher[place].to(part.dtype), temperature) / len(teacher)

    return sum_over_rows(row_loss, student, torch.arange(len(teacher)))


def log_odds(probability: float) -> list[float]:
    """Two logits whose softmax is (probability, 1 - probability)."""
    return [math.log(probability), math.log(1 - probability)]


# Expected values by hand, for p_T = (3/4, 1/4) and p_S = (1/2, 1/2):
#   soft cross-entropy = -(3/4 + 1/4) ln(1/2) = ln 2;  teacher entropy H = 2 ln 2 - 3/4 ln 3
#   KL(T||S) = ln 2 - H;  KL(S||T) = 1/2 ln(2/3) + 1/2 ln 2
#   m = (5/8, 3/8); JS = 1/2 [3/4 ln(6/5) + 1/4 ln(2/3)] + 1/2 [1/2 ln(4/5) + 1/2 ln(4/3)]
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("soft_cross_entropy", LN2),
        ("kl", LN2 - (2 * LN2 - 0.75 * LN3)),
        ("reverse_kl", 0.5 * math.log(2 / 3) + 0.5 * LN2),
        (
            "jensen_shannon",
            0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)) + 0.25 * (math.log(4 / 5) + math.log(4 / 3)),
        ),
    ],
)
def test_divergences_equal_hand_computed_numbers(name: str, expected: float):
    student, teacher = torch.tensor([log_odds(0.5)]), torch.tensor([log_odds(0.75)])
    assert mean(name, student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_gradients_are_not_multiplied_by_the_temperature_squared(temperature: float):
    logits = torch.randn(2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    mean("soft_cross_entropy", student, teacher, temperature).backward()
    difference = (logits[0] / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, difference / temperature)
    if temperature == 1000.0:  # (s - t) / (n T^2) for centred logits (arXiv:1503.02531, eq. 4)
        s, t = logits - logits.mean(dim=-1, keepdim=True)
        torch.testing.assert_close(student.grad, (s - t) / (7 * temperature**2), rtol=0.02, atol=1e-9)


def test_balancing_would_undo_a_factor_on_the_loss():
    largest, loss = torch.tensor(3.0), torch.tensor(2.0)
    assert balance(4 * loss, largest) * 4 * loss == balance(loss, largest) * loss


def test_temperature_divides_both_logits():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = mean("soft_cross_entropy", student, teacher, temperature=2.0)
    assert found.item() == pytest.approx(mean("soft_cross_entropy", student / 2, teacher / 2).item(), abs=1e-6)


def test_balanced_objective_and_gradient_by_hand():
    # One position, two classes. Largest: label 0, p = 1/2, so L_1 = ln 2. Student: p_S = (1/4, 3/4), p_T = (1/2, 1/2):
    # L_2 = -1/2 ln(1/4) - 1/2 ln(3/4) = ln 4 - 1/2 ln 3; ratio = ln 2 / L_2; value of the scaled loss = L_1 = ln 2.
    # dL_2/ds = p_S - p_T = (-1/4, 1/4), so the gradient is ratio * (-1/4, 1/4).
    student = torch.tensor([log_odds(0.25)], requires_grad=True)
    teacher = torch.tensor([log_odds(0.5)])
    largest = torch.tensor(LN2, requires_grad=True)
    loss = mean("soft_cross_entropy", student, teacher)
    ratio = balance(loss, largest)
    scaled = ratio * loss
    scaled.backward()
    expected = LN2 / (2 * LN2 - 0.5 * LN3)
    assert scaled.item() == pytest.approx(LN2, abs=1e-6)
    assert ratio.item() == pytest.approx(expected, abs=1e-6)
    assert student.grad.tolist() == [pytest.approx([-expected / 4, expected / 4], abs=1e-6)]
    assert largest.grad is None


def test_balance_is_bounded_and_defined_at_zero():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert balance(torch.tensor(1e-9), one, max_ratio=5.0) == 5.0
    assert balance(zero, one, max_ratio=5.0) == 5.0
    assert balance(zero, zero) == balance(one, zero) == 1.0
    assert balance(one, torch.tensor(math.nan)).isnan()
    assert balance(torch.tensor(math.nan), one).isnan()


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_a_divergence_that_is_rounded_below_zero_turns_no_gradient_round(name: str):
    generator = torch.Generator().manual_seed(0)
    teachers = torch.randn(20, 64, 1000, generator=generator)
    losses = [mean(name, each + 1e-5 * torch.randn(64, 1000, generator=generator), each) for each in teachers]
    assert min(losses) < 0
    assert all(balance(loss, torch.tensor(3.0)) == 10.0 for loss in losses)


def test_the_mask_is_shifted():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [3, -100, -100, -100, 9]])
    # The reference distils where the own label is a target: it misses the one before the response, and adds its end.
    assert shifted_target_mask(labels).tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, False],
    ]


def test_all_tokens_leaves_out_padding_but_keeps_labels():
    labels = torch.tensor([[-100, -100, 7, -100], [-100, 4, 5, 6]])
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    positions = target_positions(labels, attention_mask, all_tokens=True)
    assert positions.columns.tolist() == [0, 1, 2]
    assert positions.rows.tolist() == [0, 1, 3, 4, 5]
    assert positions.labels.tolist() == [-100, 7, 4, 5, 6]
    assert positions.num_targets == 4


def per_token(
    student: Tensor, teacher: Tensor, labels: Tensor, attention: Tensor, all_tokens: bool, kd_weight: float
) -> float:
    """The definition: token after token, in float64."""
    distillation, cross_entropy = [], []
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = int(labels[row, t + 1])
            p_teacher = torch.softmax(teacher[row, t].double(), -1)
            log_student = torch.log_softmax(student[row, t].double(), -1)
            if label != -100 or (all_tokens and attention[row, t] and attention[row, t + 1]):
                distillation.append(-sum(float(p_teacher[v] * log_student[v]) for v in range(len(p_teacher))))
            if label != -100:
                cross_entropy.append(-float(log_student[label]))
    mean = [sum(values) / max(1, len(values)) for values in (distillation, cross_entropy)]
    return kd_weight * mean[0] + (1 - kd_weight) * mean[1]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    density=st.floats(0, 1),
    all_tokens=st.booleans(),
    kd_weight=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_distilled_rows_add_up_to_a_loop_over_tokens(
    lengths: list[int], seed: int, density: float, all_tokens: bool, kd_weight: float
):
    generator = torch.Generator().manual_seed(seed)
    batch, length, vocabulary = len(lengths), max(lengths), 5
    attention = torch.tensor([[int(t < n) for t in range(length)] for n in lengths])
    chosen = (torch.rand(batch, length, generator=generator) < density) & (attention == 1)
    labels = torch.where(chosen, torch.randint(vocabulary, (batch, length), generator=generator), -100)
    student, teacher = (torch.randn(batch, length, vocabulary, generator=generator) for _ in range(2))
    positions = target_positions(labels, attention, all_tokens)
    flat_student, flat_teacher = (logits[:, positions.columns].flatten(0, 1) for logits in (student, teacher))
    divergence = DIVERGENCES["soft_cross_entropy"]
    row_loss = distilled_rows(positions, flat_teacher[positions.rows], divergence, 1.0, kd_weight)
    found = sum_over_rows(row_loss, flat_student, positions.rows)
    expected = per_token(student, teacher, labels, attention, all_tokens, kd_weight)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    hard = per_token(student, teacher, labels, attention, False, 0.0)
    found = sum_over_rows(next_token_rows(positions), flat_student, positions.rows)
    assert found.item() == pytest.approx(hard, abs=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_value_nor_gradient(name: str, chunk: int):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    rows = torch.tensor([0, 2, 3, 7, 8])
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)

    def row_loss(student: Tensor, place: slice) -> Tensor:
        return DIVERGENCES[name](student, teacher[place], 1.5) * weights[place]

    found = sum_over_rows(row_loss, logits, rows, chunk)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    expected = (DIVERGENCES[name](logits[rows], teacher, 1.5) * weights).sum()
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_half_precision_logits_are_reduced_in_fp32():
    logits = torch.randn(4, 11, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(4, 11, dtype=torch.bfloat16)
    loss = mean("soft_cross_entropy", logits, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    in_fp32 = mean("soft_cross_entropy", logits.detach().float(), teacher.float())
    assert loss.item() == pytest.approx(in_fp32.item(), abs=1e-6)


def test_a_second_backward_is_refused():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = mean("soft_cross_entropy", logits, torch.randn(2, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_no_row_at_all_gives_zero_with_a_gradient():
    logits = torch.randn(0, 3, requires_grad=True)
    positions = target_positions(torch.full((2, 4), -100))
    loss = sum_over_rows(next_token_rows(positions), logits, positions.rows)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.shape == (0, 3)
