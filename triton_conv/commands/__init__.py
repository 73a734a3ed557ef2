"""The subcommands of `triton-conv`, a module each: `add` describes its arguments, `run` does it."""
