"""The run on a GPU: a scheduler, the file of lines, a process for every item, and the items."""
