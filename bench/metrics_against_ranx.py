"""HR, NDCG and MRR of this library and of ranx (https://github.com/AmenRa/ranx) on the same scores without ties.

    pip install ranx
    python bench/metrics_against_ranx.py --out bench/results/cpu/metrics-against-ranx.json

Scores are random permutations, so no two of a row are equal: with ties ranx takes some order, here they count against
the target.
"""

from importlib import metadata

import torch
from ranx import Qrels, Run
from ranx import evaluate as ranx_evaluate
from recording import parser_of, record

from laser_fast.evaluation import rank_values, target_ranks

_NAMES = {f"{ours}@{k}": f"{theirs}@{k}" for ours, theirs in (("HR", "hit_rate"), ("NDCG", "ndcg")) for k in (1, 5, 10)}
_NAMES |= {"HR@20": "hit_rate@20", "NDCG@20": "ndcg@20", "MRR": "mrr"}
_LIMIT = 1e-9


def main() -> None:
    """Compare row by row, print the largest difference, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(arguments.rows, arguments.items, generator=generator).argsort(dim=1).double()
    targets = torch.randint(arguments.items, (arguments.rows,), generator=generator)
    # every second target is moved to the first ranks, so that cut-offs have hits to weigh
    best = torch.randint(1, 25, (arguments.rows,), generator=generator)
    row = torch.arange(arguments.rows)[::2]
    scores[row, targets[::2]] = arguments.items - best[::2].double() - 0.5
    ranks = target_ranks(scores, targets)
    qrels = Qrels({f"q{q}": {f"i{item}": 1} for q, item in enumerate(targets.tolist())})
    run = Run(
        {f"q{q}": {f"i{item}": score for item, score in enumerate(line)} for q, line in enumerate(scores.tolist())}
    )
    theirs = ranx_evaluate(qrels, run, list(_NAMES.values()), return_mean=False)
    order = [int(name[1:]) for name in run.keys()]  # noqa: SIM118  # ranx may sort its queries
    figures = {}
    for name, other in _NAMES.items():
        ours, found = rank_values(ranks, name)[order], torch.as_tensor(theirs[other], dtype=torch.float64)
        difference = (ours - found).abs().max().item()
        figures[name] = {
            "ours": ours.mean().item(),
            "ranx": found.mean().item(),
            "largest_difference_of_a_row": difference,
        }
        print(f"{name:8} {ours.mean():.10f} {found.mean():.10f} {difference:.1e}")
        if difference > _LIMIT:
            raise SystemExit(f"{name} differs by {difference}")
    facts = {
        "ranx": metadata.version("ranx"),
        "rows": arguments.rows,
        "items": arguments.items,
        "figures": figures,
    }
    record(arguments.out, facts)


if __name__ == "__main__":
    main()
