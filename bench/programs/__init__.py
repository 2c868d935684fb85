"""Programs that the peers' own interpreters run: of taskd and bench they import only each other."""
