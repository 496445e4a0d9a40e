"""The few operations on which a DiT step spends its time, each with its plain PyTorch twin.

`dit.py` calls these functions and never asks about hardware. transformers probes for a package
of this name, hence `__version__`; nothing here imports triton or touches CUDA.
"""

__version__ = "0.0"

from kernels.attention import attention
from kernels.norm import gate_residual, layer_norm_modulate, rms_norm_rope

__all__ = ["attention", "gate_residual", "layer_norm_modulate", "rms_norm_rope"]
