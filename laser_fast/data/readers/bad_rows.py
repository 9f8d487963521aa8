"""What happens to a row that cannot be used: it ends the reading, or it is skipped, counted and listed."""

BAD_ROWS = "bad_rows"


class BadRowError(ValueError):
    """A row breaks a rule; the message names file, line, column and value.

    Args:
        message: the whole sentence.
        reason: the rule and the column without the value, under which such rows are counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class BadRows:
    """Takes the bad rows of one or more files.

    Args:
        skip: count and list bad rows; otherwise the first one is raised.
        listed: how many of them are kept in full.
    """

    def __init__(self, skip: bool = False, listed: int = 20) -> None:
        self.skip = skip
        self.listed = listed
        self.by_reason: dict[str, int] = {}
        self.first: list[str] = []
        self.repeated_items = 0  # rows of items seen before, where the first one counts: no error

    @property
    def total(self) -> int:
        """Rows skipped so far."""
        return sum(self.by_reason.values())

    def add(self, error: BadRowError) -> None:
        """Count the row, or raise its error where rows are not to be skipped.

        Raises:
            BadRowError: `error`, without `skip`.
        """
        if not self.skip:
            raise error
        self.by_reason[error.reason] = self.by_reason.get(error.reason, 0) + 1
        if len(self.first) < self.listed:
            self.first.append(str(error))

    def counts(self) -> dict[str, int]:
        """What a manifest counts: rows skipped, all and by reason, where rows may be skipped."""
        if not self.skip:
            return {}
        return {BAD_ROWS: self.total} | {f"{BAD_ROWS}: {reason}": count for reason, count in self.by_reason.items()}

    def describe(self) -> str:
        """What was skipped: the count of every reason, then the first rows in full; "" if nothing was."""
        if not self.by_reason:
            return ""
        lines = [f"skipped {self.total:,} bad rows:"]
        lines += [f"  {count:,}: {reason}" for reason, count in self.by_reason.items()]
        lines += [f"the first {len(self.first)}:", *(f"  {message}" for message in self.first)]
        return "\n".join(lines)
