"""The command lines: what each command prints, and its exit code."""
