"""`quire bench serve`: load on a running server, and what it did to the answers' times."""
