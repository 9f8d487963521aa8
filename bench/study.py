"""What decides the ranking: variants of one configuration, each with several seeds, beside lines that train nothing.

    laser-fast recommender train runs/amazon-scientific runs/study/sasrec --folds 3
    python bench/study.py --config bench/studying/amazon-scientific.yaml --work runs/study/amazon-scientific \
        --variants "cached text line" "shared prefix" "M-Former, cross-fitted states" --seeds 3 \
        --out bench/results/cpu/study-amazon-scientific.json

The configuration names data, recommender and language model; the two variants of fold designs read recommenders beside
it, `-shared` and `-own`, whose folds `recommender_files.FoldsRecord` can read and `recommender train` does not make.
Every finished run stays in `--work` and is not repeated, so a study may be stopped and gone on with; with `--kept`
nothing is trained, and what is there is reported.

Scalars of the calibrated score are fitted on the validation rows; test rows are ranked once per run. On data without
test rows the validation rows are the ones that are ranked, half of them by scalars fitted on the other half; the epoch
was still chosen on all of them. With `OMP_NUM_THREADS=1` the figures are those of one thread.
"""

import json
import shlex
import sys
from pathlib import Path

from recording import parser_of
from studying.results import markdown, report_of, summary
from studying.runs import encode_users_once, is_kept, lines, read_texts_once, run_variant
from studying.variants import VARIANTS

from laser_fast.config import LaserConfig
from laser_fast.config.settings import load_config


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a training run")
    parser.add_argument("--work", required=True, help="folder for the runs")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs with seeds 0..SEEDS-1")
    parser.add_argument("--kept", action="store_true", help="train nothing: report the runs that the folder has")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the documentation")
    parser.add_argument("--questions", action="store_true", help="a line for every variant, with the question it asks")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    read_texts_once(work)
    encode_users_once()
    config = load_config(LaserConfig, arguments.config, [*arguments.set, f"output={work / 'unused'}"])
    results = {"lines": lines(config, work)}
    for name in arguments.variants:
        seeds = [seed for seed in range(arguments.seeds) if not arguments.kept or is_kept(VARIANTS[name], seed, work)]
        results[name] = [run_variant(config, VARIANTS[name], seed, work) for seed in seeds]
    results = {name: runs for name, runs in results.items() if runs}
    report = report_of(config, results, shlex.join(["python", *sys.argv]))
    print((markdown if arguments.markdown else summary)(report, by_question=arguments.questions))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
