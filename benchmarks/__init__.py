"""Speed and memory, as ratios of two things measured in one run. The last line of each is one JSON object."""
