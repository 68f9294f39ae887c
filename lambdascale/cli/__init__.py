"""The ``lambdascale`` console command: main.py, one module per subcommand, and how every command ends (guard.py)."""
