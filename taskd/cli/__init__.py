"""The `taskd` command."""
