"""Test tools for this package and others: conformance suites for planners, systems and transports, and test doubles.

Subclass a suite in a test module and define the methods it requires; pytest then runs it against your implementation.
"""
