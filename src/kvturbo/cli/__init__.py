"""The `kvturbo` command: one file per subcommand. `harness` is the command `kvturbo-lm-eval`."""
