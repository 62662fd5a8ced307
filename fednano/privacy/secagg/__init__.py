"""Secure aggregation: a server adds clients' vectors without seeing any of them.

SecAgg+ (Bell et al., CCS 2020, eprint 2020/704) on the protocol of Bonawitz et al. (CCS 2017, eprint 2017/281). Knows
neither Flower nor gRPC, and nothing of adapters: it adds vectors of 64-bit integers.

One session is four exchanges:

1. *keys*. Each client u draws a secret and sends two X25519 public keys, ``c_u`` for secrecy between clients and
   ``s_u`` for masks, and a commitment to a seed ``b_u``.
2. *shares*. Each client gets the keys of its neighbours in a k-regular graph, splits the private key of ``s_u`` and the
   seed ``b_u`` into Shamir shares, and sends each neighbour its two shares, encrypted, by way of the server.
3. *masked*. Over the neighbours v that took part in 2, each client sends, modulo 2**64,
   ``y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)``, with ``s_uv`` agreed from ``s_u`` and
   ``s_v``.
4. *reveal*. The server says who sent ``y``. Each client gives, for each neighbour, one share: of its ``b`` if it did,
   of its ``s`` if it did not. With t shares of each, the server takes the remaining masks off the sum.

**Exactness.** Pairwise masks cancel and the others are taken off, all in the ring of integers modulo 2**64, where
addition is exact. The result is the sum of the survivors' vectors modulo 2**64, to the bit. Read as signed numbers it
is the sum itself as long as that lies in [-2**63, 2**63); `fednano.aggregation.fixedpoint` proves this of the vectors
that it makes, and `fednano.aggregation.linear` of the counts beside them.

**Secrecy.** Against a server that follows the protocol and together with fewer than t of the share-holders of any
client sees everything they see, ``y_u`` is uniform until the last exchange, and afterwards only the sum over all
survivors is known. A client answers each exchange of a session once, and a share of ``b`` or of ``s``, never both; t is
more than half of the holders, so that even a server that tells clients different stories cannot collect t of both. What
this is not: clients do not prove that their vectors are sane, and a server that invents clients can outvote the
threshold; see docs/privacy.md.
"""

from fednano.privacy.secagg.client import Client
from fednano.privacy.secagg.errors import BelowThreshold, ProtocolError
from fednano.privacy.secagg.graph import Plan, plan
from fednano.privacy.secagg.server import Server

__all__ = ["BelowThreshold", "Client", "Plan", "ProtocolError", "Server", "plan"]
