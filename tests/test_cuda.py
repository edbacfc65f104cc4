"""What is done for CUDA alone, as far as a CPU can tell; on a GPU the tests marked `gpu` compare both."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from test_registry import SMALL
from torch import Tensor, nn

import models
from models import cuda
from models.convolution import BatchNorm, Convolution
from models.cost import blank_clips
from models.folding import fold_batch_norm

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def interpret(*words: str) -> dict:
    """What tests/interpreted_kernels.py finds in Triton's interpreter."""
    pytest.importorskip("triton")
    script = [sys.executable, "tests/interpreted_kernels.py", *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """The Triton kernels beside PyTorch's."""
    return interpret()


@pytest.mark.slow
def test_pools_and_their_gradients_are_pytorchs(interpreted: dict) -> None:
    """Of every kernel, stride and padding of the networks, where maxima tie, and with values that are no numbers."""
    assert interpreted["pools"] == []


@pytest.mark.slow
def test_batch_norm_with_relu_is_pytorchs(interpreted: dict) -> None:
    given = {"y", "gradient of x", "gradient of weight", "gradient of bias", "running_mean", "running_var"}
    assert given <= set(interpreted["norms"])
    assert max(interpreted["norms"].values()) < 2e-5
    assert interpreted["bias_relu"] == 0
    assert interpreted["blocks"] == 0


@pytest.mark.slow
def test_the_pool_is_an_operation_that_compiles() -> None:
    assert set(interpret("operations").values()) == {"SUCCESS"}


@pytest.mark.slow
def test_kernels_compile_for_an_h100_and_read_whole_lines() -> None:
    """A vector of four words is eight numbers in bfloat16."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", "tests/compile_network_kernels.py", "90"]
    environment["PYTHONPATH"] = str(ROOT)
    out = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 9
    assert [row for row in found if row["bytes"] < 1000 or not row["vectors"]] == []


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [
        (3, (7, 7, 7), (2, 2, 2), (8, 12, 12)),
        (2, (7, 7, 7), (2, 2, 2), (7, 9, 11)),
        (3, (1, 7, 7), (1, 2, 2), (2, 12, 9)),
        (3, (3, 3, 3), (1, 1, 1), (4, 6, 5)),
        (2, (5, 7, 7), (1, 2, 2), (3, 4, 2)),
        (1, (2, 1, 5), (3, 2, 1), (7, 5, 3)),
    ],
)
def test_a_clip_in_blocks_convolves_the_same_gradients_included(channels, kernel, stride, size):
    conv = Convolution(channels, 5, kernel, stride=stride, bias=True).double()
    clip = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    clip.requires_grad_()
    expected = conv(clip)
    found = cuda.convolve_clip(clip, conv.weight, conv.bias, stride)
    wanted = (clip, conv.weight, conv.bias)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, wanted, dy), torch.autograd.grad(expected, wanted, dy))


def test_a_clip_in_blocks_suits_tensor_cores(monkeypatch):
    """What reaches cuDNN has a multiple of eight channels, lies in memory as it likes, and is in half precision."""
    seen = []
    convolve = nn.functional.conv3d
    monkeypatch.setattr(
        nn.functional, "conv3d", lambda x, weight, *rest: seen.append((x, weight)) or convolve(x, weight, *rest)
    )
    for channels in (2, 3):
        conv = Convolution(channels, 8, (7, 7, 7), stride=(2, 2, 2))
        cuda.convolve_clip(torch.randn(1, channels, 8, 16, 16).bfloat16(), conv.weight, None, conv.stride)
    assert [x.shape[1] for x, _ in seen] == [16, 24]
    for tensor in (tensor for pair in seen for tensor in pair):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


def random_clips(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    clips = blank_clips(model.input_spec.train, model.input_spec.size, batch=batch)
    return {stream: torch.rand_like(clip) * 2 - 1 for stream, clip in clips.items()}


def small(name: str, **settings: object) -> nn.Module:
    return models.build(name, num_classes=5, width=0.25, dropout=0.0, **SMALL[name], **settings)


@torch.no_grad()
@pytest.mark.parametrize("name", models.CONFIGS)
def test_layers_for_cuda_keep_names_parameters_and_on_a_cpu_their_results(name):
    model = small(name)
    clips, expected = random_clips(model), copy.deepcopy(model)
    adapted = cuda.adapt(copy.deepcopy(model))
    assert list(adapted.state_dict()) == list(model.state_dict())
    assert torch.equal(adapted(clips), expected(clips))
    assert torch.equal(cuda.adapt(fold_batch_norm(adapted))(clips), fold_batch_norm(expected)(clips))
    assert {type(module) for module in adapted.modules()} & set(cuda.TRITON_FORMS.values())


def rehearse(module: nn.Module, clips: tuple[Tensor, ...]) -> nn.Module:
    """What PyTorch does before it records, here without recording."""
    for _ in range(3):
        module(*clips).sum().backward()
    module.zero_grad()
    return module


def test_recording_leaves_weights_statistics_and_random_numbers_as_they_were(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", rehearse)
    model = models.build("c3d", num_classes=5, width=0.25, **SMALL["c3d"]).train()
    next(module for module in model.modules() if isinstance(module, BatchNorm)).eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clips, seed = random_clips(model), torch.get_rng_state()
    recorded = cuda.record(model, clips, "fp32")
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    logits = recorded(dict(reversed(clips.items())))
    torch.set_rng_state(seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(before[name])
    assert torch.equal(logits, model(clips))


def test_statistics_are_put_back_where_recording_fails(monkeypatch):
    def fail(module: nn.Module, clips: tuple[Tensor, ...]) -> None:
        rehearse(module, clips)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    model = small("two_stream").train()
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match="capturing"):
        cuda.record(model, random_clips(model), "fp32")
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), before, strict=True))


def test_on_a_cpu_nothing_is_changed():
    model = small("i3d")
    kinds = [type(module) for module in model.modules()]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    cuda.set_up(CPU, "fp32", training=False)
    assert [type(module) for module in cuda.place(model, CPU).modules()] == kinds
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.fixture
def _precisions() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("_precisions")
@pytest.mark.parametrize(
    ("precision", "training", "allowed", "words"),
    [
        ("fp32", True, True, "fp32, products in TensorFloat-32"),
        ("fp32", False, False, "fp32, no TensorFloat-32"),
        ("bf16", True, False, "bf16, sums and logits in fp32"),
        ("fp16", False, False, "fp16, sums and logits in fp32"),
    ],
)
def test_tensorfloat_is_one_choice_for_convolutions_and_products(monkeypatch, precision, training, allowed, words):
    monkeypatch.setattr(cuda, "check_convolution", lambda *_, **__: None)
    cuda.set_up(torch.device("cuda"), precision, training=training)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
    assert torch._C._get_cublas_allow_tf32() == allowed  # as torch.compile asks, which a mixture of names would end
    assert torch.backends.cudnn.benchmark == (training and precision == "fp32")
    assert cuda.describe(precision, training=training) == words


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", cuda.DTYPES)
def test_right_convolutions_pass_the_check(precision, training):
    cuda.check_convolution(CPU, precision, training=training)


def wrong_in(place: str, amount: float):
    """A conv3d that in bf16 is off by a share in its value or in its gradients, as that of PyTorch 2.9 was."""
    convolve = nn.functional.conv3d

    def conv3d(x, *rest):
        y = convolve(x, *rest)
        if x.dtype != torch.bfloat16:
            return y
        return y * (1 + amount) if place == "value" else y.detach() + (y - y.detach()) * (1 + amount)

    return conv3d


@pytest.mark.parametrize("place", ["value", "gradient"])
@pytest.mark.parametrize("amount", [0.05, float("nan")])
def test_wrong_convolutions_end_a_run_with_the_versions_named(monkeypatch, place, amount):
    monkeypatch.setattr(nn.functional, "conv3d", wrong_in(place, amount))
    with pytest.raises(
        cuda.ConvolutionError, match=rf"conv3d in bf16 is off by .* torch {torch.__version__[:4]}.* cuDNN"
    ):
        cuda.check_convolution(CPU, "bf16", training=True)
    cuda.check_convolution(CPU, "fp32", training=True)


def test_synchronised_batch_norm_keeps_parameters_names_and_the_constant_ones():
    for model in (small("i3d"), small("c3d")):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        order = [name for name, _ in model.named_parameters()]
        model = cuda.synchronise_batch_norm(model)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert all(type(norm) is nn.SyncBatchNorm and norm.weight is not None for norm in norms)
        assert [name for name, _ in model.named_parameters()] == order
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[torch.distributed.ProcessGroup]:
    """A group of this process alone, which gathers and reduces as several do."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of synchronised batch norm that PyTorch has for GPUs only, by their definitions, with their rule."""
    axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)

    def gather(x, means, inverses, running_mean, running_var, momentum, eps, counts):
        return means[0], inverses[0]

    def normalise(x, weight, bias, mean, inverse, eps):
        return (x - mean.view(shape)) * (inverse * weight).view(shape) + bias.view(shape)

    def reduce(dy, x, mean, inverse, weight, *wanted):
        along = (dy * (x - mean.view(shape))).sum(axes)
        return dy.sum(axes), along, along * inverse, dy.sum(axes)

    def input_gradient(dy, x, mean, inverse, weight, total, along, counts):
        count = counts.sum()
        centred = (x - mean.view(shape)) * (inverse**2 * along / count).view(shape)
        return (dy - (total / count).view(shape) - centred) * (inverse * weight).view(shape)

    monkeypatch.setattr(
        torch, "batch_norm_stats", lambda x, eps: (x.mean(axes), (x.var(axes, correction=0) + eps).rsqrt())
    )
    monkeypatch.setattr(torch, "batch_norm_gather_stats_with_counts", gather)
    monkeypatch.setattr(torch, "batch_norm_elemt", normalise)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", input_gradient)


def test_synchronised_batch_norm_trains_its_bias(monkeypatch, group):
    """PyTorch's own function, of which a module without weight gets no gradient of its bias."""
    kernels_on_a_cpu(monkeypatch)
    plain = BatchNorm(4, momentum=0.1)
    sync = cuda.synchronise_batch_norm(nn.Sequential(copy.deepcopy(plain)))[0]
    dy = torch.randn(2, 4, 2, 3, 3)
    x, leaf = (torch.ones_like(dy).cumsum(0).cos().mul(dy).requires_grad_() for _ in range(2))
    plain(leaf).backward(dy)
    apply = torch.nn.modules._functions.SyncBatchNorm.apply
    apply(x, sync.weight, sync.bias, sync.running_mean, sync.running_var, sync.eps, 0.1, group, 1).backward(dy)
    torch.testing.assert_close(sync.bias.grad, plain.bias.grad)
    torch.testing.assert_close(x.grad, leaf.grad)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def take_step(model: nn.Module, clips: dict[str, Tensor], device: torch.device, precision: str) -> dict[str, Tensor]:
    """Loss, logits and gradients of one training step, on the CPU in fp64."""
    model = cuda.place(copy.deepcopy(model), device).train()
    labels = torch.tensor([0, 1], device=device)
    with torch.autocast(device.type, cuda.DTYPES[precision], enabled=precision != "fp32"):
        logits = model({stream: clip.to(device) for stream, clip in clips.items()})
    loss = models.cross_entropies(logits, labels).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: t.detach().double().cpu() for name, t in {"loss": loss, "logits": logits, **gradients}.items()}


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Loss and logits to three digits, gradients to a tenth, and each of their tensors to a half.

    A ReLU or a maximum that is decided by the last digit changes the gradient of a layer by up to a tenth, in fp32
    against fp64 on one CPU as well; a gradient that is missing, zero or of other clips is off by all of itself.
    """
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-3, rtol=0)
    off = {name: (found[name] - right).norm() for name, right in expected.items()}
    assert off["logits"] <= 3e-3 * expected["logits"].norm()
    assert all(off[name] <= 0.5 * right.norm() for name, right in expected.items())
    names = expected.keys() - {"loss", "logits"}
    total, error = (sum(norms[name] ** 2 for name in names) ** 0.5 for norms in (all_norms(expected), off))
    assert error <= 0.1 * total


def all_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.norm() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["i3d", "convnet_lstm"])
def test_a_step_in_fp32_is_that_in_fp64(name):
    """By the bounds of the test on a GPU, which are not so wide that a wrong gradient of one bias would pass."""
    model = small(name)
    clips = random_clips(model)
    found = take_step(model, clips, CPU, "fp32")
    expected = take_step(copy.deepcopy(model).double(), {s: clip.double() for s, clip in clips.items()}, CPU, "fp32")
    assert_same_step(found, expected)
    bias = next(key for key in found if key.endswith("bn.bias"))
    with pytest.raises(AssertionError):
        assert_same_step(found | {bias: torch.zeros_like(found[bias])}, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_precisions")
@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_step_on_a_gpu_is_that_on_the_cpu(name):
    device = torch.device("cuda")
    cuda.set_up(device, "fp32", training=False)  # no TensorFloat-32
    model = small(name)
    clips = random_clips(model)
    assert_same_step(take_step(model, clips, device, "fp32"), take_step(model, clips, CPU, "fp32"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_precisions")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_half_precision_on_a_gpu_trains_and_infers(name, precision):
    device = torch.device("cuda")
    cuda.set_up(device, precision, training=True)
    model = small(name)
    clips = random_clips(model)
    found, expected = take_step(model, clips, device, precision), take_step(model, clips, CPU, "fp32")
    assert (found["loss"] - expected["loss"]).abs() < 0.3  # 0.21 of C3D's, whose batch norm here sees two clips
    assert all(torch.isfinite(value).all() for value in found.values())
    model.eval()
    folded = cuda.place(fold_batch_norm(model, dtype=cuda.DTYPES[precision]), device)
    with torch.no_grad():
        logits, exact = folded({stream: clip.to(device) for stream, clip in clips.items()}).cpu(), model(clips)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_precisions")
@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_recorded_step_is_the_same_on_a_gpu(name):
    device = torch.device("cuda")
    cuda.set_up(device, "bf16", training=True)
    plain = cuda.place(small(name), device).train()
    recorded = copy.deepcopy(plain)
    step = cuda.record(recorded, {s: clip.to(device) for s, clip in random_clips(plain).items()}, "bf16")
    for _ in range(3):
        clips = {stream: clip.to(device) for stream, clip in random_clips(plain).items()}
        labels = torch.tensor([0, 1], device=device)
        for model, forward in ((plain, plain), (recorded, step)):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                logits = forward(clips)
            models.cross_entropies(logits, labels).mean().backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.01 * weight.grad
    for (name, tensor), other in zip(plain.state_dict().items(), recorded.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, msg=name)


@pytest.mark.gpu
@needs_gpu
def test_kernels_compiled_for_a_gpu_are_those_interpreted():
    """Pools to the bit, gradients included, with many channels and positions."""
    clip = torch.randint(5, (2, 192, 6, 28, 28)).float().contiguous(memory_format=torch.channels_last_3d)
    for kernel, stride in (
        ((1, 3, 3), (1, 2, 2)),
        ((3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1, 1, 1)),
    ):
        pool = models.convolution.MaxPool(kernel, stride)
        on_gpu, on_cpu = clip.cuda().requires_grad_(), clip.clone().requires_grad_()
        found, expected = cuda.max_pool(on_gpu, kernel, stride), pool(on_cpu)
        dy = torch.randint(9, expected.shape).float()
        found.backward(dy.cuda())
        expected.backward(dy)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(on_gpu.grad.cpu(), on_cpu.grad)
