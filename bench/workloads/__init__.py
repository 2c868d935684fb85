"""The workloads of taskd, a module for each question; each function measures once and returns its figures.

A figure's name ends with its unit: `_per_s`, `_ms`, `_us`, `_mib`, `_percent`. Each clears what was there
before, checks that nothing was lost, and raises when something was.
"""
