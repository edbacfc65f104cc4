"""Each Triton kernel against plain torch, in Triton's interpreter or, where there is one, on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tvl1_plain as plain

from pipelines.tvl1.gpu_kernels import Machine, pitch_of
from pipelines.tvl1.gpu_kernels.iteration import LEVELS, WARPS_PER_UNIT, Grid, cut, iterate
from pipelines.tvl1.gpu_kernels.median import median3x3
from pipelines.tvl1.gpu_kernels.resampling import downscale, upsample
from pipelines.tvl1.gpu_kernels.warping import linearise, rows_of
from pipelines.tvl1.torch_backend import find_device, machine_of

DEVICE = find_device()
MACHINE = machine_of(DEVICE)
STEPS = (0.3, 0.045, 0.25 / 0.3)  # theta, lambda * theta, tau / theta
SIZES = [(1, 1), (1, 9), (7, 1), (13, 29), (20, 150)]
LARGE = [pytest.param((256, 340), marks=pytest.mark.gpu)]


def padded(planes: torch.Tensor, fill: float = 7.0) -> torch.Tensor:
    """Planes (B, P, H, W) with rows padded to the pitch, on the device; kernels must not use what is in the padding."""
    *outer, width = planes.shape
    field = torch.full((*outer, pitch_of(width)), fill)
    field[..., :width] = planes
    return field.to(DEVICE)


def random_state(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """u, v and duals that are zero where a slope would leave the frame."""
    state = torch.randn(batch, 6, *size, generator=torch.Generator().manual_seed(1)) * 0.3
    state[:, 2::2, :, -1] = state[:, 3::2, -1] = 0
    return state


def random_data(batch: int, size: tuple[int, int]) -> torch.Tensor:
    data = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(2))
    data[:, :2, 0, 0] = 0  # a flat pixel
    data[:, 3] = 1 / (data[:, :2] ** 2).sum(1).clamp(min=plain.FLAT)
    return data


def fused(state: torch.Tensor, data: torch.Tensor, levels: int, machine: Machine = MACHINE) -> torch.Tensor:
    source = padded(state[:, :2]), padded(state[:, 2:])
    target = torch.full_like(source[0], 9.0), torch.full_like(source[1], 9.0)
    size = state.shape[2], state.shape[3]
    iterate(source, target, padded(data[:, :3]), size, STEPS, levels, machine)
    return torch.cat(target, 1)[..., : size[1]].cpu()


@pytest.mark.parametrize("size", SIZES + LARGE)
@pytest.mark.parametrize("levels", [1, LEVELS])
def test_iterations_in_one_launch_equal_plain_ones(size: tuple[int, int], levels: int) -> None:
    state, data = random_state(2, size), random_data(2, size)
    expected = state
    for _ in range(levels):
        expected = plain.iterate_once(expected, data, *STEPS)
    assert (fused(state, data, levels) - expected).abs().max() < 5e-6


def test_iterations_are_the_same_bits_however_strips_are_cut() -> None:
    state, data = random_state(3, (16, 70)), random_data(3, (16, 70))
    whole = fused(state, data, 2, Machine(units=1, strips=32))
    in_segments = fused(state, data, 2, Machine(units=1000, strips=8))
    alone = fused(state[1:2], data[1:2], 2, Machine(units=1000, strips=4))
    assert torch.equal(whole, in_segments)
    assert torch.equal(whole[1:2], alone)


def test_strips_cover_a_frame_once() -> None:
    assert cut((256, 340), 64, LEVELS, units=132) == Grid(columns=7, segments=3, rows=86)
    assert cut((43, 57), 64, LEVELS, units=132).columns == 1
    for height in (1, 7, 8, 9, 100):
        grid = cut((height, 340), 1, LEVELS, units=132)
        assert (grid.segments - 1) * grid.rows < height <= grid.segments * grid.rows


def test_linearising_little_takes_short_walks() -> None:
    assert rows_of(256, 64 * 12, Machine(units=132)) == 32
    assert rows_of(43, 8 * 2, Machine(units=132)) == 8
    assert rows_of(3, 1, Machine(units=132)) == 3


@pytest.mark.parametrize("size", SIZES + LARGE)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_linearise_equals_plain_torch(size: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, *size), generator=generator).to(dtype)
    flow = torch.randn(2, 2, *size, generator=generator) * 5  # out of the small frames, too
    data = torch.zeros(2, 3, size[0], pitch_of(size[1]), device=DEVICE)
    linearise(images.to(DEVICE), padded(flow), data, size, MACHINE)
    expected = plain.linearise(torch.stack([images[:-1], images[1:]], 1).float(), flow)[:, :3]
    # A gradient changes by so much where x + u, at 300, is rounded otherwise; rho is the gradient times 15 px more.
    assert (data[..., : size[1]].cpu() - expected)[:, :2].abs().max() < 1e-2
    assert (data[..., : size[1]].cpu() - expected)[:, 2].abs().max() < 1e-1


@pytest.mark.parametrize("size", SIZES + LARGE)
def test_the_median_equals_plain_torch(size: tuple[int, int]) -> None:
    flow = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(4)).round(decimals=1)  # with ties
    target = torch.zeros(3, 2, size[0], pitch_of(size[1]), device=DEVICE)
    median3x3(padded(flow), target, size, MACHINE)
    assert torch.equal(target[..., : size[1]].cpu(), plain.median3x3(flow))


@pytest.mark.parametrize(("size", "new_size"), [((1, 1), (1, 1)), ((20, 25), (16, 20)), ((13, 150), (10, 120))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_downscaling_equals_plain_torch(size: tuple[int, int], new_size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(5)).to(dtype)
    target = torch.zeros(3, new_size[0], pitch_of(new_size[1]), device=DEVICE)
    downscale(images.to(DEVICE), target, size, new_size, MACHINE)
    expected = plain.resize(images[None].float(), new_size)[0]
    assert (target[..., : new_size[1]].cpu() - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("size", "new_size"), [((1, 1), (2, 2)), ((16, 20), (20, 25)), ((10, 120), (13, 150))])
def test_upsampling_equals_plain_torch(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    state = random_state(2, size)
    target = tuple(torch.zeros(2, planes, new_size[0], pitch_of(new_size[1]), device=DEVICE) for planes in (2, 4))
    upsample((padded(state[:, :2]), padded(state[:, 2:])), (target[0], target[1]), size, new_size, MACHINE)
    found = torch.cat(target, 1)[..., : new_size[1]].cpu()
    assert (found - plain.upsample(state, new_size)).abs().max() < 1e-4


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_kernels.py")), "90"]
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert {row["kernel"] for row in found} > {"iterate_strips", "linearise_strips", "median_pixels"}
    assert all(row["STACK"] == row["SHARED"] == row["LOCAL"] == 0 for row in found)
    # Two rows of the image and the flow between, in either form of the image; of five iterations two rows of ten fields
    # each, less what nobody reads of the last, the next row and its number: what a loop carries on, it must not lose.
    carried = {row["kernel"]: row["carried"] for row in found}
    assert carried["linearise_strips"] == [4]
    assert carried["iterate_strips"] == [1 + 20 + 20 * LEVELS - 8]
    # 65,536 registers on a multiprocessor, 32 threads a warp.
    assert found[0]["REG"] * 32 * WARPS_PER_UNIT <= 65_536
