"""What happens to a row that cannot be used: it ends the reading, or it is skipped, counted and listed."""

BAD_ROWS = "bad_rows"
BAD_LINES = "bad_lines"


class BadRowError(ValueError):
    """A row breaks a rule; the message names file, line, column and value.

    Args:
        message: the whole sentence.
        reason: the rule and the column without the value, under which such rows are counted.
        lines: of the file that are lost with the row; a quoted row may have several.
    """

    def __init__(self, message: str, reason: str, lines: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.lines = lines


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
        self.lines = 0  # lost with the rows
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
        self.lines += error.lines
        self.by_reason[error.reason] = self.by_reason.get(error.reason, 0) + 1
        if len(self.first) < self.listed:
            self.first.append(str(error))

    def counts(self) -> dict[str, int]:
        """What a manifest counts where rows may be skipped: rows, all and by reason, and lines if these are more."""
        if not self.skip:
            return {}
        lines = {BAD_LINES: self.lines} if self.lines != self.total else {}
        return (
            {BAD_ROWS: self.total}
            | lines
            | {f"{BAD_ROWS}: {reason}": count for reason, count in self.by_reason.items()}
        )

    def describe(self) -> str:
        """What was skipped: the count of every reason, then the first rows in full; "" if nothing was."""
        if not self.by_reason:
            return ""
        size = f" of {self.lines:,} lines" if self.lines != self.total else ""
        lines = [f"skipped {self.total:,} bad rows{size}:"]
        lines += [f"  {count:,}: {reason}" for reason, count in self.by_reason.items()]
        lines += [f"the first {len(self.first)}:", *(f"  {message}" for message in self.first)]
        return "\n".join(lines)
