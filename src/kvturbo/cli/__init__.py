"""The `kvturbo` command: one file per subcommand."""
