"""The routes, one noun a file: each reads the request, calls one service function, shows the answer."""
