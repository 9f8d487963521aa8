"""Settings of the ID-based recommender, and of the split it shares with Laser."""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from laser_fast.config.bounds import Few, Fraction, Length, Patience, Rate, Seed, Width
from laser_fast.config.settings import Settings

_LATEST = 2.0**63  # moments of a log, in whatever unit


class RecommenderConfig(Settings):
    """The frozen ID-based recommender: SASRec (Kang & McAuley, 2018) or GRU4Rec (Hidasi et al., 2016)."""

    kind: Literal["sasrec", "gru4rec"] = "sasrec"
    width: Width = 64
    """Of the item embeddings and the states."""
    num_layers: Few = 2
    num_heads: Few = 2
    """Attention heads of SASRec; GRU4Rec has none."""
    dropout: Fraction = 0.5
    """Of the embeddings, attention weights and layer outputs."""
    state_dropout: Fraction = 0.2
    """Of the states before they meet the item embeddings; keeps small data sets from being learned by heart."""
    max_length: Length = 50
    """Newest history items that are read; older ones are dropped."""
    batch_size: Length = 128
    """Sequences of up to `max_length` + 1 events; longer ones are cut into several."""
    learning_rate: Rate = 1e-3
    epochs: Annotated[int, Field(ge=1, le=10**5)] = 100
    patience: Patience = 8
    """Epochs without a better validation NDCG@10 before training stops."""
    folds: Annotated[int, Field(ge=0, le=127)] = 3
    """Models beside this one, each fitted without the users of its fold, whose states Laser's training rows are read
    with; 0 = none (the paper), else at least 2."""

    @field_validator("folds")
    @classmethod
    def _several(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("must be 0 or at least 2 (one fold leaves no user to learn from), got 1")
        return folds


class SplitConfig(Settings):
    """What is learned from and what is asked about; the recommender must have been trained on the same split."""

    kind: Literal["leave-one-out", "global-time", "by-user", "given"] = "leave-one-out"
    """"leave-one-out": every user's last two events are held out; "global-time": all events from a moment on;
    "by-user": some users altogether; "given": data that came split (`prepare --presplit`)."""
    valid_from: float | int | str | None = None
    """"global-time": where validation begins, as a number in the unit of the log or, where that is seconds, a date."""
    test_from: float | int | str | None = None
    """"global-time": where test begins. Without both moments the fractions decide."""
    valid_fraction: Fraction = 0.1
    """Share of the events ("global-time") or of the users ("by-user")."""
    test_fraction: Fraction = 0.1
    targets: Literal["first", "last", "all"] = "first"
    """"global-time": which of a user's events in a part are asked about."""
    seed: Seed = 0
    """"by-user": decides who is chosen."""

    @field_validator("valid_from", "test_from", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not abs(value) < _LATEST:  # NaN too
            raise ValueError(f"must be a number of less than 2^63, or a date, got {value:.6g}")
        return value.isoformat() if isinstance(value, date) else value  # YAML reads 2024-01-31 as a date
