"""The masks are what dropout promises: the right share, independent, the same again from the same generator."""

import pytest
import torch

from inlay.kernels.dropout import draw_bits, factors


def drawn(rows: int, columns: int, rate: float) -> torch.Tensor:
    x = torch.empty(rows, columns)
    return factors(draw_bits(x, rate), rate, (rows, columns), torch.float32)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.499, 0.5, 0.501, 0.9, 0.999])
def test_share_left_out(rate: float) -> None:
    out = torch.cat([drawn(1000, 1000, rate) for _ in range(4)]) == 0
    # Six standard deviations of the mean of four million, rounding of thresholds included.
    tolerance = 6 * (rate * (1 - rate) / 4e6 * 1.1) ** 0.5
    assert abs(out.double().mean().item() - rate) < tolerance


def test_values_keep_the_mean() -> None:
    found = drawn(64, 64, 0.25)
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_every_position_of_a_word_has_the_same_chance() -> None:
    out = (drawn(4000, 640, 0.1) == 0).double()
    assert (out.view(-1, 64).mean(0) - 0.1).abs().max() < 6 * (0.09 / 40000) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("distance", [1, 7, 8, 64, 512])
def test_neighbours_are_independent(rate: float, distance: int) -> None:
    out = (drawn(1000, 1000, rate) == 0).double().flatten() - rate
    correlation = (out[distance:] * out[:-distance]).mean() / (rate * (1 - rate))
    assert abs(correlation.item()) < 6e-3


def test_share_of_one_draw_spreads_as_it_should() -> None:
    """Thresholds are shared by few elements, so that whole draws do not wander together."""
    shares = torch.tensor([(drawn(256, 256, 0.1) == 0).double().mean().item() for _ in range(300)])
    assert shares.std().item() == pytest.approx((0.09 / 256**2) ** 0.5, rel=0.25)


def test_same_generator_same_mask() -> None:
    state = torch.get_rng_state()
    first = drawn(33, 17, 0.3)
    second = drawn(33, 17, 0.3)
    torch.set_rng_state(state)
    assert torch.equal(drawn(33, 17, 0.3), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5), (1, 8191), (1025, 9)])
def test_any_size(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    bits = draw_bits(x, 0.5)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-x.numel() // 8)
    assert factors(bits, 0.5, shape, torch.float64).shape == shape
