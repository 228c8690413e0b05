"""What `ray job submit` runs: `python -m jobs.mashup`, `jobs.search` and `jobs.refresh`, with the config file of a laptop."""
