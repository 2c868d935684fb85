"""What one may ask of taskd: submit a job, show it, make a key. Asked by the HTTP API and the command line."""
