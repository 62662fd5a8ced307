"""What still leaks: attacks on what a run puts on the wire, and how often they succeed.

Each attack is simple and known to everybody; a better one may find more. The numbers are lower bounds on what leaks.
"""

from fednano.privacy.audit.run import Finding, audit_run

__all__ = ["Finding", "audit_run"]
