import pytest
import torch

from dfsattn_diffusers.configs.config import ORDERS
from dfsattn_diffusers.curves import inverse_order, visiting_order

GRIDS = [(13, 30, 45), (21, 45, 80), (33, 45, 80), (1, 7, 9), (5, 1, 3), (1, 1, 1), (8, 8, 8)]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_order_visits_every_token_once_and_can_be_undone(name, grid):
    order = visiting_order(name, grid)
    count = torch.arange(grid[0] * grid[1] * grid[2])
    assert torch.equal(order.sort().values, count)
    assert torch.equal(order[inverse_order(order)], count)
    assert torch.equal(inverse_order(order)[order], count)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hilbert_curve_of_a_cube_moves_one_cell_at_a_time(bits):
    side = 1 << bits
    order = visiting_order("hilbert3d", (side, side, side))
    cells = torch.stack([order // side**2, order // side % side, order % side], 1)
    assert ((cells[1:] - cells[:-1]).abs().sum(1) == 1).all()


def test_hilbert_curve_of_a_frame_moves_one_cell_at_a_time():
    order = visiting_order("hilbert2d", (3, 8, 8)).view(3, 64)
    cells = torch.stack([order // 8 % 8, order % 8], -1)
    assert torch.equal(order // 64, torch.arange(3)[:, None].expand(3, 64))
    assert ((cells[:, 1:] - cells[:, :-1]).abs().sum(-1) == 1).all()


def test_blocks_along_the_curve_are_compact():
    """128 tokens of the curve span a far smaller box than 128 tokens of a raster scan."""

    def mean_box(name):
        order = visiting_order(name, (16, 30, 45))[: 16 * 30 * 45 // 128 * 128].view(-1, 128)
        cells = torch.stack([order // 1350, order // 45 % 30, order % 45], -1)
        return (cells.amax(1) - cells.amin(1) + 1).float().mean(0)

    assert mean_box("hilbert3d").max() < 8
    assert mean_box("raster").max() > 40


def test_cuboid_order_fills_boxes():
    first = visiting_order("cuboid", (8, 8, 16))[:128]
    cells = torch.stack([first // 128, first // 16 % 8, first % 16], -1)
    assert (cells.amax(0) - cells.amin(0) + 1).tolist() == [4, 4, 8]


def test_bad_input():
    with pytest.raises(ValueError, match="order must be one of hilbert3d"):
        visiting_order("peano", (2, 2, 2))
    with pytest.raises(ValueError, match=r"three sizes of at least 1; got \(0, 2, 2\)"):
        visiting_order("raster", (0, 2, 2))
