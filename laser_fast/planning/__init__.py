"""What a training step will need: rehearsal, memory, plan."""
