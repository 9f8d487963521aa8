"""Files that are never half-written: locked, written beside and renamed, sealed with their hashes."""
