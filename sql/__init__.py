"""The SQL files of taskd, packaged as `taskd.sql`; there is no code here."""
