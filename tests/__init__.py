"""The tests of taskd, in folders that mirror the package."""
