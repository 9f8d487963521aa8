"""Types of numbers that settings have, each with two bounds.

The upper bounds are far from what anybody trains with. They are there so that no typing error (64e6 for 64) begins a
loop without end or asks for memory that no machine has.
"""

from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=2**14)]
"""Width of a hidden state; a square matrix of the widest takes 1 GiB."""
Few = Annotated[int, Field(ge=1, le=1024)]
"""Layers, heads, experts and virtual tokens."""
Length = Annotated[int, Field(ge=1, le=2**20)]
"""Items or tokens of one sequence, and sequences of one batch."""
Many = Annotated[int, Field(ge=1, le=10**10)]
"""Rows, steps and packed tokens."""
Epochs = Annotated[int, Field(ge=0, le=10**5)]
Patience = Annotated[int, Field(ge=1, le=10**5)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy takes no larger one."""
Rate = Annotated[float, Field(gt=0.0, le=100.0)]
Decay = Annotated[float, Field(ge=0.0, le=100.0)]
Norm = Annotated[float, Field(gt=0.0, le=1e9)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Scores of unit vectors divided by it, and their exponentials' gradients, stay in float32."""
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
