"""Evaluation: ranks over the whole catalogue or drawn candidates, metrics with intervals, paired comparisons."""

from laser_fast.evaluation.calibration_fit import fit_calibration
from laser_fast.evaluation.candidates import Candidates, draw_candidates, evaluate_candidates, llara_candidates
from laser_fast.evaluation.evaluate import evaluate
from laser_fast.evaluation.groups import cold_line, group_figures
from laser_fast.evaluation.metrics import RankingMetrics, rank_values, table, target_ranks
from laser_fast.evaluation.significance import across_seeds, bootstrap_interval, paired_significance

__all__ = [
    "Candidates",
    "RankingMetrics",
    "across_seeds",
    "bootstrap_interval",
    "cold_line",
    "draw_candidates",
    "evaluate",
    "evaluate_candidates",
    "fit_calibration",
    "group_figures",
    "llara_candidates",
    "paired_significance",
    "rank_values",
    "table",
    "target_ranks",
]
