"""The typed tree of the YAML file: what the keys are, how the file is read, how it is shown.

Only `read` and `parse` of `taskd.config.read` make a `Config`; nobody below the starters
(`engine.daemon`, `api.app`, the commands) sees the tree, only values out of it.
"""
