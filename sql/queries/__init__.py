"""The queries, packaged as `taskd.sql.queries`; there is no code here."""
