"""`laser-fast compare`: a run beside the baselines, on the test users."""

import argparse

from laser_fast.cli.runs import add_output, add_run, load_run, write_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast compare RUN`."""
    add_run(parser)
    add_output(parser)


def run(parsed: argparse.Namespace) -> None:
    """Rank with every system and print one table."""
    import torch

    from laser_fast.evaluation.comparison import compare
    from laser_fast.laser.build import training_counts
    from laser_fast.models.text_scorers import text_vectors
    from laser_fast.nn.text_residual import centred
    from laser_fast.training.text_stage import fit_text_line

    model, inputs, config = load_run(parsed, parsed.model)
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    vectors = text_vectors(model.lm, model.builder)
    read = centred(vectors) if model.text is None else model.text.fetch_vectors()
    temperature, seed = config.objective.temperature, config.training.seed
    comparison = compare(
        model,
        inputs.split,
        counts,
        inputs.recommender,
        vectors=vectors,
        cached=fit_text_line(read, inputs.split, counts, temperature=temperature, seed=seed),
        batch_size=config.evaluation.batch_size,
        tables=inputs.tables(config.evaluation),
    )
    print(comparison)
    write_figures(parsed.output, comparison.to_dict())
