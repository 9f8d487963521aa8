"""What the optimizer keeps of every trained parameter."""

from laser_fast.config import OptimizerConfig

_BLOCK_SIZE = 256  # values of a moment in 8 bits that share one float32 scale (bitsandbytes)


def optimizer_bytes_per_parameter(config: OptimizerConfig) -> float:
    """Bytes of the optimizer's state for a trained parameter; gradients and the parameter itself come on top.

    8 for two moments in float32, 2.03 for two in 8 bits with their scales. The smallest tensors, whose moments stay in
    32 bits, are not told apart: in M-Former they are biases and norms.
    """
    return 2 * (1 + 4 / _BLOCK_SIZE) if config.eight_bit else 8.0
