"""The process that runs jobs: the only place where plugin code is imported and called."""
