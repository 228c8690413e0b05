"""What `ray job submit` runs: `python -m jobs.mashup`, `jobs.search` and `jobs.refresh`, with a config file as on a laptop."""
