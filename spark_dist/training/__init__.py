"""Jobs, their stages and the one loop; processes, checkpoints, tracking."""
