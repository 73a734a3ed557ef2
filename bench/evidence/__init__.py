"""`python -m bench.evidence`: one command that checks and measures everything on a GPU, in stages."""
