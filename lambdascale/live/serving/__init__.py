"""The front end of a live cluster: HTTP API, request text, cluster state, metrics and the terminal view."""
