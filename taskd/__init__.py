"""taskd: a job queue as a service on PostgreSQL."""

__version__ = "0.1.0"
