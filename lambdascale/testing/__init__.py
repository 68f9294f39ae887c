"""What the package's own tests use and others may: conformance suites for planners, systems and backends, and doubles.

Subclass a suite in a test module, provide what it asks for, and pytest runs it against your implementation.
"""
