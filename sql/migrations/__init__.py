"""The migrations, packaged as `taskd.sql.migrations`; there is no code here."""
