"""The parts of `bench/study.py`: variants, runs, lines without training, tables."""
