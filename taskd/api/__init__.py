"""The HTTP API: the one package that imports sanic. It translates between HTTP and `service`."""
