"""Rows: functions that take a connection, one query each. The only package that imports psycopg."""
