"""Log lines, redaction, the table of metrics. Imports only `taskd.errors`, so every layer may use it."""
