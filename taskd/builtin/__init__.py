"""The job types that ship with taskd, written as plugins on the same hooks as anybody's."""
