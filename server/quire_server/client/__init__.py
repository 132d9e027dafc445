"""What talks to running servers: `quire chat`, `complete`, `ps`, `bench serve`."""
