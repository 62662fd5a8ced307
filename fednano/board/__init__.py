"""`fednano dashboard`: runs of a folder as a web page that follows them.

Reads what runs leave on disk and nothing else, so it sees runs of other processes, needs none of them, and cannot
disturb one. Loads no torch.
"""

from fednano.board.serve import dashboard

__all__ = ["dashboard"]
