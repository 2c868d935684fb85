"""What one may ask of taskd: submit a job, show it, make a key. The HTTP API and the command line ask."""
