"""TV-L1 in plain torch operations, the oracle of the GPU kernels: the same schedule, without any early stop."""

from __future__ import annotations

import torch
from torch.nn.functional import grid_sample, interpolate, pad

from pipelines.tvl1.params import TVL1Params
from pipelines.tvl1.pyramid import pyramid_sizes

FLAT = 1e-6  # squared gradient below which a pixel says nothing about its motion


@torch.inference_mode()
def solve(first: torch.Tensor, second: torch.Tensor, params: TVL1Params) -> torch.Tensor:
    """Flow (B, H, W, 2) float32 between two batches of frames (B, H, W) uint8, coarse to fine."""
    sizes = pyramid_sizes(first.shape[1], first.shape[2], params)
    images = [torch.stack([first, second], 1).float()]
    for size in sizes[1:]:
        images.append(resize(images[-1], size))
    state = first.new_zeros((len(first), 6, *sizes[-1]), dtype=torch.float32)
    for level in reversed(range(len(sizes))):
        state = upsample(state, sizes[level])
        for _ in range(params.num_warps):
            data = linearise(images[level], state[:, :2])
            state = iterate(state, data, params)
            if params.median == 3:
                state[:, :2] = median3x3(state[:, :2])
    return state[:, :2].permute(0, 2, 3, 1).contiguous()


def upsample(state: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """State (B, 6, h, w) of u, v and their duals (u_x, u_y, v_x, v_y) at the next scale's size; flow is scaled."""
    height, width = state.shape[2:]
    if (height, width) == size:
        return state
    state = resize(state, size)
    state[:, 0] *= size[1] / width
    state[:, 1] *= size[0] / height
    state[:, 2::2, :, -1] = 0
    state[:, 3::2, -1] = 0
    return state


def linearise(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Data term (B, 4, H, W) around the flow (B, 2, H, W): grad x, grad y, rho at flow 0, and 1 / |grad|^2."""
    warped = warp(images[:, 1:], flow)
    padded = pad(warped, (1, 1, 1, 1), mode="replicate")
    grad_x = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    grad_y = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    rho = warped - images[:, :1] - grad_x * flow[:, :1] - grad_y * flow[:, 1:]
    inverse = 1 / (grad_x * grad_x + grad_y * grad_y).clamp(min=FLAT)
    return torch.cat([grad_x, grad_y, rho, inverse], 1)


def warp(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Images (B, 1, H, W) at x + flow, clamped to the frame, by torch's bicubic kernel (a = -0.75)."""
    height, width = image.shape[2:]
    x = (torch.arange(width, device=flow.device) + flow[:, 0]).clamp(0, width - 1)
    y = (torch.arange(height, device=flow.device)[:, None] + flow[:, 1]).clamp(0, height - 1)
    grid = torch.stack([x * (2 / max(width - 1, 1)) - 1, y * (2 / max(height - 1, 1)) - 1], -1)
    return grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=True)


def iterate(state: torch.Tensor, data: torch.Tensor, params: TVL1Params) -> torch.Tensor:
    """State after all primal-dual iterations of one warp."""
    for _ in range(params.num_iterations):
        state = iterate_once(state, data, params.theta, params.lambda_ * params.theta, params.tau / params.theta)
    return state


def iterate_once(
    state: torch.Tensor, data: torch.Tensor, coupling: float, data_step: float, dual_step: float
) -> torch.Tensor:
    """One iteration in plain torch: primal step, then dual step (the equations of params.py)."""
    flow, dual_x, dual_y = state[:, :2], state[:, 2::2], state[:, 3::2]
    grad, rho, inverse = data[:, :2], data[:, 2:3], data[:, 3:]
    t = (-(rho + (grad * flow).sum(1, keepdim=True)) * inverse).clamp(-data_step, data_step)
    divergence = dual_x - pad(dual_x, (1, 0))[..., :-1] + dual_y - pad(dual_y, (0, 0, 1, 0))[..., :-1, :]
    flow = flow + t * grad + coupling * divergence
    slope_x = torch.diff(flow, dim=3, append=flow[..., -1:])
    slope_y = torch.diff(flow, dim=2, append=flow[..., -1:, :])
    scale = 1 / (1 + dual_step * torch.sqrt(slope_x * slope_x + slope_y * slope_y))
    dual_x, dual_y = (dual_x + dual_step * slope_x) * scale, (dual_y + dual_step * slope_y) * scale
    return torch.cat([flow, torch.stack([dual_x, dual_y], 2).flatten(1, 2)], 1)


def median3x3(flow: torch.Tensor) -> torch.Tensor:
    """3x3 median of each plane of (B, 2, H, W), edges repeated."""
    height, width = flow.shape[2:]
    padded = pad(flow, (1, 1, 1, 1), mode="replicate")
    shifted = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.stack(shifted).median(0).values


def resize(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return interpolate(planes, size=size, mode="bilinear", align_corners=False)
