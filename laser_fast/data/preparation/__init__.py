"""From logs to a data set: read, filter, order, write."""
