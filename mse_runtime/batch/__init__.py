"""Many clips in one go: features in child processes, one line of output for each input."""
