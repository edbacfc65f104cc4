"""The one TorchScript file that Fréchet Video Distance is published with: I3D's TF-Hub weights, as a program.

A TorchScript file is no list of weights. It holds code, which `torch.jit.load` and every call run: no Python and no
Python pickle, but TorchScript's own operators, which read and write files, and an interpreter that was not made to be
a border (CVE-2025-32434 used it to get round `weights_only`). PyTorch's security policy says of such models: treat them
as locally executable code from an unknown source, and even tools that only look into them may run some of it.

So a file is run only where it is the known one, by its SHA-256, or where the caller says that it is trusted. Whoever
has the same weights as a state dict (VideoGPT's i3d_pretrained_400.pt) needs no program: `models.pretrained` reads it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

# i3d_torchscript.pt of StyleGAN-V, 51,235,320 bytes, as ten public repositories that check it independently give it.
KNOWN = {"bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2": "i3d_torchscript.pt of StyleGAN-V"}


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive; only the names in its zip directory are read."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # What torch.load goes by, too: a state dict has no constants.
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class TorchScriptI3D(torch.nn.Module):
    """Logits (B, 400) of clips by StyleGAN-V's program, whose `forward` can resize and scale the clips itself."""

    def __init__(self, path: str | Path, *, trusted: bool = False) -> None:
        """Loads the program. Raises ValueError, before anything in it is run, unless it is known or trusted."""
        super().__init__()
        data = Path(path).read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        if self.sha256 not in KNOWN and not trusted:
            raise ValueError(
                f"it is a TorchScript file, which is a program, and not {' or '.join(KNOWN.values())} (its SHA-256 is "
                f"{self.sha256}): take weights in a state dict, or say that you trust it by --trust-torchscript"
            )
        # From the bytes that were hashed: the file may be replaced meanwhile.
        self.program = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 400) of clips (B, 3, T, 224, 224) float32 in [-1, 1]."""
        return self.program(clips, rescale=False, resize=False, return_features=True)

    def resized(self, clips: Tensor) -> Tensor:
        """(B, 400) of clips (B, 3, T, H, W) of pixels 0 to 255, which the program itself resizes and scales."""
        return self.program(clips, rescale=True, resize=True, return_features=True)
