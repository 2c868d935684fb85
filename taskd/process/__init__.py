"""Child processes, signals, systemd and the runtime folder; knows neither jobs nor HTTP. Linux only."""
