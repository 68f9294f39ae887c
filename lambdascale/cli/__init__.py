"""The ``lambdascale`` console command: main.py, one module per subcommand, and exit statuses (guard.py)."""
