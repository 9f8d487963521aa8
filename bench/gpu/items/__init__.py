"""The ten items, in the order in which they run; 1 to 7 fit into six minutes, though not if each takes its limit.

Their files import torch where they measure, not before: the scheduler reads the names of their lines.
"""

from gpu.items import baselines, cards, checks, kernels, state, step, training, waterfall
from gpu.run import Item

_CATALOGUE, _SUITE = (kernels.catalogue_names, kernels.run_catalogue), (checks.suite_names, checks.run_suite)
ITEMS = [
    Item(1, "What there is", state.names, state.run, seconds=40, least_s=10, line_s=35),
    Item(2, "Kernels against float64", checks.names, checks.run, seconds=50, least_s=15, line_s=30),
    Item(3, "Kernels", kernels.names, kernels.run, seconds=60, least_s=25, line_s=20),
    Item(4, "The step of an 8B model in 4 bits", step.names, step.run, seconds=100, least_s=40, line_s=55),
    Item(5, "The step, one switch at a time", waterfall.names, waterfall.run, seconds=70, least_s=35, line_s=30),
    Item(6, "Catalogue", *_CATALOGUE, seconds=30, least_s=15, line_s=20),
    Item(7, "Small cards", cards.names, cards.run, seconds=65, least_s=35, line_s=45),
    Item(8, "Training", training.names, training.run, seconds=60, least_s=30, line_s=55),
    Item(9, "All tests that need a GPU", *_SUITE, seconds=120, least_s=45, line_s=120),
    Item(10, "Compiled forms and other libraries", baselines.names, baselines.run, seconds=600, least_s=40, line_s=60),
]
